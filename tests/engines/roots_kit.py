"""Root file systems of other releases, each with its own C library, Python with numba, and shell.

The module creates build/roots/glibc-VERSION once from that release's packages, unpacked and never configured, and a
simulated driver for all of them, built against the oldest. A failed download fails the tests with the release's name,
and never skips a test. The module imports nothing of fgpu.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.containers import engines as kit
from tests.support.host import BUILD, ROOT
from tests.support.place import HUB, Place
from tests.support.tenant import Tenant
from tests.support.wait import eventually

ROOTS = BUILD / "roots"
DRIVER = ROOTS / "driver"
UBUNTU, DEBIAN = "http://archive.ubuntu.com/ubuntu", "http://deb.debian.org/debian"
DEBIAN_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
PACKAGES = ("python3", "dash", "coreutils", "libstdc++6")
TO_BUILD = ("libc6-dev",)
LAST_BUILTIN = ("numba==0.61.2", "llvmlite==0.44.0", "numpy==1.26.4")
LATEST = ("numba==0.61.2", "llvmlite==0.44.0", "numpy==2.2.6")
ENVIRONMENT = {"PATH": f"{DRIVER}:/usr/bin:/bin", "LD_LIBRARY_PATH": f"{DRIVER}/lib", "HOME": "/root"}


@dataclass(frozen=True, slots=True)
class Release:
    """A release of a distribution.

    `digest` is the SHA-256 of its Release file, which no longer changes. Without a digest, the signature is checked.
    """

    glibc: str
    suite: str
    mirror: str
    python: str
    wheels: tuple[str, ...]
    digest: str = ""


RELEASES = (
    Release("2.27", "bionic", UBUNTU, "3.6", ("numba==0.53.1", "llvmlite==0.36.0", "numpy==1.19.5",
                                              "setuptools==59.6.0"),
            "690bd875ab5799394af7406f32f2e698c48e772ac367d520f74ec1095662da4d"),
    Release("2.31", "focal", UBUNTU, "3.8", ("numba==0.58.1", "llvmlite==0.41.1", "numpy==1.24.4",
                                             "importlib-metadata==8.5.0", "zipp==3.20.2"),
            "cc9be89a0984aeca9e3ca40ae0e6decff75aa32653a5925b04956a7c12487e99"),
    Release("2.35", "jammy", UBUNTU, "3.10", LAST_BUILTIN,
            "c14060cd8c6d625874dfcb9523a35a395bf4865c28b6b6a82569ef326fe92dc6"),
    Release("2.36", "bookworm", DEBIAN, "3.11", LAST_BUILTIN),
    Release("2.39", "noble", UBUNTU, "3.12", LAST_BUILTIN,
            "cdb2f31d809f589719a53c6ad15f255b27569c4059542ada282aaa21b8e164b0"),
    Release("2.41", "trixie", DEBIAN, "3.13", LATEST),
    Release("2.42", "questing", UBUNTU, "3.13", LATEST,
            "9e5889fd7c39f73bfad7847e355b514c600e004602fd4227c8cc53d4fd94b1c4"),
)  # fmt: skip
OLDEST = RELEASES[0]


def _run(*command: str | Path, **more: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)
    assert done.returncode == 0, f"{command}: {done.stdout[-500:]}{done.stderr[-500:]}"


def root_of(release: Release) -> Path:
    """Return its root file system."""
    root, aside = ROOTS / f"glibc-{release.glibc}", ROOTS / f".glibc-{release.glibc}"
    if root.exists():
        return root
    shutil.rmtree(aside, ignore_errors=True)
    for name in ("bin", "sbin", "lib", "lib64"):  # as every current release has them
        (aside / "usr" / name).mkdir(parents=True)
        (aside / name).symlink_to(f"usr/{name}")
    for package in _packages(release, aside / "apt"):
        unpack = 'dpkg-deb --fsys-tarfile "$1" | tar -xC "$2" --keep-directory-symlink'
        _run("sh", "-c", unpack, "sh", package, aside)
    shutil.rmtree(aside / "apt")
    for link in (path for path in aside.rglob("*") if path.is_symlink()):  # for programs outside that build against it
        target = os.readlink(link)
        if target.startswith("/"):
            link.unlink()
            link.symlink_to(os.path.relpath(f"{aside}{target}", link.parent.resolve()))
    (aside / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    _wheels(release, aside / "usr/lib/python3/dist-packages")
    aside.rename(root)
    return root


def _packages(release: Release, work: Path) -> list[Path]:
    """Return the release's packages that a root needs, from a package manager without any state of this host."""
    (work / "archives/partial").mkdir(parents=True)
    (work / "lists/partial").mkdir(parents=True)
    trust = "trusted=yes" if release.digest else f"signed-by={DEBIAN_KEYS}"
    (work / "sources").write_text(f"deb [{trust}] {release.mirror} {release.suite} main\n")
    own = {"Etc::sourcelist": "sources", "State::lists": "lists", "Cache": "."}
    options = [f"-oDir::{key}={work / place}" for key, place in own.items()]
    options += ["-oDir::Etc::sourceparts=/dev/null", "-oDir::State::status=/dev/null"]
    options += ["-oAPT::Sandbox::User=root", "-oAcquire::Languages=none"]
    _run("apt-get", *options, "update")
    if release.digest:
        (listing,) = (work / "lists").glob("*Release")
        found = hashlib.sha256(listing.read_bytes()).hexdigest()
        assert found == release.digest, f"{release.mirror} has another {release.suite}: {found}"
    wanted = [*PACKAGES, *(TO_BUILD if release is OLDEST else ())]
    _run("apt-get", *options, "install", "-y", "--download-only", "--no-install-recommends", *wanted)
    return sorted((work / "archives").glob("*.deb"))


def _wheels(release: Release, place: Path) -> None:
    platforms = [f"--platform=manylinux{kind}_x86_64" for kind in ("_2_27", "2014", "2010", "1")]
    where = ["--target", place, "--python-version", release.python, "--implementation=cp", *platforms]
    how = ["--only-binary=:all:", "--no-deps", "--no-compile", "--ignore-requires-python"]
    _run(sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", *how, *where, *release.wheels)


def driver() -> Path:
    """Build a simulated driver and nvidia-smi that need only symbols of the oldest release, as real drivers do."""
    oldest = root_of(OLDEST)
    compiler = f"gcc --sysroot={oldest} -B{oldest}/usr/lib/x86_64-linux-gnu"
    made = [DRIVER / name for name in ("lib/libcuda.so.1", "lib/libnvidia-ml.so.1", "nvidia-smi")]
    places = [f"OUT={DRIVER}", f"HEADERS={BUILD}/headers"]
    _run("make", "-s", "-C", ROOT / "sim", *places, f"CC={compiler}", *made)
    return DRIVER


@contextlib.contextmanager
def layered(release: Release, work: Path, prefix: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a writable root, as an engine creates it from an image.

    `prefix` is the command that enters its namespace.
    """
    top, spare, root = (work / f"{name}-{release.glibc}" for name in ("top", "spare", "root"))
    for folder in (top, spare, root):
        folder.mkdir()
    layers = f"lowerdir={root_of(release)},upperdir={top},workdir={spare}"
    _run(*prefix, "mount", "-t", "overlay", "overlay", "-o", layers, root)
    try:
        yield root
    finally:
        _run(*prefix, "umount", root)


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
