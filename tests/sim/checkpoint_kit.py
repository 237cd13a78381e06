"""Programs that lock, checkpoint and restore others by the simulated driver, and programs to which they do it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from .conftest import Machine, say
from .sharing_kit import hear

RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)
INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, OPERATING_SYSTEM = 1, 2, 3, 304
ILLEGAL_STATE, NOT_READY, NOT_SUPPORTED = 401, 600, 801

# Runs lines of Python, and answers each with one line.
SERVES = """
for line in sys.stdin: say(eval(line))
"""

# The functions for a process, and `park` and `wake`, which return the results of their two calls.
CALLER = (
    """
need("cuInit", 0)
def lock(pid, ms=5000): return L.cuCheckpointProcessLock(pid, (C.c_uint64 * 8)(ms))
def checkpoint(pid): return L.cuCheckpointProcessCheckpoint(pid, None)
def restore(pid): return L.cuCheckpointProcessRestore(pid, None)
def uuid(device):
    found = C.create_string_buffer(16)
    need("cuDeviceGetUuid_v2", found, device)
    return found.raw
def move(pid, *pairs):
    raw = C.create_string_buffer(b"".join(uuid(device) for pair in pairs for device in pair))
    return L.cuCheckpointProcessRestore(pid, (C.c_uint64 * 8)(C.addressof(raw), len(pairs)))
def unlock(pid): return L.cuCheckpointProcessUnlock(pid, None)
def value(name, pid):
    found = C.c_int(-1)
    result = getattr(L, name)(pid, C.byref(found))
    return found.value if not result else -result
def state(pid): return value("cuCheckpointProcessGetState", pid)
def thread(pid): return value("cuCheckpointProcessGetRestoreThreadId", pid)
def park(pid): return lock(pid), checkpoint(pid)
def wake(pid): return restore(pid), unlock(pid)
"""
    + SERVES
)

# Copies `size` bytes of a pattern to the device, and back.
DATA = """
def pattern(size): return bytes(range(256)) * (size // 256)
def write(pointer, size): need("cuMemcpyHtoD_v2", pointer, pattern(size), C.c_size_t(size))
def is_intact(pointer, size):
    back = C.create_string_buffer(size)
    need("cuMemcpyDtoH_v2", back, pointer, C.c_size_t(size))
    return back.raw == pattern(size)
"""


def ask(program: subprocess.Popen[str], line: str) -> str:
    say(program, line)
    return hear(program)


@contextmanager
def serving(machine: Machine, script: str, prefix: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run a program that prints "up" and then answers lines. The program is killed at the end."""
    with machine.spawn(script + "\nsay('up')\n" + SERVES, prefix) as program:
        try:
            assert hear(program) == "up"
            yield program
        finally:
            program.kill()


@contextmanager
def calling(machine: Machine) -> Iterator[subprocess.Popen[str]]:
    with serving(machine, CALLER.replace(SERVES, "")) as caller:
        yield caller
