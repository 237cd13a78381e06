"""Claims of processes for a job: locks of single bytes of a file, each at the position of a pid.

A lock belongs to the open file, which the process of the job has inherited. Therefore the lock ends with that process,
even if the parker has exited before, and the next parker finds the lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from fgpu_ebpf.parker.protocol import RequestError

FILE = "parker.lock"
_MODE = 0o600


def claim(run_dir: Path, pids: Iterable[int]) -> int:
    """Lock these processes for a job, and return the descriptor that holds the locks.

    Raise OSError on failure, and RequestError if a process has a job already.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(run_dir / FILE, flags, _MODE)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, file)
        for pid in pids:
            try:
                # struct flock of one byte; the last field must be 0 for locks of the open file
                fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, pid, 1, 0))
            except BlockingIOError:
                raise RequestError(f"process {pid} has a job already") from None
        undo.pop_all()
    return file
