"""The search for calls of parked processes that wait in the driver and for which the tenant has to be woken.

Each parked tenant has a search thread, which checks the tenant's processes 20 times a second until the thread finds a
call or is stopped. Without parked tenants no search thread runs. A check reads only one file if the tenant's processes
have used no processor time since the last check, because a thread that has not run has made no call. A full check is
made at least once in FULL_SECONDS. The pause after a check is proportional to the duration of the check, so that a
search thread uses at most a tenth of a processor.

The search thread reads memory of the tenant's processes, which may block. A blocked thread delays only the wake-up of
its own tenant.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fgpu_ebpf.linux import call_stacks, procfs
from fgpu_ebpf.linux.call_stacks import Sleep, Where

LOOK_SECONDS = 0.05
FULL_SECONDS = 1.0  # the longest time between two full checks
PAUSE = 9  # the pause after a check, as a multiple of the time that the check took

Places = Mapping[tuple[int, int], Sleep]  # (pid, thread) -> the place at which the thread slept


@dataclass(slots=True)
class Known:
    """The results of earlier checks of one process, for each place at which a thread slept."""

    code: call_stacks.Code | None = None
    judged: dict[tuple[int, Sleep], Where] = field(default_factory=dict)


def find(pid: int, known: Known) -> Iterable[tuple[int, Sleep, Where]]:
    """Return the sleeping threads of a process that are, or may be, in a call of the driver.

    Args:
        pid: the process.
        known: the results of earlier checks, which this function renews.

    Raises:
        OSError: the process has ended, or must not be read.
    """
    asleep = list(call_stacks.sleepers(pid))
    judged = {place: where for place in asleep if (where := known.judged.get(place)) is not None}
    new = [place for place in asleep if place not in judged]
    if new:
        known.code = call_stacks.code_of(pid)  # a library may have been loaded
        stacks = call_stacks.Stacks(pid)
        try:
            judged |= {place: where for place in new if (where := _where(stacks, place[1], known.code)) is not None}
        finally:
            stacks.close()
    # Only quiet places are kept: a woken thread that sleeps at the same place again may be in another call.
    known.judged = {place: where for place, where in judged.items() if where is Where.ELSEWHERE}
    return [(*place, where) for place, where in judged.items() if where is not Where.ELSEWHERE]


def _is_of_mps(pid: int) -> bool:
    """Return whether a process has the variable that names an MPS daemon. Raise OSError if the process has ended."""
    words = procfs.read(f"/proc/{pid}/environ").split(b"\0")
    return any(word.startswith(b"CUDA_MPS_PIPE_DIRECTORY=") for word in words)


def _where(stacks: call_stacks.Stacks, sleep: Sleep, code: call_stacks.Code) -> Where | None:
    """Return where a thread sleeps, or None if the thread has ended or the stack cannot be read now."""
    try:
        return stacks.where(sleep, code)
    except (OSError, OverflowError):
        return None


def before_parking(pids: Iterable[int]) -> tuple[str, Places]:
    """Check the processes of a tenant before the tenant is parked. The function may block on these processes.

    Returns:
        Why the tenant cannot be parked now, or an empty text; and the places of sleeping threads that are not certainly
        in a call.
    """
    perhaps = {}
    for pid in pids:
        known = Known()
        try:
            found = list(find(pid, known))
            known.code = known.code or call_stacks.code_of(pid)
            is_of_mps = _is_of_mps(pid)
        except OSError as error:
            return f"the stacks of pid {pid} cannot be read ({error.strerror}), so no call could wake the process", {}
        if is_of_mps:
            return f"pid {pid} is a client of MPS", {}
        if not known.code.has_libcuda:
            return f"pid {pid} has mapped no libcuda under its usual name, so no call could wake the process", {}
        for thread, sleep, where in found:
            if where is Where.IN_DRIVER:
                return f"thread {thread} of pid {pid} is in a call of the driver", {}
            perhaps[pid, thread] = sleep
    return "", perhaps


class BlockedCalls:
    """The search thread of one parked tenant.

    Args:
        pids: a function that returns the tenant's processes, including processes that are not parked, because the shim
            blocks their calls too. The search thread calls this function.
        quiet: places at which threads slept before the tenant was parked; empty if unknown.
        cgroup: the folder of the tenant's cgroup.
        found: a function that the search thread calls once, with the pid of a process that has a blocked call.
    """

    def __init__(
        self, pids: Callable[[], Iterable[int]], quiet: Places, cgroup: Path, found: Callable[[int], None]
    ) -> None:
        self._pids, self._known = pids, dict[int, Known]()
        self._quiet, self._found = quiet, found
        self._usage_file = str(cgroup / "cpu.stat")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="parked", daemon=True)

    def start(self) -> None:
        """Start the thread. Raise RuntimeError if the system has no room for a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Make the thread end soon."""
        self._stopping.set()

    def _run(self) -> None:
        used, full_at = "", 0.0
        while not self._stopping.is_set():
            began = time.monotonic()
            now = self._usage()
            if not now or now != used or began >= full_at:
                try:
                    pid = self.look()
                    used, full_at = now, began + FULL_SECONDS
                except OSError:  # a shortage of memory or files; the next check reads everything again
                    pid, full_at = 0, 0.0
                if pid and not self._stopping.is_set():
                    self._found(pid)
                    return
            self._stopping.wait(max(LOOK_SECONDS, PAUSE * (time.monotonic() - began)))

    def _usage(self) -> str:
        """Return the processor time of the tenant as text, or an empty text if unknown."""
        try:
            return procfs.read(self._usage_file).split(b"\n", 1)[0].decode()
        except OSError:
            return ""

    def look(self) -> int:
        """Return the pid of a process with a thread in a call of the driver, or 0. Raise OSError in a shortage."""
        self._known = {pid: self._known.get(pid) or Known() for pid in self._pids()}
        for pid, known in self._known.items():
            try:
                found = find(pid, known)
            except Exception as error:  # the process has ended, or its calls can no longer be found
                if isinstance(error, OSError) and error.errno in procfs.SHORTAGES:
                    raise
                if procfs.ended(pid):
                    continue
                return pid
            for thread, sleep, where in found:
                if where is Where.IN_DRIVER or not _same(self._quiet.get((pid, thread)), sleep):
                    return pid
        return 0


def _same(one: Sleep | None, other: Sleep) -> bool:
    return one is not None and (one.sp, one.pc) == (other.sp, other.pc)


class Checks:
    """The threads that check tenants before the tenants are parked. A tenant can block a check forever."""

    def __init__(self) -> None:
        self._threads: dict[int, threading.Thread] = {}

    def begin(self, cgroup: int, run: Callable[[], None]) -> str:
        """Run a function in its own thread.

        Return why no thread can be started, or an empty text if the thread has started.
        """
        self._threads = {key: thread for key, thread in self._threads.items() if thread.is_alive()}
        if cgroup in self._threads:
            return "an earlier check of the tenant's memory has not ended"
        thread = threading.Thread(target=run, name="parking", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            return str(error)
        self._threads[cgroup] = thread
        return ""
