"""Containers of three engines with the root file system of another release (see tests/support/roots.py)."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.containers import engines as kit
from tests.support.host import ROOT
from tests.support.place import HUB, Place
from tests.support.roots import DRIVER, Release, root_of, run
from tests.support.tenant import Tenant
from tests.support.wait import eventually

ENVIRONMENT = {"PATH": f"{DRIVER}:/usr/bin:/bin", "LD_LIBRARY_PATH": f"{DRIVER}/lib", "HOME": "/root"}


@contextlib.contextmanager
def layered(release: Release, work: Path, prefix: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a writable root, as an engine creates it from an image.

    `prefix` is the command that enters its namespace.
    """
    top, spare, root = (work / f"{name}-{release.glibc}" for name in ("top", "spare", "root"))
    for folder in (top, spare, root):
        folder.mkdir()
    layers = f"lowerdir={root_of(release)},upperdir={top},workdir={spare}"
    run(*prefix, "mount", "-t", "overlay", "overlay", "-o", layers, root)
    try:
        yield root
    finally:
        run(*prefix, "umount", root)


class Images(kit.Bundles):
    """Containers of runc or crun whose root file system is `root`, without the host's system folders."""

    root: Path

    def _bundle(self, bundle: Path, name: str, folder: Path) -> None:
        super()._bundle(bundle, name, folder)
        path = bundle / "config.json"
        config = json.loads(path.read_text())
        hosts = {*(f"/{name}" for name in ("usr", "bin", "sbin", "lib", "lib64")), str(ROOT / ".venv")}
        config["mounts"] = [mount for mount in config["mounts"] if mount["destination"] not in hosts]
        config["root"]["path"] = str(self.root)
        config["process"]["env"] = [f"{key}={value}" for key, value in ENVIRONMENT.items()]
        path.write_text(json.dumps(config))


class Pods(Place):
    """Containers of podman with such a root, each with one CDI device."""

    root: Path
    device: str

    def __init__(self, work: Path, podman: kit.Podman) -> None:
        super().__init__(work)
        self._podman = podman

    def _make(self, name: str, folder: Path, memory: int | None) -> Tenant:
        mounts = (f"{DRIVER}:{DRIVER}:ro", "/run/fgpu-sim:/run/fgpu-sim:ro", f"{folder}:{folder}")
        words: list[str | Path] = ["run", "--interactive", "--name", name, *kit.ALLOWED, "--workdir", folder]
        words += [*(f"--volume={mount}" for mount in mounts), *(f"--env={k}={v}" for k, v in ENVIRONMENT.items())]
        words += ["--device", f"fgpu.dev/share={self.device}", "--rootfs", self.root]
        hub = self._podman.start(*words, "sh", "-c", HUB)
        identity = self._identity(name, hub)
        tenant = Tenant(self, name, f"/{self._podman.group}/libpod-{identity}", folder, hub)
        tenant.name = tenant.view()["tenant"]
        return tenant

    def _identity(self, name: str, hub: subprocess.Popen[bytes]) -> str:
        def found() -> str:
            assert hub.poll() is None, f"podman has ended: {hub.returncode}"
            shown = self._podman.call("inspect", "--format", "{{.State.Running}} {{.ID}}", name, check=False).stdout
            return shown.removeprefix("true ").strip() if shown.startswith("true ") else ""

        return eventually(found, 30, name)

    def end(self, tenant: Tenant) -> None:
        """See Place."""
        self._podman.remove(tenant.folder.name)
        super().end(tenant)
