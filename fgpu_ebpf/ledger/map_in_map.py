"""Updates of BPF maps of maps.

An update is visible at once, but its system call blocks for an RCU grace period (10 to 30 ms), until no BPF program
uses the old entry. Therefore a worker thread makes the system call, and the caller returns as soon as the entry is
visible.

Before Linux 6.8 a batch blocks once for each entry, so several threads update one part each. A lookup also blocks, so
the caller waits for the end of the update.

Callers run in the agent's main thread. Errors are OSError of bpf(2). A failed update may have changed some entries.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from fgpu_ebpf.linux import bpf

MOST_THREADS = 32  # an update that needs another thread waits until one of these threads ends
LOOK_SECONDS = 0.0002
_ID_BYTES = 4


def _nothing() -> None:
    """Do nothing after an update."""


class _Change:
    """An update, which has ended when all its parts have ended.

    (concurrent.futures is not used, because concurrent.futures would import logging into the gatekeeper.)
    """

    def __init__(self, parts: int) -> None:
        self.ended = threading.Event()
        self.error: Exception | None = None
        self._left, self._lock = parts, threading.Lock()

    def end_part(self, error: Exception | None) -> bool:
        """Record the end of a part. Return whether all parts have ended and were successful."""
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            if self._left:
                return False
        self.ended.set()
        return not self.error


class MapInMapUpdates:
    """Updates of maps of maps, which are passed as descriptors.

    `over` is called once no BPF program uses the old entries: usually in another thread, and in the caller's thread if
    there is nothing to delete or no thread can be started. `over` is not called after a failed update.
    """

    def __init__(self) -> None:
        self._room = threading.Semaphore(MOST_THREADS)
        self._threads: set[threading.Thread] = set()

    def put(self, fd: int, entries: Mapping[bytes, bytes], over: Callable[[], object] = _nothing) -> None:
        """Insert or replace inner maps, passed as descriptors. All entries are visible on return.

        Raise OSError on failure.
        """
        if not entries:
            return
        *_, last = entries  # the kernel updates the entries in this order
        before = None if bpf.HOLDS_LOOKERS else bpf.lookup(fd, last, _ID_BYTES)
        is_there = lambda: bpf.lookup(fd, last, _ID_BYTES) not in (None, before)  # noqa: E731
        parts = [{key: entries[key] for key in part} for part in _parts([*entries])]
        self._change([partial(bpf.update_all, fd, part) for part in parts], is_there, over)

    def delete(self, fd: int, keys: Sequence[bytes], over: Callable[[], object] = _nothing) -> None:
        """Delete entries. No deleted entry exists on return. A missing entry is not an error.

        Raise OSError on failure.
        """
        there = [key for key in keys if bpf.inner_id(fd, key) is not None]
        if not there:
            over()
            return
        is_gone = lambda: bpf.lookup(fd, there[-1], _ID_BYTES) is None  # noqa: E731
        self._change([partial(bpf.delete_all, fd, part) for part in _parts(there)], is_gone, over)

    def close(self) -> None:
        """Wait for the end of all updates, because they use the maps' descriptors."""
        for thread in list(self._threads):
            thread.join()

    def _change(
        self, parts: Sequence[Callable[[], object]], is_made: Callable[[], bool], over: Callable[[], object]
    ) -> None:
        change = _Change(len(parts))
        for make in parts:
            self._room.acquire()
            thread = threading.Thread(target=self._make, args=(make, change, over), name="grace")
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # no more threads are allowed: the caller makes the update and blocks
                self._threads.discard(thread)
                self._make(make, change, over)
        while not change.ended.wait(None if bpf.HOLDS_LOOKERS else LOOK_SECONDS) and not is_made():
            pass
        if change.error:
            raise change.error

    def _make(self, make: Callable[[], object], change: _Change, over: Callable[[], object]) -> None:
        error = None
        try:
            make()
        except Exception as raised:  # _change() raises this error
            error = raised
        try:
            if change.end_part(error):
                over()
        finally:
            self._threads.discard(threading.current_thread())
            self._room.release()


def _parts(keys: Sequence[bytes]) -> list[Sequence[bytes]]:
    """Return the part of each thread. If the kernel blocks once for a whole batch, one thread gets all keys."""
    count = min(len(keys), MOST_THREADS) if bpf.HOLDS_LOOKERS else 1
    return [keys[n::count] for n in range(count)]
