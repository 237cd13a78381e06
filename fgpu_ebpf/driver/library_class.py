"""The trust class (role) of a file of libcuda or the shim.

Roles: SHIM, a shim of this host; HOST, the host driver's own file; LISTED, a file with the contents of a host driver's
file or with a digest in agent.yaml; UNKNOWN, every other libcuda; NONE, a file with libfgpu's name that is neither a
shim nor a driver. Frees by drivers of the roles HOST and LISTED count at once. Frees by UNKNOWN drivers count as soon
as NVML shows these frees.

A file is identified by its (dev, ino) or by the digest of its contents. A build id or another note in the file is not
used, because the file's author can choose such a note. A tenant can write to its own file at any time, so contents are
trusted only while the file's size and times are the same as before the reading. This module runs in the agent's main
thread and library workers.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple

from fgpu_ebpf.abi import CLASS_SHIFT, Class, Function
from fgpu_ebpf.linux.procmaps import File

DIGEST = re.compile("sha256:[0-9a-f]{64}")
MOST_KNOWN = 4096  # number of digests in memory
MOST_BYTES = 1 << 29  # the longest file that is read: five times the size of a driver
TICK_SECONDS = 0.05  # longer than the resolution of file systems' times
_CHUNK = 1 << 20


class Role(Enum):
    """The trust class of a file. The value is the letter in the names of its pinned links."""

    SHIM = "s"
    HOST = "h"
    LISTED = "l"
    UNKNOWN = "u"
    NONE = "n"

    @property
    def is_driver(self) -> bool:
        """True if calls of the file's functions are charged."""
        return self in _CLASSES

    def cookie(self, function: Function) -> int:
        """Return the cookie of the probes on this function of a file with this role."""
        return function | _CLASSES[self] << CLASS_SHIFT


_CLASSES = {Role.HOST: Class.HOST, Role.LISTED: Class.LISTED, Role.UNKNOWN: Class.UNKNOWN}


class Stamp(NamedTuple):
    """A file's size and times. While size and times do not change, the contents count as unchanged."""

    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, fd: int) -> Stamp:
        """Return the stamp of an open file. Raise OSError on failure."""
        at = os.fstat(fd)
        return cls(at.st_size, at.st_mtime_ns, at.st_ctime_ns)


def digest(fd: int, stamp: Stamp) -> str:
    """Return the SHA-256 of an open file with this stamp, as `sha256:…`; empty: the file is too large or has changed.

    The function waits for TICK_SECONDS before the reading, so that a change during the reading gets another time. Raise
    OSError on failure.
    """
    if stamp.size > MOST_BYTES:
        return ""
    time.sleep(TICK_SECONDS)
    state, at = hashlib.sha256(), 0
    while at < stamp.size and (part := os.pread(fd, _CHUNK, at)):
        state.update(part)
        at += len(part)
    return f"sha256:{state.hexdigest()}" if at == stamp.size and Stamp.of(fd) == stamp else ""


class Trust:
    """The files and contents that this host trusts.

    `versions`: the host's paths of the shims in the store, including versions that only running containers use.
    `shims`: the sizes of all shims by SHA-256. `listed`: digests of drivers from agent.yaml.
    """

    def __init__(
        self, versions: Mapping[File, str] | None = None, shims: Mapping[str, int] | None = None,
        listed: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.versions = dict(versions or {})
        self._files = dict.fromkeys(self.versions, Role.SHIM)
        self._shims = {f"sha256:{digest}": size for digest, size in (shims or {}).items()}
        self._drivers = set(listed)
        self._known: dict[File, tuple[Stamp, str]] = {}

    def trust_file(self, file: File, role: Role) -> None:
        """Trust one of the host's own files."""
        self._files[file] = role

    def trust_contents(self, digest: str) -> None:
        """Trust all files with this digest. The digest belongs to a host driver's file."""
        self._drivers.add(digest)

    @property
    def listed(self) -> list[str]:
        """The digests of all drivers that are trusted by their contents, sorted."""
        return sorted(self._drivers)

    def may_be_a_shim(self, stamp: Stamp) -> bool:
        """Return whether a file with this stamp has the size of one of this host's shims."""
        return stamp.size in self._shims.values()

    def learn(self, file: File, stamp: Stamp, digest: str) -> None:
        """Store the digest of a file with this stamp. A full store (MOST_KNOWN digests) is emptied first."""
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[file] = stamp, digest

    def forget(self, file: File) -> None:
        """Discard the stored digest of a file."""
        self._known.pop(file, None)

    def digest(self, file: File, stamp: Stamp | None) -> str | None:
        """Return the stored digest of a file with this stamp; None: unread; empty: the file is too large or changed."""
        found = self._known.get(file)
        return found[1] if found and found[0] == stamp else None

    def role(self, file: File, stamp: Stamp | None = None) -> Role:
        """Return the role of a file: UNKNOWN if the file is not the host's own and its contents are not trusted."""
        if file in self._files:
            return self._files[file]
        contents = self.digest(file, stamp) or ""
        if contents in self._shims:
            return Role.SHIM
        return Role.LISTED if contents in self._drivers else Role.UNKNOWN
