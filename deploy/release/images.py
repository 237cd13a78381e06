"""The images of deploy/images/agent and device-plugin, as OCI layouts, without a registry.

mmdebstrap makes the base image, and a separate Docker (build/engines) builds the Dockerfiles with it. Each image has
one layer: the container's file system, without caches, logs and the times of the build.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import archives

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "deploy/images"
SUITE, BASE = "bookworm", "debian:bookworm-slim"  # as the Dockerfiles name them
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
# Files that engines create, or that depend on the time or place of the build.
LEFT_OUT = re.compile(
    r"\.dockerenv$|(dev|proc|sys|tmp)/.|etc/(hostname|hosts|resolv\.conf)$|var/lib/dpkg/.*-old$"
    r"|etc/(passwd|group|shadow|gshadow|subuid|subgid)-$"
)
LEFT_OUT_FILES = re.compile(r"var/(cache/(apt|ldconfig|man)|lib/apt/lists|log)/")
READY_SECONDS = 60
LEVEL = 6  # gzip's compression level
# On a host with both versions of cgroups, cgroup v2 is not mounted at /sys/fs/cgroup.
MOUNTS = '[ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup; exec "$@"'


def _run(*command: str | Path, **more: Any) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **more)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


class Engine:
    """A separate Docker daemon for one release."""

    def __init__(self, engines: Path, work: Path) -> None:
        self._docker = engines / "usr/bin/docker"
        self._socket, self._log = work / "d.sock", work / "dockerd.log"
        path = ":".join([str(engines / "usr/sbin"), str(engines / "usr/bin"), PATH])
        places = ["--data-root", work / "data", "--exec-root", work / "x", "--pidfile", work / "pid"]
        kinds = ["--storage-driver=overlay2", "--iptables=false", "--bridge=none", f"--host=unix://{self._socket}"]
        command = ["unshare", "-m", "sh", "-c", MOUNTS, "sh", "dockerd", *places, *kinds]
        command += ["--exec-opt", "native.cgroupdriver=cgroupfs"]
        with open(self._log, "wb") as log:
            self._daemon = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, env={**os.environ, "PATH": path}
            )

    def _words(self, *words: str | Path) -> list[str]:
        return [str(self._docker), "--host", f"unix://{self._socket}", *map(str, words)]

    def call(self, *words: str | Path) -> str:
        """Run a command of the docker client and return its output. Raises SystemExit if it fails."""
        return _run(*self._words(*words), env={**os.environ, "DOCKER_BUILDKIT": "0"})

    def wait(self) -> None:
        """Wait until the daemon answers. Raises SystemExit if it does not start within READY_SECONDS."""
        deadline = time.monotonic() + READY_SECONDS
        while subprocess.run(self._words("version"), capture_output=True, check=False).returncode:
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"dockerd does not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.2)

    def end(self) -> None:
        """Stop the daemon."""
        self._daemon.terminate()
        self._daemon.wait(60)

    def export(self, image: str, out: Path) -> None:
        """Write the file system of an image to a tar file."""
        container = self.call("create", "--network=none", image).strip()
        self.call("export", "--output", out, container)
        self.call("rm", container)


@contextmanager
def engine(engines: Path, work: Path) -> Iterator[Engine]:
    """Run a Docker that has the base image."""
    root = work / "base.tar"
    _run("mmdebstrap", "--quiet", "--variant=minbase", SUITE, root)
    docker = Engine(engines, work)
    try:
        docker.wait()
        docker.call("import", "--change", f"ENV PATH={PATH}", "--change", 'CMD ["bash"]', root, BASE)
        root.unlink()
        yield docker
    finally:
        docker.end()


class _Hashed:
    """A stream that writes to another stream and computes the digest of all data."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)


def _layer(exported: Path, out: Path) -> str:
    """Write the layer, and return the digest of its uncompressed data.

    Members stay in the order of the export. This order is by name within each folder, and a hard link follows its
    target.
    """
    with tarfile.open(exported) as old, archives.compressed(out, LEVEL) as packed:
        through = _Hashed(packed)
        with tarfile.open(fileobj=through, mode="w|", format=tarfile.PAX_FORMAT) as new:  # type: ignore[arg-type]
            for info in old:
                if LEFT_OUT.match(info.name) or (LEFT_OUT_FILES.match(info.name) and not info.isdir()):
                    continue
                # Python's bytecode contains the time of its source, so times before the commit are not changed.
                info.mtime, info.uname, info.gname = min(int(info.mtime), archives.epoch()), "", ""
                kept = {key: value for key, value in info.pax_headers.items() if key.startswith("SCHILY.xattr.")}
                info.pax_headers = kept
                new.addfile(info, old.extractfile(info) if info.isreg() else None)
    return through.sha256.hexdigest()


def _packages(exported: Path) -> list[tuple[str, str]]:
    """Return name and version of each Debian package in the image."""
    with tarfile.open(exported) as tar:
        status = tar.extractfile("var/lib/dpkg/status")
        assert status
        text = status.read().decode()
    return re.findall(r"^Package: (.*)\nStatus: .*(?:\n.+)*?\nVersion: (.*)$", text, re.MULTILINE)


def build(docker: Engine, kind: str, version: str, deb: Path, work: Path, out: Path) -> list[tuple[str, str]]:
    """Build deploy/images/KIND/Dockerfile as an OCI layout. Return name and version of each Debian package in it."""
    context = work / f"context-{kind}"
    context.mkdir()
    shutil.copy(deb, context)
    name = f"fgpu:{version}" if kind == "agent" else f"fgpu-{kind}:{version}"
    labels = {"title": name.partition(":")[0], "version": version, "licenses": "Apache-2.0"}
    words = [word for key, value in labels.items() for word in ("--label", f"org.opencontainers.image.{key}={value}")]
    words += ["--build-arg", f"SOURCE_DATE_EPOCH={archives.epoch()}"]
    docker.call("build", "--network=host", "--file", IMAGES / kind / "Dockerfile", "--tag", name, *words, context)
    exported, layer = work / f"{kind}.tar", work / f"{kind}.tar.gz"
    docker.export(name, exported)
    digest = _layer(exported, layer)
    (shown,) = json.loads(docker.call("image", "inspect", name))
    kept = {key: shown["Config"][key] for key in ("Env", "Entrypoint", "Cmd", "Labels") if shown["Config"].get(key)}
    config = {
        "created": archives.moment(),
        "architecture": "amd64",
        "os": "linux",
        "config": kept,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        "history": [{"created": archives.moment(), "created_by": f"deploy/images/{kind}/Dockerfile"}],
    }
    parts = archives.Blob(CONFIG, archives.as_json(config)), [archives.Blob(LAYER, layer)]
    archives.oci_layout(out, *parts, f"docker.io/library/{name}", docker=True)
    found = _packages(exported)
    exported.unlink()
    layer.unlink()
    return found
