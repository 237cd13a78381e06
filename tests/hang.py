"""The end of a run that hangs: the stacks of all processes of its worlds are printed, and pytest exits with 1.

A time limit from outside would say nothing. pytest-timeout ends single tests; this ends what it cannot end: a worker
that does not answer, a fixture that waits in C.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests import world

LAST_SECONDS = 40 * 60.0  # of a run
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
    """Yield this process, and those of all worlds."""
    yield os.getpid()
    for folder, _, _ in os.walk(world.cgroup2() / world.FOLDER):
        yield from map(int, Path(folder, "cgroup.procs").read_text().split())


def stack(pid: int) -> str:
    """Return the command line and the stacks of a process: of Python's functions if it runs some, else the kernel's."""
    try:
        command = " ".join(psutil.Process(pid).cmdline())[:200]
        done = subprocess.run(
            [PY_SPY, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=20, check=False
        )
        found = done.stdout if done.returncode == 0 else Path(f"/proc/{pid}/stack").read_text()
    except (OSError, psutil.Error, subprocess.TimeoutExpired) as error:
        command, found = "", str(error)
    return f"--- {pid} {command}\n{found}"
