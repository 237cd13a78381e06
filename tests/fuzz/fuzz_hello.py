"""Fuzzing of the shim's socket: a hello is read at once, any other message closes its connection, and nothing is left.

It runs the gatekeeper's own listener and connections, without its decisions. The first byte of an input selects how it
is sent: with descriptors, in two messages, and whether the sender closes the connection.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import tempfile
from pathlib import Path

from fgpu_ebpf import abi
from fgpu_ebpf.gatekeeper.connections import HELLO_BYTES, Connection, Connections
from fgpu_ebpf.gatekeeper.info_text import QUESTION
from fgpu_ebpf.gatekeeper.ledger_cache import ManagedState
from fgpu_ebpf.gatekeeper.listener import Listener

HEAD = struct.pack("<IHH", abi.MAGIC, abi.LAYOUT, HELLO_BYTES)
WORDS = (HEAD, HEAD[:4], bytes(HELLO_BYTES - 8), struct.pack("<H", abi.LAYOUT + 1), struct.pack("<H", 0xFFFF), QUESTION)
FILES, TWICE, HANG_UP = 1, 2, 4


class Fuzzer:
    """A separate listener, to which this process sends messages."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fgpu-fuzz-")
        self._selector = selectors.DefaultSelector()
        self._counts = dict.fromkeys(
            ("malformed", "gone", "silent", "hello_unanswered", "dropped_tenant", "dropped_total"), 0
        )
        self._complete: list[Connection] = []
        managed_state = ManagedState(False, 7)
        self._callers = Connections(
            self._selector, self._counts, lambda pid, cgroup: (1, managed_state), self._look, lambda pid: None
        )
        self._door = Listener(Path(self._folder.name))
        self._door.open()
        self._files = self._descriptors()

    def _descriptors(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    def _look(self, caller: Connection) -> None:
        self._complete.append(caller)
        self._callers.drop(caller, "gone")

    def __call__(self, data: bytes) -> None:
        how, message = (data[0] if data else 0), data[1:]
        before = self._counts["malformed"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.setblocking(False)
            sock.connect(f"{self._folder.name}/shim/shim.sock")
            with contextlib.suppress(OSError):
                socket.send_fds(sock, [message], [0, 1] if how & FILES else [])
                if how & TWICE:
                    sock.send(message)
            if how & HANG_UP:
                sock.close()
            self._callers.accept(self._door.socket)
            while self._callers.pending():  # a round of the listener is limited by time
                self._callers.serve()
        for key, _ in self._selector.select(0):  # silent connections have been closed by now
            key.data()
        self._callers.forgive()
        self._callers.turn()
        is_hello = (len(message) == HELLO_BYTES and message.startswith(HEAD)) or message == QUESTION
        assert len(self._complete) == is_hello, (len(self._complete), is_hello)
        assert self._counts["malformed"] - before == bool(message and not is_hello)
        assert len(self._callers) == 0
        assert self._descriptors() == self._files
        self._complete.clear()

    def close(self) -> None:
        """Remove the folder."""
        self._door.close()
        self._selector.close()
        self._folder.cleanup()
