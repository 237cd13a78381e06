"""The image of deploy/images/agent, built by a real Docker on this distribution's own base, without a registry.

It owns build/kubernetes/image.tar, made again if the package or the Dockerfile has changed. A failed download is a
failure that names it, and never skips a test.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from tests.support.containers.docker import DOCKERD, ENGINES, PATH
from tests.support.host import BUILD, ROOT
from tests.support.place import PRIVATE_MOUNTS
from tests.support.wait import eventually

DOCKERFILE = ROOT / "deploy/images/agent/Dockerfile"
MADE = BUILD / "kubernetes"
BASE = "debian:bookworm-slim"


def _run(*command: str | Path, **more: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


def archive(root: Path, deb: Path, name: str, work: Path) -> Path:
    """Build the image and write it as `docker save` does. `root`: a base root file system of this distribution."""
    digest = hashlib.sha256(deb.read_bytes() + DOCKERFILE.read_bytes() + name.encode()).hexdigest()[:16]
    made = MADE / f"{digest}.tar"
    if made.exists():
        return made
    MADE.mkdir(parents=True, exist_ok=True)
    for old in MADE.glob("*.tar"):
        old.unlink()
    context = work / "context"
    context.mkdir()
    os.link(deb, context / deb.name)
    with Docker(work) as docker:
        docker.take(root, BASE)
        docker.call("build", "--network=host", "--file", DOCKERFILE, "--tag", name, context)
        docker.call("save", "--output", made.with_suffix(".new"), name)
    made.with_suffix(".new").rename(made)
    return made


class Docker:
    """A separate daemon that builds in the host's network."""

    def __init__(self, work: Path) -> None:
        assert DOCKERD, "no dockerd: ./dev test unpacks it"
        self._socket, self._log = work / "d.sock", work / "dockerd.log"
        places = ["--data-root", work / "data", "--exec-root", work / "x", "--pidfile", work / "pid"]
        kinds = ["--storage-driver=overlay2", "--iptables=false", "--bridge=none", f"--host=unix://{self._socket}"]
        command = ["unshare", "-m", "sh", "-c", PRIVATE_MOUNTS, "sh", DOCKERD, *places, *kinds]
        command += ["--exec-opt", "native.cgroupdriver=cgroupfs"]
        with open(self._log, "wb") as log:
            environment = {**os.environ, "PATH": PATH}
            self._daemon = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment)

    def __enter__(self) -> Docker:
        def answers() -> bool:
            assert self._daemon.poll() is None, self._log.read_text()
            return subprocess.run(self._words("version"), capture_output=True, check=False).returncode == 0

        eventually(answers, 60, "dockerd")
        return self

    def _words(self, *words: str | Path) -> list[str]:
        return [str(ENGINES / "usr/bin/docker"), "--host", f"unix://{self._socket}", *map(str, words)]

    def call(self, *words: str | Path) -> None:
        """Run one command."""
        _run(*self._words(*words), timeout=170, env={**os.environ, "DOCKER_BUILDKIT": "0"})

    def take(self, root: Path, name: str) -> None:
        """Import a root file system as an image."""
        tar = ["tar", "-C", str(root), "--exclude=./proc/*", "--exclude=./sys/*", "-cf", "-", "."]
        with subprocess.Popen(tar, stdout=subprocess.PIPE) as writer:
            subprocess.run(self._words("import", "-", name), check=True, stdin=writer.stdout, stdout=sys.stderr)

    def __exit__(self, *_: object) -> None:
        self._daemon.terminate()
        self._daemon.wait(30)


def thin(name: str, work: Path) -> Path:
    """Make an image without a package: commands that call this checkout, which Node mounts, and this machine's /usr."""
    root, out = work / "thin", work / "thin-archive"
    words = {"fgpu": f"{ROOT}/.venv/bin/fgpu", "fgpu-gatekeeper": f"{ROOT}/.venv/bin/fgpu-gatekeeper"}
    words["fgpu-oci"] = f"{BUILD}/oci/fgpu-oci"
    (root / "opt/fgpu").mkdir(parents=True)
    (root / "usr").mkdir()
    (root / "run").mkdir()
    (root / "var").mkdir()
    (root / "var/run").symlink_to("/run")
    for word, program in words.items():
        (root / "opt/fgpu" / word).symlink_to(program)
    for link in ("bin", "sbin", "lib", "lib64"):
        (root / link).symlink_to(f"usr/{link}")
    out.mkdir()
    with tarfile.open(out / "layer.tar", "w") as layer:
        layer.add(root, ".")
    digest = hashlib.sha256((out / "layer.tar").read_bytes()).hexdigest()
    environment = ["PATH=/opt/fgpu:/usr/sbin:/usr/bin:/sbin:/bin"]
    config = {"architecture": "amd64", "os": "linux", "config": {"Env": environment, "Entrypoint": ["fgpu"]}}
    config["rootfs"] = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
    (out / "config.json").write_text(json.dumps(config))
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
    (out / "manifest.json").write_text(json.dumps(manifest))
    with tarfile.open(work / "thin.tar", "w") as archive:
        for file in ("manifest.json", "config.json", "layer.tar"):
            archive.add(out / file, file)
    return work / "thin.tar"
