"""Changes to maps of maps. The kernel makes one at once and then holds whoever asked for it until no program sees what
was there before, 10 to 30 ms: a thread is held, and nobody else.

Owns: those threads. Never: answers before a change can be looked up, or hides that one failed. On failure: OSError of
bpf(2); some of what was to be changed together may be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from fgpu_ebpf import bpf

MOST_HELD = 32  # threads; whoever comes when as many are held waits for one of them
LOOK_SECONDS = 0.0002
_ID_BYTES = 4


def _nothing() -> None:
    """Nobody wants to know that a change is over."""


class _Change:
    """One that is made, or failed, once it has ended. (concurrent.futures would bring logging into the gatekeeper.)"""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.error: Exception | None = None


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
        before = bpf.lookup(fd, last, _ID_BYTES)
        is_there = lambda: bpf.lookup(fd, last, _ID_BYTES) not in (None, before)  # noqa: E731
        self._change(lambda: bpf.update_all(fd, entries), is_there, over)

    def delete(self, fd: int, keys: Sequence[bytes], over: Callable[[], object] = _nothing) -> None:
        """Deletes entries: none of them is there when this returns. Those that were not do not matter."""
        there = [key for key in keys if bpf.lookup(fd, key, _ID_BYTES) is not None]
        if not there:
            over()
            return
        is_gone = lambda: bpf.lookup(fd, there[-1], _ID_BYTES) is None  # noqa: E731
        self._change(lambda: bpf.delete_all(fd, there), is_gone, over)

    def close(self) -> None:
        """Waits for every change to be over: they use the maps' descriptors."""
        for thread in list(self._held):
            thread.join()

    def _change(self, make: Callable[[], None], is_made: Callable[[], bool], over: Callable[[], object]) -> None:
        change = _Change()
        self._room.acquire()
        thread = threading.Thread(target=self._make, args=(make, change, over), name="grace")
        self._held.add(thread)
        try:
            thread.start()
        except RuntimeError:  # no more threads are allowed: then we are held
            self._held.discard(thread)
            self._make(make, change, over)
        while not change.ended.wait(LOOK_SECONDS) and not is_made():
            pass
        if change.error:
            raise change.error

    def _make(self, make: Callable[[], None], change: _Change, over: Callable[[], object]) -> None:
        try:
            make()
        except Exception as error:  # whoever asked is told
            change.error = error
            change.ended.set()
        else:
            change.ended.set()
            over()
        finally:
            self._held.discard(threading.current_thread())
            self._room.release()
