"""Copies of the driver's descriptors of MPS clients, which are kept for a moment after a client has been killed.

All clients of an MPS server share one context on the device. If a client is killed while its kernels run, the driver
frees the client's memory, these kernels fault, and the fault terminates all other clients. The driver frees the memory
when the last descriptor of the driver's files is closed. The guardian holds copies of each client's descriptors and
closes the copies only after the client's kernels should have ended.

The gatekeeper's main thread calls the methods. A thread, which starts with the first client, lets worker threads search
for new descriptors, which a client opens when it creates a context. A client that blocks a search, for example in
execve(), blocks only the searches of its owner. Errors of single clients are ignored, because a client can exit at any
moment.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import os
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from time import monotonic_ns

from fgpu_ebpf.linux import pidfd, procfs, statx, threads
from fgpu_ebpf.linux.worker_threads import Workers

LOOK_SECONDS = 0.1
OFTEN_NS, RARELY_NS = 2_000_000_000, 1_000_000_000  # every search for this time after a change; then this period
KEEPS_NS, MOST_KEEPS_NS = 500_000_000, 10_000_000_000  # bounds of the time for which copies outlive a client
MOST_OF_CLIENT, MOST_OF_OWNER, MOST = 64, 1024, 4096  # copies
MOST_SCANNED = 1024  # descriptors of a client in one search
NODES = "/dev/nvidia"


@dataclass(slots=True, eq=False)
class _Client:
    """A client of the MPS server.

    `copies`: by the number of the descriptor in the client. `closes_ns`: 0 while the client is alive. `bound`: how many
    copies the client may have after the current search; None: no search is running.
    """

    pid: int
    pidfd: int
    owner: int
    copies: dict[int, int] = field(default_factory=dict)
    changed_ns: int = field(default_factory=monotonic_ns)
    looked_ns: int = 0
    closes_ns: int = 0
    bound: int | None = None


class Guardian:
    """The clients of the host's MPS server, with the copies of their descriptors."""

    def __init__(self) -> None:
        self._clients: dict[int, _Client] = {}  # by the id of the client's session
        self._ended: list[_Client] = []
        self._workers: Workers[int, list[_Client], None] = Workers(_search, lambda _: True, lambda: None)
        self._lock = _thread.allocate_lock()
        self._runs = False

    def watch(self, key: int, pid: int, client: int, owner: int) -> None:
        """Begin to copy the descriptors of a client.

        Args:
            key: identifies the client.
            pid: the client's pid.
            client: the client's pidfd, which is duplicated.
            owner: the workload for which the copies count.

        Raises:
            OSError: no descriptor or no thread is available. A later call for the same client starts the thread.
        """
        with self._lock:
            if known := self._clients.get(key):  # the client may have executed another program
                known.changed_ns = monotonic_ns()
            else:
                self._clients[key] = _Client(pid, os.dup(client), owner)
            if not self._runs:
                threads.start(self._serve)
                self._runs = True

    def end(self, key: int, busy_until_ns: int) -> None:
        """Record that a client exits. The copies are closed after `busy_until_ns`, when the kernels should be done."""
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
            for client in itertools.chain.from_iterable(done.job for done in self._workers.take()):
                client.bound = None
            with self._lock:
                over = [client for client in self._ended if client.closes_ns <= now_ns and client.bound is None]
                self._ended = [client for client in self._ended if client not in over]
                clients = list(self._clients.values())
                taken = Counter[int]()  # by owner: number of copies
                for client in (*clients, *self._ended):
                    taken[client.owner] += max(client.bound or 0, len(client.copies))
                if not clients and not self._ended and not over:
                    self._runs = False
                    return
            for client in over:
                _close(client)
            self._want(clients, taken, now_ns)
            with contextlib.suppress(OSError):  # no thread can be started: again in LOOK_SECONDS
                self._workers.go()

    def _want(self, clients: list[_Client], taken: Counter[int], now_ns: int) -> None:
        """Queue searches for the clients of which a search is due, one job for each owner."""
        due = defaultdict[int, list[_Client]](list)
        for client in clients:
            is_due = now_ns - client.changed_ns < OFTEN_NS or now_ns - client.looked_ns >= RARELY_NS
            if is_due and client.bound is None:
                left = min(MOST - taken.total(), MOST_OF_OWNER - taken[client.owner])
                more = max(0, min(left, MOST_OF_CLIENT - len(client.copies)))
                taken[client.owner] += more
                client.bound = len(client.copies) + more
                due[client.owner].append(client)
        for owner, together in due.items():
            if not self._workers.want(owner, together):
                for client in together:
                    client.bound = None


def _search(clients: list[_Client]) -> None:
    for client in clients:
        if not client.closes_ns:  # otherwise end() was called since the search was queued
            _copy(client)


def _copy(client: _Client) -> None:
    """Copy a client's new descriptors, up to the client's bound, and close copies of closed descriptors.

    The first MOST_SCANNED descriptors are examined.
    """
    bound = client.bound or 0
    now_ns = client.looked_ns = monotonic_ns()
    try:
        with os.scandir(f"/proc/{client.pid}/fd") as entries:
            names = {int(entry.name): entry.path for entry in itertools.islice(entries, MOST_SCANNED)}
    except OSError:
        return  # the client has exited
    if procfs.is_exiting(client.pid, client.pid):
        return  # the list may be empty or cut off, and the other threads may still use all descriptors
    if len(names) < MOST_SCANNED:
        for number in set(client.copies) - set(names):
            _close_one(client.copies.pop(number))
    for number in sorted(set(names) - set(client.copies)):
        try:
            # A file of a user's own file system may have such a path. The type is read without a request to that file
            # system.
            is_node = os.readlink(names[number]).startswith(NODES) and statx.is_character_device(names[number])
            if len(client.copies) >= bound or not is_node:
                continue
            client.copies[number] = pidfd.copy_from(client.pidfd, number)
        except OSError:
            continue
        client.changed_ns = now_ns


def _close(client: _Client) -> None:
    for descriptor in (client.pidfd, *client.copies.values()):
        _close_one(descriptor)


def _close_one(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)
