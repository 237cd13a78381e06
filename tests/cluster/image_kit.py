"""The images of the cluster, as files that `ctr images import` reads. No registry is asked.

The agent's image is that of deploy/images/agent with this tree's package installed over the package in it, by dpkg and
without network. The base is kept in build/cluster, because building it asks Debian's archive.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.containers.engines import make_root
from tests.support.host import BUILD

BASE, PACKAGES = BUILD / "cluster/base", BUILD / "cluster/packages"
PAUSE = b"#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"


def archive(name: str, root: Path, work: Path, config: Mapping[str, Any]) -> Path:
    """Write an image with one layer, as `docker save` does. `config`: entry point, environment."""
    out = work / name.rpartition("/")[2].replace(":", "-")
    out.mkdir()
    subprocess.run(["tar", "--create", "--file", out / "layer.tar", "--directory", root, "."], check=True, timeout=120)
    with open(out / "layer.tar", "rb") as layer:
        digest = hashlib.file_digest(layer, "sha256").hexdigest()
    facts = {"architecture": "amd64", "os": "linux", "config": dict(config)}
    facts["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
    (out / "config.json").write_text(json.dumps(facts))
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with tarfile.open(out.with_suffix(".tar"), "w") as image:
        for file in ("manifest.json", "config.json", "layer.tar"):
            image.add(out / file, file)
    shutil.rmtree(out)
    return out.with_suffix(".tar")


def pause(name: str, work: Path) -> Path:
    """Make the image of a pod's sandbox: one static program, which waits."""
    root = work / "pause-root"
    root.mkdir()
    subprocess.run(["gcc", "-static", "-xc", "-", "-o", root / "pause"], input=PAUSE, check=True, timeout=60)
    return archive(name, root, work, {"Entrypoint": ["/pause"]})


def tenant(name: str, work: Path) -> Path:
    """Make the image of a user: glibc, a shell, and the example program that fills its memory."""
    root = make_root(work / "tenant-root")
    shutil.copy2(BUILD / "examples/fill", root / "bin/fill")
    return archive(name, root, work, {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["sleep", "infinity"]})


class Agent:
    """The agent's image, with this tree's package."""

    def __init__(self, work: Path) -> None:
        self._work, self._root = work, work / "agent-root"
        self._root.mkdir()
        (base,) = BASE.glob("fgpu-agent-image-*.oci.tar")
        with tarfile.open(base) as image:
            (one,) = json.load(_member(image, "manifest.json"))
            self._config = json.load(_member(image, one["Config"]))["config"]
            (layer,) = one["Layers"]
            command = ["tar", "--extract", "--gzip", "--directory", str(self._root)]
            with subprocess.Popen(command, stdin=subprocess.PIPE) as packed:
                assert packed.stdin
                shutil.copyfileobj(_member(image, layer), packed.stdin)
                packed.stdin.close()
            assert packed.returncode == 0
        (package,) = PACKAGES.glob("fgpu_*.deb")
        shutil.copy(package, self._root / "package.deb")
        install = "dpkg --install /package.deb && rm /package.deb && groupdel fgpu"
        self._run("chroot", str(self._root), "sh", "-ec", install)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def version(self, name: str, mark: str) -> Path:
        """Make the image with a name. `mark`: contents of a file, so that two images differ."""
        (self._root / "etc/fgpu-mark").write_text(mark)
        return archive(name, self._root, self._work, self._config)


def _member(image: tarfile.TarFile, name: str) -> Any:
    found = image.extractfile(name)
    assert found, name
    return found
