"""Checks of the device's figures and allocations in a container, as one JSON object. For Python 3.5 and later.

Run inside the container as `seed_checks.py BYTES`, with the bytes that should be admitted beside the context.
"""

import ctypes
import importlib.util
import json
import os
import re
import subprocess
import sys
import time


def smi():
    """Return used and total of the table of nvidia-smi, in MiB."""
    table = subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, check=True).stdout.decode()
    return [int(mib) for mib in re.search(r"(\d+)MiB / +(\d+)MiB", table).groups()]


def of_driver(name, version, *words):
    """Call a function as the CUDA runtime does: by a lookup in the driver with name and version."""
    function = ctypes.c_void_p()
    cuda = ctypes.CDLL("libcuda.so.1")
    found = cuda.cuGetProcAddress(name.encode(), ctypes.byref(function), version, ctypes.c_ulonglong(0))
    assert not found, (name, found)
    return ctypes.CFUNCTYPE(ctypes.c_int)(function.value)(*words)


def runtime():
    """Return free and total of the primary context's device, the figures of `torch.cuda.mem_get_info`."""
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    assert not of_driver("cuInit", 2000, 0)
    assert not of_driver("cuDevicePrimaryCtxRetain", 7000, ctypes.byref(context), 0)
    assert not of_driver("cuCtxSetCurrent", 4000, context)
    assert not of_driver("cuMemGetInfo", 3020, ctypes.byref(free), ctypes.byref(total))
    return [free.value, total.value]


def numba():
    """Return numba's figures, from a separate process.

    Older releases of numba support no other contexts on a newer driver.
    """
    ask = "from numba import cuda; print(*cuda.current_context().get_memory_info())"
    said = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, check=True).stdout
    return [int(number) for number in said.split()]


def take(size):
    """Return the driver's result of an allocation."""
    return of_driver("cuMemAlloc", 3020, ctypes.byref(ctypes.c_ulonglong()), ctypes.c_size_t(size))


shown = {"glibc": os.confstr("CS_GNU_LIBC_VERSION").split()[1], "pids": os.readlink("/proc/self/ns/pid")}
shown["smi"] = smi()
if importlib.util.find_spec("numba"):
    shown["numba"] = numba()
until = time.monotonic() + 30
while smi()[0] and time.monotonic() < until:  # memory of that process is charged until the driver has freed it
    time.sleep(0.1)
shown["runtime"] = runtime()
shown["took"] = [take(int(sys.argv[1])), take(2 << 20)]
print(json.dumps(shown))
