"""Versions of the shim: many may be there, one is published.

    STORE/<digest>/libfgpu.so    what a version is; never written again
    STORE/current -> <digest>    what starts now gets; containers mount STORE/current/libfgpu.so
    STORE/previous -> <digest>   what was published before
    STORE/versions               SHA-256 and size of every version that was ever staged: images may carry any of them

Owns: those files, and that a reader of `current` sees the old version or the new, never none and never half of one.
Never: probes, or decides when a version is fit; publish() is called once the file that stage() returned is probed.
When it fails: OSError, and what was published before stays published.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Set
from pathlib import Path

from fgpu_ebpf import procfs, wholefile
from fgpu_ebpf.checks import Check
from fgpu_ebpf.sockets import make_way

STORE = Path("/var/lib/fgpu/shim")  # neither /run nor /tmp: hosts mount them noexec
FILE = "libfgpu.so"
VERSIONS, MOST_VERSIONS = "versions", 256


def stable_path(store: Path = STORE) -> Path:
    """What preload lists and container specifications name: the same whatever version is published."""
    return store / "current" / FILE


def stage(shim: Path, store: Path = STORE) -> Path:
    """Puts a copy of this shim into the store, unpublished, and answers its path. The same bytes: the same file."""
    content = shim.read_bytes()
    folder = store / hashlib.sha256(content).hexdigest()[:16]
    staged = folder / FILE
    _record(store, content)
    if staged.is_file() and staged.read_bytes() == content:
        return staged
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    aside = folder / f".{FILE}.{os.getpid()}"
    try:
        _write_durably(aside, content)
        os.replace(aside, staged)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    _sync(folder)
    _sync(store)
    return staged


def genuine(shim: Path, store: Path | None = None) -> dict[str, int]:
    """SHA-256 and size of this shim and of every version in the store or ever staged there: what is one of ours."""
    folders = _versions(store) if store else []
    contents = [path.read_bytes() for path in (shim, *(folder / FILE for folder in folders)) if path.is_file()]
    return _recorded(store) | {hashlib.sha256(content).hexdigest(): len(content) for content in contents}


def files(store: Path) -> list[Path]:
    """Every version that is there."""
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
    wholefile.write(store / VERSIONS, "".join(f"{digest} {size}\n" for digest, size in kept))


def publish(staged: Path) -> Path:
    """From now on `current` is this version, for whoever opens it next; answers the stable path."""
    store, version = staged.parent.parent, staged.parent.name
    if not staged.is_file():
        raise FileNotFoundError(f"{staged} is not staged")
    before = published(store)
    if before != version:
        if before:
            _point(store / "previous", before)
        _point(store / "current", version)
    return stable_path(store)


class Release:
    """The version that one start of the agent puts in force: its own; where the store cannot be written, what is
    published already; where none is, the package's own file. `fault`: why it is not its own, or not in the store.
    """

    def __init__(self, shim: Path, store: Path | None) -> None:
        self._store = store
        self.fault, self.file = "", shim
        if store:
            try:
                self.file = stage(shim, store)
            except OSError as error:
                self.fault = f"this version's shim cannot be put into {store}: {error}"
                self.file = self._stable() or shim

    def files(self) -> list[Path]:
        """What programs may get, to be probed: this file, and what is published until publish()."""
        stable = self._stable()
        return [self.file, stable] if stable else [self.file]

    def publish(self) -> Path:
        """From now on programs get this version; returns the path that they are told."""
        if self._store and not self.fault:
            try:
                publish(self.file)
            except OSError as error:
                self.fault = f"this version's shim cannot be published in {self._store}: {error}"
        return self._stable() or self.file

    def lacks(self) -> dict[str, Check]:
        """What `fgpu doctor` says; nothing where all is as it should be."""
        fix = "make room on its file system, or make it writable, and restart the agent: limits are enforced meanwhile"
        return {"store": Check("store", False, self.fault, fix)} if self.fault else {}

    def _stable(self) -> Path | None:
        path = stable_path(self._store) if self._store else None
        return path if path and path.is_file() else None


def published(store: Path = STORE) -> str | None:
    """The digest of the published version."""
    return _pointed(store / "current")


def retire(store: Path, used: Set[tuple[int, int]]) -> list[str]:
    """Removes versions that neither are nor were published last and that nobody has mapped; which ones.

    `used` names files by (dev, ino) as /proc/PID/maps does. A container that was started with one keeps it: its mount
    holds the file.
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
    """Removes every version that nobody has mapped, and what points to none; False: somebody has one."""
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
        return procfs.as_mapped(str(path))
    return None


def _pointed(link: Path) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return None


def _point(link: Path, version: str) -> None:
    """Makes the link beside and renames it over: there is never a moment without one."""
    aside = link.with_name(f".{link.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    make_way(str(link))
    os.symlink(version, aside)
    try:
        os.replace(aside, link)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    _sync(link.parent)


def _write_durably(path: Path, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o755)
    with open(fd, "wb") as file:
        os.fchmod(fd, 0o755)  # whatever the umask is: a tenant's program opens it as anybody
        file.write(content)
        file.flush()
        os.fsync(fd)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
