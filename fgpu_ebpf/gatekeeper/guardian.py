"""Copies of the driver's descriptors of MPS clients, kept for a moment after a client has been killed.

All clients of an MPS server share one context on the device. If a client is killed while its kernels run, the driver
frees the client's memory, these kernels fault, and the fault ends all other clients. The driver frees the memory when
the last descriptor of its files is closed. The guardian holds copies of each client's descriptors and closes them only
after the client's kernels should have ended.

The gatekeeper's main thread calls the methods. A thread, which starts with the first client, looks for new descriptors:
a client opens them when it creates a context. Errors of single clients are ignored, because a client can exit at any
moment.
"""

from __future__ import annotations

import _thread
import os
import time
from dataclasses import dataclass, field
from time import monotonic_ns

from fgpu_ebpf.linux import pidfd

LOOK_SECONDS = 0.1
OFTEN_NS, RARELY_NS = 2_000_000_000, 1_000_000_000  # every look, for this time after a change; then in this period
KEEPS_NS, MOST_KEEPS_NS = 300_000_000, 10_000_000_000  # bounds of the time for which copies outlive their client
MOST_OF_CLIENT, MOST = 64, 4096  # copies
NODES = "/dev/nvidia"


@dataclass(slots=True)
class _Client:
    """A client. `copies`: by the number of the descriptor in the client. `closes_ns`: 0 while the client lives."""

    pid: int
    pidfd: int
    copies: dict[int, int] = field(default_factory=dict)
    changed_ns: int = field(default_factory=monotonic_ns)
    looked_ns: int = 0
    closes_ns: int = 0


class Guardian:
    """All clients of the host's MPS server whose descriptors are copied."""

    def __init__(self) -> None:
        self._clients: dict[int, _Client] = {}  # by the id of the client's session
        self._ended: list[_Client] = []
        self._lock = _thread.allocate_lock()
        self._runs = False

    def watch(self, key: int, pid: int, client: int) -> None:
        """Begin to copy the descriptors of a client. `key`: identifies it. `client`: its pidfd, which is duplicated."""
        with self._lock:
            if key in self._clients:
                return
            self._clients[key] = _Client(pid, os.dup(client))
            if not self._runs:
                self._runs = True
                _thread.start_new_thread(self._serve, ())

    def end(self, key: int, busy_until_ns: int) -> None:
        """Record that a client exits. Its copies are closed after `busy_until_ns`, when its kernels should be done."""
        with self._lock:
            if client := self._clients.pop(key, None):
                now_ns = monotonic_ns()
                client.closes_ns = min(max(now_ns, busy_until_ns) + KEEPS_NS, now_ns + MOST_KEEPS_NS)
                self._ended.append(client)

    def __len__(self) -> int:
        with self._lock:
            return sum(len(client.copies) for client in (*self._clients.values(), *self._ended))

    def _serve(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            now_ns = monotonic_ns()
            with self._lock:
                over = [client for client in self._ended if client.closes_ns <= now_ns]
                self._ended = [client for client in self._ended if client.closes_ns > now_ns]
                clients = list(self._clients.values())
                if not clients and not self._ended and not over:
                    self._runs = False
                    return
            for client in over:
                _close(client)
            room = MOST - sum(len(client.copies) for client in clients)
            for client in clients:
                if now_ns - client.changed_ns < OFTEN_NS or now_ns - client.looked_ns >= RARELY_NS:
                    room -= _copy(client, min(room, MOST_OF_CLIENT - len(client.copies)), now_ns)


def _copy(client: _Client, most: int, now_ns: int) -> int:
    """Copy new descriptors of a client. Return their number, at most `most`."""
    client.looked_ns, count = now_ns, 0
    folder = f"/proc/{client.pid}/fd"
    try:
        numbers = [int(name) for name in os.listdir(folder)]
    except OSError:
        return 0  # the client has exited
    for number in sorted(set(numbers) - set(client.copies)):
        try:
            if count >= most or not os.readlink(f"{folder}/{number}").startswith(NODES):
                continue
            client.copies[number] = pidfd.copy_from(client.pidfd, number)
        except OSError:
            continue
        client.changed_ns, count = now_ns, count + 1
    return count


def _close(client: _Client) -> None:
    for descriptor in (client.pidfd, *client.copies.values()):
        os.close(descriptor)
