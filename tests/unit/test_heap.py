"""Threads share the C library's memory, once they are told to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

THREADS = """
import ctypes, sys, threading
from fgpu_ebpf import heap
{before}
libc, all_there = ctypes.CDLL(None), threading.Barrier(9)
libc.fopen.restype = libc.malloc.restype = ctypes.c_void_p
def take():
    libc.malloc(1000)
    all_there.wait()
threads = [threading.Thread(target=take) for _ in range(8)]
for thread in threads: thread.start()
all_there.wait()
for thread in threads: thread.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


def arenas(before: str, out: Path) -> int:
    """How many a process has in which eight threads have memory at one time."""
    subprocess.run([sys.executable, "-c", THREADS.format(before=before), out], check=True, timeout=30)
    return out.read_text().count("<heap nr=")


def test_threads_share_one_arena(tmp_path: Path) -> None:
    assert arenas("heap.share_one_arena()", tmp_path / "one") == 1
    assert arenas("", tmp_path / "many") > 1
