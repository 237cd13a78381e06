"""Threads that may still execute a driver call that began before the process was locked.

A locked process begins no other call. Calls that need the device wait in the driver, and calls that query whether work
is done wait in the shim (`shim/link/hold.c`). However, a thread may have passed the shim just before the lock. If this
thread continues after the checkpoint, the thread reads memory that is no longer mapped, and the process crashes. A
call of this thread takes microseconds when no work is in flight. A thread is past the call if the thread has used much
more processor time than the call takes. A thread is also past the call if the thread has not run at all between two
checks, because the thread then sleeps elsewhere. Neither condition holds for a thread that is ready to run and gets no
processor.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from fgpu_ebpf.linux import procfs
from fgpu_ebpf.parker.protocol import RequestError

ENOUGH_NS = 1_000_000  # of processor time, for any call that does not wait
LOOK_SECONDS = 0.02
_READY = b"R"

Look = dict[str, tuple[bytes, int]]  # the state and the processor time in nanoseconds of each thread


def look(pid: int) -> Look:
    """Return the threads of a process. The result is empty if the process has exited.

    Raise RequestError in a shortage of files or memory, because then a thread that cannot be read may run.
    """
    found: Look = {}
    folder = f"/proc/{pid}/task"
    try:
        names = os.listdir(folder)
    except OSError as error:
        _check_ended(pid, error)
        return found
    for name in names:
        try:
            state = procfs.read(f"{folder}/{name}/stat").rpartition(b")")[2].split()[0]
            found[name] = state, int(procfs.read(f"{folder}/{name}/schedstat").split()[0])
        except OSError as error:
            _check_ended(pid, error)
        except (IndexError, ValueError):  # the thread has ended
            continue
    return found


def _check_ended(pid: int, error: OSError) -> None:
    if error.errno in procfs.SHORTAGES:
        raise RequestError(f"the threads of process {pid} cannot be read: {error.strerror}") from error


def are_past(pid: int, until: float, now: Callable[[], float], sleep: Callable[[float], None]) -> bool:
    """Wait until no thread is in a call that began before this function was called.

    Args:
        pid: the process, which is locked.
        until: the time of the timeout, by `now`.
        now: returns the time in seconds.
        sleep: sleeps for a number of seconds.

    Returns:
        False if such a call could not be excluded before the timeout.
    """
    first = before = look(pid)
    left = set(first)
    while left:
        if now() >= until:
            return False
        sleep(LOOK_SECONDS)
        after = look(pid)
        left = {name for name in left & after.keys() if not _is_past(first[name], before.get(name), after[name])}
        before = after
    return True


def _is_past(first: tuple[bytes, int], before: tuple[bytes, int] | None, after: tuple[bytes, int]) -> bool:
    has_slept = before == after and after[0] != _READY
    return has_slept or after[1] - first[1] >= ENOUGH_NS
