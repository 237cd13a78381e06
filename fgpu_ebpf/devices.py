"""NVIDIA's management library: which devices there are, and what each process holds on them.

Owns: the only use of pynvml, and the measuring of a context. Never: decides on "N/A"; a number that NVML does not
give is absent. On failure: DriverError with the mend when there is no driver; None or nothing for a value.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from fgpu_ebpf import library_files, pages, probe_plan, wholefile
from fgpu_ebpf.checks import Check
from fgpu_ebpf.process_rows import ProcessRows

DEFAULT_CONTEXT_BYTES = 512 << 20
MOST_CONTEXT_BYTES = 1 << 40  # more than any device has
_NVML = "libnvidia-ml.so.1"
MEASURE_SECONDS = 30.0  # eight devices that nobody has used since boot take twenty
_END_SECONDS = 5.0
_LOST = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNINITIALIZED, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
_MOST_EVENTS = 64  # at one look; the others stay for the next
log = logging.getLogger("fgpu.agent")


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
    usable_bytes: int  # what tenants can get: all but what the driver keeps for itself

    @property
    def uuid_text(self) -> str:
        """As NVML prints it."""
        return uuid_text(self.uuid)


class Nvml:
    """One initialised NVML, of one driver root."""

    def __init__(self, root: Path = Path("/")) -> None:
        try:
            self._preload(root)
            pynvml.nvmlInit()
            self.driver_version = str(pynvml.nvmlSystemGetDriverVersion())
            count = pynvml.nvmlDeviceGetCount()
            self._rows = ProcessRows(ctypes.CDLL(_NVML))
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(min(count, pages.DEVICES))]
            self.devices = [self._device(i) for i in range(len(self._handles))]
            self._events: Events | None = None
            self._lost: set[int] = set()
            self._came: list[tuple[int, int | None]] = []
        except (pynvml.NVMLError, OSError) as error:
            raise DriverError(
                f"no NVIDIA driver answers under {root} ({error}): install it, or name --driver-root"
            ) from error
        if not self.devices:
            raise DriverError(f"the driver under {root} shows no device")

    @staticmethod
    def _preload(root: Path) -> None:
        """Loads this root's library, which pynvml then finds by its soname."""
        for path in library_files.driver_libraries(root, _NVML):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            return
        if root != Path("/"):
            raise OSError(f"no {_NVML} under {root}")

    def _device(self, index: int) -> Device:
        handle = self._handles[index]
        uuid = uuid_bytes(str(pynvml.nvmlDeviceGetUUID(handle)))
        pci = str(pynvml.nvmlDeviceGetPciInfo(handle).busId)
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        return Device(index, uuid, str(pynvml.nvmlDeviceGetName(handle)), pci, total, total - _reserved_bytes(handle))

    def used_bytes(self, index: int) -> int | None:
        """Bytes in use on a device, the driver's own included."""
        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(self._handles[index]).used)
        except pynvml.NVMLError as error:
            self._find_again(error)
            return None

    def in_mig_mode(self, index: int) -> bool:
        """The device is divided into instances, of which the ledger knows none."""
        try:
            return bool(pynvml.nvmlDeviceGetMigMode(self._handles[index])[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
        except pynvml.NVMLError:  # it has no such mode
            return False

    def taken_bytes(self, index: int) -> int | None:
        """Bytes of what tenants can get that are in use on a device; None where NVML does not say."""
        used, device = self.used_bytes(index), self.devices[index]
        return None if used is None else used - (device.capacity_bytes - device.usable_bytes)

    def process_bytes(self, index: int) -> dict[int, int | None] | None:
        """Bytes by host pid on a device; None where NVML does not say: of one process ("N/A"), or of any."""
        try:
            return self._rows.ask(self._handles[index])
        except pynvml.NVMLError as error:
            self._find_again(error)
            return None

    def _find_again(self, error: pynvml.NVMLError) -> None:
        """A device that was lost, or reset, is another one to NVML: it must begin anew to find it."""
        if error.value not in _LOST:
            return
        self._lost.update(i for i, handle in enumerate(self._handles) if _is_lost(handle))
        self._look_no_more()
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        try:
            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByUUID(device.uuid_text) for device in self.devices]
        except pynvml.NVMLError:
            return  # not yet: the next question tries again
        self._came += [(device, None) for device in sorted(self._lost)]
        self._lost.clear()
        log.warning("NVML had lost a device, and has found it again")

    def watched(self) -> frozenset[int]:
        """The devices whose XIDs NVML tells, from the first look for them on."""
        return self._events.watched if self._events else frozenset()

    def xids(self) -> list[tuple[int, int | None]]:
        """Device and XID in their order, since the last look; None: the device was lost or reset and is found again.

        NVML is asked without waiting, on the caller's thread: a wait could not bear that NVML begins anew meanwhile.
        """
        try:
            self._events = self._events or Events(self._handles)
            for event in self._events.take():
                self._came.append(event)
        except pynvml.NVMLError:
            self._look_no_more()  # until the next look
        came, self._came = self._came, []
        return came

    def _look_no_more(self) -> None:
        if self._events:
            self._events.end()
        self._events = None

    def process_percent(self, index: int, since: float) -> dict[int, int] | None:
        """Percent of a device's time by host pid that had kernels running, of the last sample since that moment.

        `since`: seconds since the epoch. None: NVML does not say. Who ran nothing is not named.
        """
        try:
            found = pynvml.nvmlDeviceGetProcessUtilization(self._handles[index], int(since * 1_000_000))
        except pynvml.NVMLError_NotFound:
            return {}
        except pynvml.NVMLError:
            return None
        latest = {sample.pid: sample for sample in sorted(found, key=lambda sample: int(sample.timeStamp))}
        return {pid: min(100, int(sample.smUtil)) for pid, sample in latest.items()}


class Events:
    """XIDs as NVML tells them to who has registered: each once, and none from before. Raises NVMLError."""

    def __init__(self, handles: Sequence[object]) -> None:
        self._handles = handles
        self._set = pynvml.nvmlEventSetCreate()
        self.watched = frozenset(i for i, handle in enumerate(handles) if self._register(handle))

    def _register(self, handle: object) -> bool:
        try:
            pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, self._set)
        except pynvml.NVMLError:  # it is lost, or too old
            return False
        return True

    def take(self) -> Iterator[tuple[int, int]]:
        """Device and XID of those that have come. Raises NVMLError."""
        for _ in range(_MOST_EVENTS):
            try:
                event = pynvml.nvmlEventSetWait_v2(self._set, 0)
            except pynvml.NVMLError_Timeout:
                return
            if event.eventType == pynvml.nvmlEventTypeXidCriticalError:
                yield from ((device, int(event.eventData)) for device in self._of(event.device))

    def _of(self, handle: object) -> Sequence[int]:
        """Its index; all, where NVML names a device by a handle that nobody was given."""
        at = [_address(one) for one in self._handles]
        return [at.index(_address(handle))] if _address(handle) in at else range(len(at))

    def end(self) -> None:
        """What has not been taken is not told any more."""
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlEventSetFree(self._set)


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def _is_lost(handle: object) -> bool:
    try:
        pynvml.nvmlDeviceGetMemoryInfo(handle)
    except pynvml.NVMLError as error:
        return error.value in _LOST
    return False


def _reserved_bytes(handle: object) -> int:
    """What the driver keeps for itself; 0 where it does not say."""
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).reserved)
    except (pynvml.NVMLError, AttributeError):
        return 0


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
    """Bytes of one bare context by ledger index: a child makes them, NVML weighs them. Empty: it did not in time.

    A child that hangs in the driver cannot even be killed: it is left behind.
    """
    command = [sys.executable, "-I", "-c", _HOLD_CONTEXTS, str(libcuda)]
    environment = {"PATH": "/usr/bin:/bin", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)
    assert child.stdin
    assert child.stdout
    try:
        if not select.select([child.stdout], [], [], MEASURE_SECONDS)[0]:
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
    """The size of a context by ledger index, remembered by model and driver version in `state`.

    Where it cannot be measured, a usual size is taken and said; the next start tries again.
    """
    known = _read_sizes(state)
    keys = {d.index: f"{d.name} {nvml.driver_version}" for d in nvml.devices}
    if any(key not in known for key in keys.values()):
        measured = measure_contexts(nvml, libcuda)
        known.update({keys[index]: size for index, size in measured.items()})
        _write_sizes(state, known)
    guessed = [index for index, key in keys.items() if key not in known]
    if guessed:
        size = f"{DEFAULT_CONTEXT_BYTES >> 20} MiB is taken"
        log.warning("no context on device %s could be measured: %s", ", ".join(map(str, guessed)), size)
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
        wholefile.write(state, json.dumps(sizes, indent=1, sort_keys=True) + "\n")
    except OSError:
        pass  # measured again at the next start


def checks(root: Path) -> list[Check]:
    """The driver's libraries: there, answering, and with the functions that must be seen."""
    try:
        nvml = Nvml(root)
    except DriverError as error:
        return [Check("driver", False, "no driver", str(error))]
    found = f"{nvml.driver_version}, {len(nvml.devices)} device(s)"
    libraries = library_files.driver_libraries(root, "libcuda.so.1")
    if not libraries:
        return [Check("driver", False, found, f"no libcuda.so.1 under {root}: install the driver's CUDA library")]
    for path in libraries:
        missing = probe_plan.missing_functions(str(path))
        if missing:
            return [Check("driver", False, found, f"{path} lacks {', '.join(missing)}: update the driver")]
    return [Check("driver", True, found), *_mig(nvml)]


def _mig(nvml: Nvml) -> list[Check]:
    """Nothing where no device is in that mode: most have none."""
    named = [f"{device.index} ({device.name})" for device in nvml.devices if nvml.in_mig_mode(device.index)]
    if not named:
        return []
    found = f"MIG mode is on: device {', '.join(named)}; a tenant with a limit gets no memory on an instance"
    mend = "leave it out of policies and shares (devices:), or nvidia-smi -i INDEX -mig 0"
    return [Check("mig", False, found, mend)]


def uuid_bytes(text: str) -> bytes:
    """The 16 bytes of a device's UUID, `GPU-…` as NVML writes it. Raises ValueError."""
    raw = bytes.fromhex(text.removeprefix("GPU-").replace("-", ""))
    if len(raw) != 16:
        raise ValueError(f"not the UUID of a device: {text!r}")
    return raw


def uuid_text(raw: bytes) -> str:
    """`GPU-…`, as NVML writes the UUID. Raises ValueError unless there are 16 bytes."""
    if len(raw) != 16:
        raise ValueError(f"a UUID has 16 bytes, not {len(raw)}")
    text = raw.hex()
    return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
