"""Root file systems of other releases, each with its own C library, Python and shell, most with numba.

The module creates build/roots/glibc-VERSION once from that release's packages, unpacked and never configured, and a
simulated driver for all of them, built against an old one. It raises NoDownload, with the command that failed, if
packages cannot be had. The module imports nothing of fgpu.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.host import BUILD, ROOT

ROOTS = BUILD / "roots"
DRIVER = ROOTS / "driver"
UBUNTU, DEBIAN = "http://archive.ubuntu.com/ubuntu", "http://deb.debian.org/debian"
DEBIAN_KEYS = "/usr/share/keyrings/debian-archive-keyring.gpg"
HELPER = "/usr/lib/apt/apt-helper"
PACKAGES = ("python3", "dash", "coreutils", "libstdc++6")
TO_BUILD = ("libc6-dev",)
LAST_BUILTIN = ("numba==0.61.2", "llvmlite==0.44.0", "numpy==1.26.4")
LATEST = ("numba==0.61.2", "llvmlite==0.44.0", "numpy==2.2.6")


class NoDownload(Exception):
    """Packages could not be had from their mirror."""


@dataclass(frozen=True, slots=True)
class Release:
    """A release of a distribution.

    `digest` is the SHA-256 of its Release file, which no longer changes. Without a digest, the signature is checked.
    `libc` is a package with the C library of an older release, which the root has instead: its path on the mirror and
    its SHA-256.
    """

    glibc: str
    suite: str
    mirror: str
    python: str
    wheels: tuple[str, ...]
    digest: str = ""
    libc: tuple[str, str] = ("", "")


XENIAL = "30e9ff343d9ec0b64d28d27010bf472090bb3399b4b6bc5aee077085e920e89b"
RELEASES = (
    # No mirror has the lists of trusty, the release with glibc 2.19. No numba for Python 3.5 supports a current driver.
    Release("2.19", "xenial", UBUNTU, "3.5", (), XENIAL,
            ("pool/main/e/eglibc/libc6_2.19-0ubuntu6.15_amd64.deb",
             "b10b75ad73cadb9930b65f7744c59290f68d01d6819656895e326df481904755")),
    Release("2.23", "xenial", UBUNTU, "3.5", (), XENIAL),
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
OLD = RELEASES[:2]
BASE = OLD[1]  # programs and the simulated driver are built against its C library
FEW = BASE, next(release for release in RELEASES if release.wheels)


def run(*command: str | Path, **more: Any) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)
    assert done.returncode == 0, f"{command}: {done.stdout[-500:]}{done.stderr[-500:]}"


def root_of(release: Release) -> Path:
    """Return its root file system. One process creates it, and others wait for it."""
    root = ROOTS / f"glibc-{release.glibc}"
    ROOTS.mkdir(parents=True, exist_ok=True)
    with open(ROOTS / f"{root.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return root if root.exists() else _create(root, release)


def _create(root: Path, release: Release) -> Path:
    aside = root.with_name(f".{root.name}")
    shutil.rmtree(aside, ignore_errors=True)
    for name in ("bin", "sbin", "lib", "lib64"):  # as every current release has them
        (aside / "usr" / name).mkdir(parents=True)
        (aside / name).symlink_to(f"usr/{name}")
    for package in _packages(release, aside / "apt"):
        unpack = 'dpkg-deb --fsys-tarfile "$1" | tar -xC "$2" --keep-directory-symlink'
        run("sh", "-c", unpack, "sh", package, aside)
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
    """Return the release's packages that a root needs, from a package manager without any state of this host.

    An older C library is the last of them, so that its files replace the release's.
    """
    (work / "archives/partial").mkdir(parents=True)
    (work / "lists/partial").mkdir(parents=True)
    trust = "trusted=yes" if release.digest else f"signed-by={DEBIAN_KEYS}"
    (work / "sources").write_text(f"deb [{trust}] {release.mirror} {release.suite} main\n")
    own = {"Etc::sourcelist": "sources", "State::lists": "lists", "Cache": "."}
    options = [f"-oDir::{key}={work / place}" for key, place in own.items()]
    options += ["-oDir::Etc::sourceparts=/dev/null", "-oDir::State::status=/dev/null"]
    options += ["-oAPT::Sandbox::User=root", "-oAcquire::Languages=none"]
    _apt("apt-get", *options, "update")
    listings = list((work / "lists").glob("*Release"))
    if not listings:  # apt-get reports this as a warning alone
        raise NoDownload(f"{release.mirror} does not answer")
    if release.digest:
        found = hashlib.sha256(listings[0].read_bytes()).hexdigest()
        assert found == release.digest, f"{release.mirror} has another {release.suite}: {found}"
    wanted = [*PACKAGES, *(TO_BUILD if release is BASE else ())]
    _apt("apt-get", *options, "install", "-y", "--download-only", "--no-install-recommends", *wanted)
    found = sorted((work / "archives").glob("*.deb"))
    path, digest = release.libc
    if path:
        found.append(work / Path(path).name)
        _apt(HELPER, *options, "download-file", f"{release.mirror}/{path}", found[-1], f"SHA256:{digest}")
    return found


def _apt(*command: str | Path) -> None:
    """Run a command of apt. Raises NoDownload if it fails, except for files that differ from the expected ones."""
    try:
        run(*command)
    except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
        if any(words in str(error) for words in ("Hash Sum mismatch", "Unable to locate package")):
            raise
        raise NoDownload(str(error)) from error


def _wheels(release: Release, place: Path) -> None:
    if not release.wheels:
        return
    platforms = [f"--platform=manylinux{kind}_x86_64" for kind in ("_2_27", "2014", "2010", "1")]
    where = ["--target", place, "--python-version", release.python, "--implementation=cp", *platforms]
    how = ["--only-binary=:all:", "--no-deps", "--no-compile", "--ignore-requires-python"]
    run(sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", *how, *where, *release.wheels)


def compiler() -> tuple[str, ...]:
    """Return a compiler of programs that need only symbols of an old release."""
    base = root_of(BASE)
    return "gcc", f"--sysroot={base}", f"-B{base}/usr/lib/x86_64-linux-gnu"


def driver() -> Path:
    """Build a simulated driver and nvidia-smi that need only symbols of an old release, as real drivers do."""
    made = [DRIVER / name for name in ("lib/libcuda.so.1", "lib/libnvidia-ml.so.1", "nvidia-smi")]
    places = [f"OUT={DRIVER}", f"HEADERS={BUILD}/headers"]
    run("make", "-s", "-C", ROOT / "sim", *places, f"CC={' '.join(compiler())}", *made)
    return DRIVER
