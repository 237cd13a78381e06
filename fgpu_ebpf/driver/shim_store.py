"""The store of versions of the shim. The store may have several versions, of which one version is published.

    STORE/<digest>/libfgpu.so    a version; never changed
    STORE/current -> <digest>    the version for programs that start; containers mount STORE/current/libfgpu.so
    STORE/previous -> <digest>   the version that was published before
    STORE/versions               SHA-256 and size of the last MOST_VERSIONS staged versions, which images may contain

A reader of `current` always gets the old or the new version. publish() must be called only after the file that stage()
has returned is probed. This module runs in the agent's main thread and in `fgpu detach`. After an OSError the published
version stays published.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Set
from pathlib import Path

from fgpu_ebpf.check import Check
from fgpu_ebpf.linux import atomic_file, mapped_files
from fgpu_ebpf.linux.clear_path import make_way

STORE = Path("/var/lib/fgpu/shim")  # neither /run nor /tmp: hosts mount them noexec
FILE = "libfgpu.so"
VERSIONS, MOST_VERSIONS = "versions", 256


def stable_path(store: Path = STORE) -> Path:
    """Return the path for preload lists and container specifications, which is the same for all versions."""
    return store / "current" / FILE


def stage(shim: Path, store: Path = STORE) -> Path:
    """Copy this shim into the store without a publication, and return its path. Raise OSError on failure.

    Shims with equal contents are one file.
    """
    content = shim.read_bytes()
    folder = store / hashlib.sha256(content).hexdigest()[:16]
    staged = folder / FILE
    _record(store, content)
    if staged.is_file() and staged.read_bytes() == content:
        return staged
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = folder / f".{FILE}.{os.getpid()}"
    try:
        write_durably(temporary, content)
        make_way(str(staged))
        os.replace(temporary, staged)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    atomic_file.sync_folder(folder)
    atomic_file.sync_folder(store)
    return staged


def genuine(shim: Path, store: Path | None = None) -> dict[str, int]:
    """Return the sizes by SHA-256 of the shims of this host: `shim`, and versions that are or were in the store."""
    folders = _versions(store) if store else []
    contents = [path.read_bytes() for path in (shim, *(folder / FILE for folder in folders)) if path.is_file()]
    return _recorded(store) | {hashlib.sha256(content).hexdigest(): len(content) for content in contents}


def files(store: Path) -> list[Path]:
    """Return the files of all versions in the store."""
    return [path for folder in _versions(store) if (path := folder / FILE).is_file()]


def _recorded(store: Path | None) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        lines = (store / VERSIONS).read_text(encoding="ascii").splitlines() if store else []
        return {digest: int(size) for digest, size in map(str.split, lines)}
    return {}


def _record(store: Path, content: bytes) -> None:
    known, digest = _recorded(store), hashlib.sha256(content).hexdigest()
    if digest in known:
        return
    kept = [*known.items(), (digest, len(content))][-MOST_VERSIONS:]
    store.mkdir(mode=0o755, parents=True, exist_ok=True)
    atomic_file.write(store / VERSIONS, "".join(f"{digest} {size}\n" for digest, size in kept))


def publish(staged: Path) -> Path:
    """Make this version `current`, for programs that start later, and return stable_path().

    Raise OSError on failure.
    """
    store, version = staged.parent.parent, staged.parent.name
    if not staged.is_file():
        raise FileNotFoundError(f"{staged} does not exist")
    before = published(store)
    if before != version:
        if before:
            _point(store / "previous", before)
        _point(store / "current", version)
    return stable_path(store)


class Release:
    """The version that one start of the agent puts in force.

    The version in force is the agent's own version. If the store cannot be written, the version in force is the
    published version, or the package's own file if no version is published. `error`: why the version is not the agent's
    own, or is not in the store.
    """

    def __init__(self, shim: Path, store: Path | None) -> None:
        self._store = store
        self.error, self.file = "", shim
        if store:
            try:
                self.file = stage(shim, store)
            except OSError as error:
                self.error = f"this version's shim cannot be put into {store}: {error}"
                self.file = self._stable() or shim

    def files(self) -> list[Path]:
        """Return the files that must be probed: the files of this version and of the published version."""
        stable = self._stable()
        return [self.file, stable] if stable else [self.file]

    def publish(self) -> Path:
        """Publish this version, and return the path for programs."""
        if self._store and not self.error:
            try:
                publish(self.file)
            except OSError as error:
                self.error = f"this version's shim cannot be published in {self._store}: {error}"
        return self._stable() or self.file

    def failed_checks(self) -> dict[str, Check]:
        """Return the finding for `fgpu doctor` by name; empty if there was no error."""
        fix = (
            "free space on this file system, or make the file system writable, and restart the agent: "
            "limits stay enforced"
        )
        return {"store": Check("store", False, self.error, fix)} if self.error else {}

    def _stable(self) -> Path | None:
        path = stable_path(self._store) if self._store else None
        return path if path and path.is_file() else None


def published(store: Path = STORE) -> str | None:
    """Return the digest of the published version; None: no version is published."""
    return _pointed(store / "current")


def retire(store: Path, used: Set[tuple[int, int]]) -> list[str]:
    """Remove unused versions, except `current` and `previous`, and return their digests.

    A container that was started with a removed version keeps this version, because the container's mount holds the
    file.

    Args:
        store: the store.
        used: files that processes have mapped: (dev, ino) as in /proc/PID/maps.
    """
    kept = {_pointed(store / "current"), _pointed(store / "previous")}
    gone = []
    for folder in _versions(store):
        if folder.name in kept or _identity(folder / FILE) in used:
            continue
        shutil.rmtree(folder)
        gone.append(folder.name)
    return gone


def remove(store: Path, used: Set[tuple[int, int]]) -> bool:
    """Remove every version that no process has mapped, and dangling links. Return False if a version is left."""
    for folder in _versions(store):
        if _identity(folder / FILE) not in used:
            shutil.rmtree(folder)
    for link in ("current", "previous"):
        if not (store / link).exists():
            (store / link).unlink(missing_ok=True)
    if _versions(store):
        return False
    (store / VERSIONS).unlink(missing_ok=True)
    return True


def _versions(store: Path) -> list[Path]:
    try:
        return sorted(path for path in store.iterdir() if path.is_dir() and not path.is_symlink())
    except FileNotFoundError:
        return []


def _identity(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        return mapped_files.as_mapped(str(path))
    return None


def _pointed(link: Path) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return None


def _point(link: Path, version: str) -> None:
    """Create a link under another name and rename this link, so that the final link always exists."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    make_way(str(link))
    os.symlink(version, temporary)
    try:
        os.replace(temporary, link)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    atomic_file.sync_folder(link.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write an executable file. A loss of power after the return does not change the contents."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o755)
    with open(fd, "wb") as file:
        os.fchmod(fd, 0o755)  # independent of the umask: tenants' programs of any user open it
        file.write(content)
        file.flush()
        os.fsync(fd)
