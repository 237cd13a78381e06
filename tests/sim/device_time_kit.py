"""Device time of work that is all queued before the first of it starts.

The device's own schedule determines when such work begins and ends. It does not depend on when the program or the
server gets a processor.
"""

from __future__ import annotations

from .conftest import Machine

# A copy between host and device moves 50 bytes in a nanosecond: 500 MB take 10 ms. A copy on the device moves 2000
# bytes: 20 GB take 10 ms. The simulator stores no contents of that size, so no data is really moved.
# Work that is queued after led() or paused() starts when a kernel or copies of LEAD_MS have ended. Copies do not use
# the device's time, so another context runs meanwhile as if it were alone.
QUEUED = """
LEAD_MS = %d
n, much, host = 500_000_000, 20_000_000_000, C.create_string_buffer(8)
def recorded(to=None):
    event = C.c_void_p(); need("cuEventCreate", C.byref(event), 0); need("cuEventRecord", event, to); return event
def copies(count, to=None):
    for _ in range(count):
        need("cuMemcpyHtoDAsync_v2", C.c_uint64(at.value + much - n), host, C.c_size_t(n), to)
def zeroes(to=None):
    need("cuMemsetD8Async", at, 0, C.c_size_t(much), to)
def led(to=None):
    need("cuLaunchKernel", kernel("spin_%%d000us" %% LEAD_MS)[1], 1, 1, 1, 1, 1, 1, 0, to, None, None)
    return recorded(to)
def paused(to=None):
    copies(LEAD_MS // 10, to); return recorded(to)
def after(event, *streams):
    for to in streams: need("cuStreamWaitEvent", to, event, 0)
def queued(first):
    if L.cuEventQuery(first) != 600:
        say("late"); os._exit(0)
def ms(first, last):
    need("cuEventSynchronize", first); need("cuEventSynchronize", last); found = C.c_float()
    need("cuEventElapsedTime", C.byref(found), first, last); return round(found.value, 2)
context = start(); at = alloc(much)
"""


def queue(machine: Machine, script: str) -> list[str]:
    """Run a script that calls queued() with the event that led() or paused() has returned. Return what it prints.

    If the script was so late that the event was over when it had queued all of its work, this function runs it again
    with more time.
    """
    for lead_ms in (200, 2_000, 20_000):
        said = machine.python(QUEUED % lead_ms + script)
        if "late" not in said:
            return said
    raise AssertionError("the program could not queue its work in 20 s, or its calls wait for the work")
