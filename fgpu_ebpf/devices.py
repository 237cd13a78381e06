"""NVIDIA's management library: which devices there are, and what each process holds on them.

Owns: the only use of pynvml, and the measuring of a context. Never: decides on "N/A"; a number that NVML does not
give is absent. On failure: DriverError with the mend when there is no driver; None or nothing for a value.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pynvml

from fgpu_ebpf import pages, probes
from fgpu_ebpf.checks import Check

DEFAULT_CONTEXT_BYTES = 512 << 20
_NVML = "libnvidia-ml.so.1"
_MEASURE_SECONDS = 30


class DriverError(Exception):
    """No NVIDIA driver, or one that does not answer; the text says what mends it."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU; `index` is the ledger's and NVML's. Bytes."""

    index: int
    uuid: bytes
    name: str
    pci_bus_id: str
    capacity_bytes: int

    @property
    def uuid_text(self) -> str:
        """As NVML prints it."""
        return pages.uuid_text(self.uuid)


class Nvml:
    """One initialised NVML, of one driver root."""

    def __init__(self, root: Path = Path("/")) -> None:
        try:
            self._preload(root)
            pynvml.nvmlInit()
            self.driver_version = str(pynvml.nvmlSystemGetDriverVersion())
            count = pynvml.nvmlDeviceGetCount()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(min(count, pages.DEVICES))]
            self.devices = [self._device(i) for i in range(len(self._handles))]
        except (pynvml.NVMLError, OSError) as error:
            raise DriverError(
                f"no NVIDIA driver answers under {root} ({error}): install it, or name --driver-root"
            ) from error
        if not self.devices:
            raise DriverError(f"the driver under {root} shows no device")

    @staticmethod
    def _preload(root: Path) -> None:
        """Loads this root's library, which pynvml then finds by its soname."""
        for path in probes.driver_libraries(root, _NVML):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            return
        if root != Path("/"):
            raise OSError(f"no {_NVML} under {root}")

    def _device(self, index: int) -> Device:
        handle = self._handles[index]
        uuid = pages.uuid_bytes(str(pynvml.nvmlDeviceGetUUID(handle)))
        pci = str(pynvml.nvmlDeviceGetPciInfo(handle).busId)
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        return Device(index, uuid, str(pynvml.nvmlDeviceGetName(handle)), pci, total)

    def used_bytes(self, index: int) -> int | None:
        """Bytes in use on a device, the driver's own included."""
        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(self._handles[index]).used)
        except pynvml.NVMLError:
            return None

    def process_bytes(self, index: int) -> dict[int, int] | None:
        """Bytes by host pid on a device; None where NVML does not say."""
        try:
            found = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handles[index])
        except pynvml.NVMLError:
            return None
        held: dict[int, int] = {}
        for process in found:
            if process.usedGpuMemory is not None:
                held[process.pid] = held.get(process.pid, 0) + int(process.usedGpuMemory)
        return held


# -- contexts ------------------------------------------------------------------------------------------------------

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
    """Bytes of one bare context by ledger index: a child makes them, NVML weighs them."""
    command = [sys.executable, "-I", "-c", _HOLD_CONTEXTS, str(libcuda)]
    environment = {"PATH": "/usr/bin:/bin", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)
    assert child.stdin
    assert child.stdout
    try:
        child.stdout.readline()
        samples = {d.index: (nvml.process_bytes(d.index) or {}).get(child.pid) for d in nvml.devices}
    finally:
        child.stdin.close()
        try:
            child.wait(_MEASURE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()
    return {index: size for index, size in samples.items() if size}


def context_bytes(nvml: Nvml, libcuda: Path, state: Path) -> dict[int, int]:
    """The size of a context by ledger index, remembered by model and driver version in `state`."""
    known = _read_sizes(state)
    keys = {d.index: f"{d.name} {nvml.driver_version}" for d in nvml.devices}
    if any(key not in known for key in keys.values()):
        measured = measure_contexts(nvml, libcuda)
        known.update({keys[index]: size for index, size in measured.items()})
        _write_sizes(state, known)
    return {index: known.get(key, DEFAULT_CONTEXT_BYTES) for index, key in keys.items()}


def _read_sizes(state: Path) -> dict[str, int]:
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): int(v) for k, v in found.items()} if isinstance(found, Mapping) else {}


def _write_sizes(state: Path, sizes: Mapping[str, int]) -> None:
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        beside = state.with_suffix(".new")
        beside.write_text(json.dumps(sizes, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(beside, state)
    except OSError:
        pass  # measured again at the next start


def checks(root: Path) -> list[Check]:
    """The driver's libraries: there, answering, and with the functions that must be seen."""
    try:
        nvml = Nvml(root)
    except DriverError as error:
        return [Check("driver", False, "no driver", str(error))]
    found = f"{nvml.driver_version}, {len(nvml.devices)} device(s)"
    libraries = probes.driver_libraries(root, "libcuda.so.1")
    if not libraries:
        return [Check("driver", False, found, f"no libcuda.so.1 under {root}: install the driver's CUDA library")]
    for path in libraries:
        missing = probes.missing_functions(str(path))
        if missing:
            return [Check("driver", False, found, f"{path} lacks {', '.join(missing)}: update the driver")]
    return [Check("driver", True, found)]
