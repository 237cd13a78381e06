"""Changes to maps of maps. The kernel makes one at once and then holds whoever asked for it until no program sees what
was there before, 10 to 30 ms: a thread is held, and nobody else.

Before Linux 6.8 it holds for each of many that are changed together, so several threads change a part each; and whoever
looks is held too, so that the end of a change is waited for.

Owns: those threads. Never: answers before a change can be looked up, or hides that one failed. On failure: OSError of
bpf(2); some of what was to be changed together may be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from fgpu_ebpf import bpf

MOST_HELD = 32  # threads; whoever comes when as many are held waits for one of them
LOOK_SECONDS = 0.0002
_ID_BYTES = 4


def _nothing() -> None:
    """Nobody wants to know that a change is over."""


class _Change:
    """One that is made, or failed, once its parts have ended. (concurrent.futures would bring logging into the
    gatekeeper.)
    """

    def __init__(self, parts: int) -> None:
        self.ended = threading.Event()
        self.error: Exception | None = None
        self._left, self._lock = parts, threading.Lock()

    def end_part(self, error: Exception | None) -> bool:
        """Whether that was the last, and all are made."""
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            if self._left:
                return False
        self.ended.set()
        return not self.error


class Graces:
    """Changes to maps by descriptor. `over` is called once no program sees what was there before, on another thread;
    where the change failed, it is not.
    """

    def __init__(self) -> None:
        self._room = threading.Semaphore(MOST_HELD)
        self._held: set[threading.Thread] = set()

    def put(self, fd: int, entries: Mapping[bytes, bytes], over: Callable[[], object] = _nothing) -> None:
        """Inserts or replaces inner maps, by descriptor: all of them are there when this returns. Raises OSError."""
        if not entries:
            return
        *_, last = entries  # the kernel takes them in this order
        before = None if bpf.HOLDS_LOOKERS else bpf.lookup(fd, last, _ID_BYTES)
        is_there = lambda: bpf.lookup(fd, last, _ID_BYTES) not in (None, before)  # noqa: E731
        parts = [{key: entries[key] for key in part} for part in _parts([*entries])]
        self._change([partial(bpf.update_all, fd, part) for part in parts], is_there, over)

    def delete(self, fd: int, keys: Sequence[bytes], over: Callable[[], object] = _nothing) -> None:
        """Deletes entries: none of them is there when this returns. Those that were not do not matter."""
        there = [key for key in keys if bpf.inner_id(fd, key) is not None]
        if not there:
            over()
            return
        is_gone = lambda: bpf.lookup(fd, there[-1], _ID_BYTES) is None  # noqa: E731
        self._change([partial(bpf.delete_all, fd, part) for part in _parts(there)], is_gone, over)

    def close(self) -> None:
        """Waits for every change to be over: they use the maps' descriptors."""
        for thread in list(self._held):
            thread.join()

    def _change(
        self, parts: Sequence[Callable[[], None]], is_made: Callable[[], bool], over: Callable[[], object]
    ) -> None:
        change = _Change(len(parts))
        for make in parts:
            self._room.acquire()
            thread = threading.Thread(target=self._make, args=(make, change, over), name="grace")
            self._held.add(thread)
            try:
                thread.start()
            except RuntimeError:  # no more threads are allowed: then we are held
                self._held.discard(thread)
                self._make(make, change, over)
        while not change.ended.wait(None if bpf.HOLDS_LOOKERS else LOOK_SECONDS) and not is_made():
            pass
        if change.error:
            raise change.error

    def _make(self, make: Callable[[], None], change: _Change, over: Callable[[], object]) -> None:
        error = None
        try:
            make()
        except Exception as raised:  # whoever asked is told
            error = raised
        try:
            if change.end_part(error):
                over()
        finally:
            self._held.discard(threading.current_thread())
            self._room.release()


def _parts(keys: Sequence[bytes]) -> list[Sequence[bytes]]:
    """What each thread changes: all, where the kernel holds once for all."""
    count = min(len(keys), MOST_HELD) if bpf.HOLDS_LOOKERS else 1
    return [keys[n::count] for n in range(count)]
