"""The map `files`: the library and shim files that have probes.

The agent's main thread writes the map, and the gatekeeper reads it. Errors are OSError of bpf(2).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from fgpu_ebpf.linux import bpf

_FILE, _U32 = struct.Struct("QQ"), struct.Struct("I")


class ProbedFiles:
    """The map `files`. `maps`: the ledger's open maps by name."""

    def __init__(self, maps: Mapping[str, int]) -> None:
        self._maps = maps

    def file_check(self, dev: int, ino: int) -> int | None:
        """Return the offset of a file's probed instruction; 1: unknown; None: the file is not probed. Thread-safe."""
        raw = bpf.lookup(self._maps["files"], _FILE.pack(dev, ino), 4)
        return None if raw is None else int(_U32.unpack(raw)[0])

    def enter_file(self, dev: int, ino: int, check: int = 1) -> None:
        """Record a file as probed. `check` is the file offset of a probed instruction; 1: unknown."""
        bpf.update(self._maps["files"], _FILE.pack(dev, ino), _U32.pack(check))

    def forget_file(self, dev: int, ino: int) -> None:
        """Record that the file is no longer probed."""
        bpf.delete(self._maps["files"], _FILE.pack(dev, ino))

    def forget_files(self) -> None:
        """Record that no file is probed."""
        for key, _ in bpf.items(self._maps["files"], _FILE.size, 4):
            bpf.delete(self._maps["files"], key)
