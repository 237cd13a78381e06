"""The end of a run that hangs: the stacks of all processes of its worlds are printed, and pytest exits with 1.

A time limit from outside would print nothing. pytest-timeout ends single tests. This module ends runs that
pytest-timeout cannot end: a worker that does not answer, a fixture that waits in C code.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests import world

LAST_SECONDS = 70 * 60.0  # time limit of a run
MOST = 100  # processes whose stacks are printed
PY_SPY = Path(sys.executable).with_name("py-spy")


def start() -> None:
    """End this process after LAST_SECONDS, if it still runs then."""
    timer = threading.Timer(LAST_SECONDS, _end)
    timer.daemon = True
    timer.start()


def _end() -> None:
    print(f"\nThe run has not ended within {LAST_SECONDS:.0f} s. What its processes do:", file=sys.stderr)
    for number, pid in enumerate(pids()):
        if number < MOST:
            print(stack(pid), file=sys.stderr, flush=True)
    os._exit(1)


def pids() -> Iterator[int]:
    """Yield the pid of this process, and the pids of all processes in worlds."""
    yield os.getpid()
    for folder, _, _ in os.walk(world.cgroup2() / world.FOLDER):
        yield from map(int, Path(folder, "cgroup.procs").read_text().split())


def uninterruptible() -> Iterator[str]:
    """Yield the command, the scheduler's figures and the kernel's stack of each thread in uninterruptible sleep.

    These are threads of the whole host. A process that waits for a lock of the kernel is in this sleep, and so may be
    the process that holds the lock.
    """
    for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            if task.joinpath("stat").read_bytes().rpartition(b") ")[2].startswith(b"D"):
                facts = (task.joinpath(name).read_bytes() for name in ("comm", "cgroup", "schedstat", "stack"))
                yield f"--- {task}\n" + b"".join(facts).decode(errors="backslashreplace")


def stack(pid: int) -> str:
    """Return the command line and the stacks of a process: of Python functions if it runs any, or the kernel's."""
    try:
        process = psutil.Process(pid)
        command, state = " ".join(process.cmdline())[:200], process.status()
        done = subprocess.run(
            [PY_SPY, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=20, check=False
        )
        found = done.stdout if done.returncode == 0 else Path(f"/proc/{pid}/stack").read_text()
    except (OSError, psutil.Error, subprocess.TimeoutExpired) as error:
        command, state, found = "", "", str(error)
    return f"--- {pid} {state} {command}\n{found}"
