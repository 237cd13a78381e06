"""The size of a context on each device. The size depends on the driver, is measured once and is stored in a file.

This module runs in the agent's main thread at its start. A child process creates contexts, and NVML reports their size.
If a measurement fails, a usual size is used and logged, and the next start measures again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from fgpu_ebpf.driver.nvml import Nvml
from fgpu_ebpf.linux import atomic_file

DEFAULT_CONTEXT_BYTES = 512 << 20
MOST_CONTEXT_BYTES = 1 << 40  # larger than the memory of any device
MEASURE_SECONDS = 30.0  # the first use of eight devices after a boot takes 20 s
_END_SECONDS = 5.0
log = logging.getLogger("fgpu.agent")

_HOLD_CONTEXTS = """
import ctypes, sys
cuda = ctypes.CDLL(sys.argv[1])
count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
ok = cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
for i in range(count.value if ok else 0):
    cuda.cuDeviceGet(ctypes.byref(device), i)
    cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
print("held", flush=True)
sys.stdin.read()
"""


def measure_contexts(nvml: Nvml, libcuda: Path) -> dict[int, int]:
    """Return the bytes of one empty context by ledger index. A device is left out if its context cannot be measured.

    A child creates the contexts, and NVML reports their size. A child that hangs in the driver cannot be killed, so
    such a child is left running.
    """
    command = [sys.executable, "-I", "-S", "-c", _HOLD_CONTEXTS, str(libcuda)]
    environment = {"PATH": "/usr/bin:/bin", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)
    assert child.stdin
    assert child.stdout
    try:
        ready = select.poll()  # unlike select(), accepts any descriptor; an agent may have thousands of descriptors
        ready.register(child.stdout, select.POLLIN)
        if not ready.poll(1000 * MEASURE_SECONDS):
            return {}
        held = [((nvml.process_bytes(d.index) or {}).get(child.pid), d.index) for d in nvml.devices]
        return {index: size for size, index in held if size}
    finally:
        child.stdin.close()
        child.stdout.close()
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_END_SECONDS)


def context_bytes(nvml: Nvml, libcuda: Path, state: Path) -> dict[int, int]:
    """Return the bytes of a context by ledger index. The file `state` stores the sizes by model and driver version.

    If a size cannot be measured, DEFAULT_CONTEXT_BYTES is used and logged, and the next start measures again.
    """
    known = _read_sizes(state)
    keys = {d.index: f"{d.name} {nvml.driver_version}" for d in nvml.devices}
    if any(key not in known for key in keys.values()):
        measured = measure_contexts(nvml, libcuda)
        known.update({keys[index]: size for index, size in measured.items()})
        _write_sizes(state, known)
    guessed = [index for index, key in keys.items() if key not in known]
    if guessed:
        size = f"{DEFAULT_CONTEXT_BYTES >> 20} MiB is assumed"
        log.warning(
            "the size of a CUDA context on device %s could not be measured: %s", ", ".join(map(str, guessed)), size
        )
    return {index: known.get(key, DEFAULT_CONTEXT_BYTES) for index, key in keys.items()}


def _read_sizes(state: Path) -> dict[str, int]:
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    known = found.items() if isinstance(found, Mapping) else ()
    return {key: size for key, size in known if type(size) is int and 0 < size < MOST_CONTEXT_BYTES}


def _write_sizes(state: Path, sizes: Mapping[str, int]) -> None:
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        atomic_file.write(state, json.dumps(sizes, indent=1, sort_keys=True) + "\n")
    except OSError:
        pass  # the next start measures again
