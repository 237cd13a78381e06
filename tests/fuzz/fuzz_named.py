"""Fuzzing of messages to the agent from a peer that claims to be the gatekeeper.

The result is a list of pids, or nothing.
"""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace

from fgpu_ebpf.driver.discovery import Discovery

WORDS = (b'{"tgid": 1, "others": [2, 3]}', b'"tgid"', b'"others"', b"[", b"]", b"{", b"}", b":", b",", b"null", b"NaN",
         b"Infinity", b"1e400", b"9" * 5000, b"[" * 3000, b'"1"', b"\xef\xbb\xbf")  # fmt: skip


class Fuzzer:
    """The agent's side of that socket, with a message in its queue."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fgpu-fuzz-")
        self._discovery = Discovery(SimpleNamespace(known=frozenset()), {})  # type: ignore[arg-type] # nothing is probed
        self._discovery.listen(Path(self._folder.name, "discover.sock"))
        self._keeper = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._keeper.connect(f"{self._folder.name}/discover.sock")

    def __call__(self, data: bytes) -> None:
        self._keeper.send(data)
        for pids in self._discovery.named():
            for pid in pids:
                assert isinstance(pid, int)
                assert 0 < pid < 1 << 31, pid

    def close(self) -> None:
        """Remove the folder."""
        self._keeper.close()
        self._folder.cleanup()
