"""NVIDIA's management library: the devices, and the memory of each process on a device.

This module runs in the agent's reconcile thread, in its main thread at its start and for arrived(), and in `fgpu
doctor`. Only this module, `nvml_process_rows` and `nvml_memory_limits` use pynvml. A number that NVML does not report
is None. DriverError is raised if no driver responds or the driver lists no device.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from fgpu_ebpf.check import Check
from fgpu_ebpf.driver import device_indexes, library_files, probe_plan
from fgpu_ebpf.driver.nvml_memory_limits import MemoryLimits
from fgpu_ebpf.driver.nvml_process_rows import ProcessRows

_NVML = "libnvidia-ml.so.1"
_LOST = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_UNINITIALIZED, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
# Errors after which NVML is restarted. "Unknown Error" may be permanent, for example if NVML lost its connection to the
# driver while this process had no memory. In this case the device itself is not lost.
_RESTART = (*_LOST, pynvml.NVML_ERROR_UNKNOWN)
AGAIN_SECONDS = 5.0  # between two restarts of NVML, unless all devices are lost
_MOST_EVENTS = 64  # events of one call; later events stay for the next call
log = logging.getLogger("fgpu.agent")


class DriverError(Exception):
    """No NVIDIA driver responds, or the driver lists no device. The text has the reason and the fix, if known."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU. `index` is its index in the ledger. Sizes are in bytes."""

    index: int
    uuid: bytes
    name: str
    pci_bus_id: str
    capacity_bytes: int
    usable_bytes: int  # for tenants: the capacity without the driver's reserve

    @property
    def uuid_text(self) -> str:
        """The UUID as NVML prints it."""
        return uuid_text(self.uuid)


class Nvml:
    """An initialised NVML library of one driver root. `known`: ledger indexes by UUID, from earlier agents.

    If a device has no handle, for example because the device is lost, all other devices can still be used. `missing`
    has the reason by the name of the device, and look_for_missing() tries again.
    """

    released = False  # True after release()

    def __init__(self, root: Path = Path("/"), known: Mapping[bytes, int] | None = None) -> None:
        self._known = dict(known or {})
        self._handles: dict[int, Any] = {}
        self._events: Events | None = None
        self._lost: set[int] = set()
        self._came: list[tuple[int, int | None]] = []
        self._arrived: list[Device] = []
        self._begin_at = time.monotonic() + AGAIN_SECONDS
        try:
            self._preload(root)
            pynvml.nvmlInit()
            self.driver_version = str(pynvml.nvmlSystemGetDriverVersion())
            library = ctypes.CDLL(_NVML)
            self._rows, self.limits = ProcessRows(library), MemoryLimits(library, self._handle)
            self.devices, self.missing = self._find()
        except (pynvml.NVMLError, OSError) as error:
            raise DriverError(
                f"no NVIDIA driver responds under {root} ({error}): install the driver, or set --driver-root"
            ) from error
        if not self.devices:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.missing.items())
            raise DriverError(f"the driver under {root} lists no device{why and f' that responds ({why})'}")

    @staticmethod
    def _preload(root: Path) -> None:
        """Load the NVML library of this root, which pynvml then finds by its soname."""
        for path in library_files.driver_libraries(root, _NVML):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            return
        if root != Path("/"):
            raise OSError(f"no {_NVML} under {root}")

    def _find(self) -> tuple[list[Device], dict[str, str]]:
        """Get handles of more devices. Return these devices, and why other devices lack a handle.

        Raise NVMLError on failure.
        """
        found, missing = [], {}
        for number in range(pynvml.nvmlDeviceGetCount()):
            try:
                device = self._device(number)
            except pynvml.NVMLError as error:
                missing[f"device {number} of NVML"] = str(error)
                continue
            if device is not None:
                found.append(device)
        here = {uuid for uuid, index in self._known.items() if index in self._handles}
        if not missing:  # otherwise a missing UUID belongs to a device without a handle
            missing = {uuid_text(uuid): "NVML does not list this device" for uuid in self._known.keys() - here}
        return sorted(found, key=lambda device: device.index), missing

    def _device(self, number: int) -> Device | None:
        """Return a new device, or None if the device has a handle or no ledger index is free.

        Raise NVMLError on failure.
        """
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        uuid = uuid_bytes(str(pynvml.nvmlDeviceGetUUID(handle)))
        index = device_indexes.index_of(uuid, number, self._known, self._handles)
        if index is None or index in self._handles:
            return None
        pci, name = str(pynvml.nvmlDeviceGetPciInfo(handle).busId), str(pynvml.nvmlDeviceGetName(handle))
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        self._known[uuid], self._handles[index] = index, handle
        return Device(index, uuid, name, pci, total, total - _reserved_bytes(handle))

    def release(self) -> None:
        """Shut NVML down. This process then has no device open, and all calls fail until take_up()."""
        self.released = True
        self._read_and_end_events()
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()

    def take_up(self) -> None:
        """Initialise NVML again. If NVML cannot be initialised yet, each later call tries again."""
        self.released = False
        self._restart()

    def _handle(self, index: int) -> Any:
        """Return the handle of a device. Raise NVMLError if the device is missing or all devices are released."""
        if self.released or index not in self._handles:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        return self._handles[index]

    def look_for_missing(self) -> None:
        """Try again to get handles of missing devices.

        NVML finds a device that was reset only after a restart, which is done at most every AGAIN_SECONDS.
        """
        if self.released or not self.missing:
            return
        if time.monotonic() >= self._begin_at:
            self._restart()
        with contextlib.suppress(pynvml.NVMLError):
            found, self.missing = self._find()
            if found:
                self._read_and_end_events()  # xids() registers for these devices too
            self._arrived += found
            self._came += [(device.index, None) for device in found]

    def arrived(self) -> list[Device]:
        """Return the devices that look_for_missing() has found since the last call and that `devices` lacks."""
        found, self._arrived = self._arrived, []
        return found

    def used_bytes(self, index: int) -> int | None:
        """Return the bytes in use on a device, with the driver's bytes; None: NVML does not report the bytes."""
        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle(index)).used)
        except pynvml.NVMLError as error:
            self._find_again(error)
            return None

    def free_bytes(self, index: int) -> int | None:
        """Return the bytes of a device that no process holds, or None if NVML does not report the bytes.

        Any thread may call this method. Unlike used_bytes(), this method never restarts NVML.
        """
        try:
            return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle(index)).free)
        except pynvml.NVMLError:
            return None

    def in_mig_mode(self, index: int) -> bool:
        """Return whether the device is divided into MIG instances, which the ledger does not support."""
        try:
            return bool(pynvml.nvmlDeviceGetMigMode(self._handle(index))[0] == pynvml.NVML_DEVICE_MIG_ENABLE)
        except pynvml.NVMLError:  # the device has no MIG mode, or is missing
            return False

    def taken_bytes(self, index: int) -> int | None:
        """Return the bytes in use on a device without the driver's reserve; None: NVML does not report the bytes."""
        used, device = self.used_bytes(index), next((d for d in self.devices if d.index == index), None)
        return None if used is None or device is None else used - (device.capacity_bytes - device.usable_bytes)

    def process_bytes(self, index: int) -> dict[int, int | None] | None:
        """Return bytes by host pid on a device.

        The bytes of a process, or the whole result, are None if NVML reports "N/A".
        """
        try:
            return self._rows.ask(self._handle(index))
        except pynvml.NVMLError as error:
            self._find_again(error)
            return None

    def _find_again(self, error: pynvml.NVMLError) -> None:
        """Restart NVML after an error that new handles may end, such as the loss or reset of a device."""
        if self.released or error.value not in _RESTART:
            return
        lost = {index for index, handle in self._handles.items() if _is_lost(handle)}
        has_changed = lost != self._lost
        self._lost |= lost
        if has_changed or len(lost) == len(self._handles) or time.monotonic() >= self._begin_at:
            self._restart()

    def _restart(self) -> None:
        """Restart NVML and look up all handles again. XIDs during the restart are lost, so restarts are rare."""
        self._begin_at = time.monotonic() + AGAIN_SECONDS
        self._read_and_end_events()
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return  # NVML cannot be restarted yet; the next call tries again
        for uuid, index in self._known.items():
            if index in self._handles:
                self._find_handle(uuid, index)
        with contextlib.suppress(pynvml.NVMLError):  # xids() tries again
            self._events = Events(self._handles)

    def _find_handle(self, uuid: bytes, index: int) -> None:
        try:
            self._handles[index] = pynvml.nvmlDeviceGetHandleByUUID(uuid_text(uuid))
        except pynvml.NVMLError:
            return  # the device is still lost
        if index in self._lost and not _is_lost(self._handles[index]):
            self._lost.discard(index)
            self._came.append((index, None))
            log.warning("device %d responds to NVML again, after NVML had lost it", index)

    def watched(self) -> frozenset[int]:
        """Return the devices whose XIDs NVML reports; empty before the first call of xids()."""
        return self._events.watched if self._events else frozenset()

    def xids(self) -> list[tuple[int, int | None]]:
        """Return pairs of device and XID since the last call, in order.

        An XID of None means that the device has been found again after a loss or a reset. The method polls NVML in the
        caller's thread without waiting, because a restart of NVML would break a wait in another thread.
        """
        try:
            self._events = self._events or Events(self._handles)
            for event in self._events.take():
                self._came.append(event)
        except pynvml.NVMLError:
            self._end_events()  # the next call registers again
        came, self._came = self._came, []
        return came

    def _read_and_end_events(self) -> None:
        with contextlib.suppress(pynvml.NVMLError):
            for event in self._events.take() if self._events else ():
                self._came.append(event)
        self._end_events()

    def _end_events(self) -> None:
        if self._events:
            self._events.end()
        self._events = None

    def process_percent(self, index: int, since: float) -> dict[int, int] | None:
        """Return the percentage of a device's time by host pid, from the last sample after a time, or None.

        Processes that ran no kernels are left out.

        Args:
            index: the ledger index of the device.
            since: the time in seconds since the Unix epoch.
        """
        try:
            found = pynvml.nvmlDeviceGetProcessUtilization(self._handle(index), int(since * 1_000_000))
        except pynvml.NVMLError_NotFound:
            return {}
        except pynvml.NVMLError:
            return None
        latest = {sample.pid: sample for sample in sorted(found, key=lambda sample: int(sample.timeStamp))}
        return {pid: min(100, int(sample.smUtil)) for pid, sample in latest.items()}


class Events:
    """The XID events of NVML for registered handles. The constructor raises NVMLError on failure.

    Each event is reported once. Events from before the registration are not reported.
    """

    def __init__(self, handles: Mapping[int, object]) -> None:
        self._handles = dict(handles)
        self._set = pynvml.nvmlEventSetCreate()
        self.watched = frozenset(i for i, handle in handles.items() if self._register(handle))

    def _register(self, handle: object) -> bool:
        try:
            pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, self._set)
        except pynvml.NVMLError:  # the device is lost, or is too old for events
            return False
        return True

    def take(self) -> Iterator[tuple[int, int]]:
        """Yield device and XID of all events that are available. Raise NVMLError on failure."""
        for _ in range(_MOST_EVENTS):
            try:
                event = pynvml.nvmlEventSetWait_v2(self._set, 0)
            except pynvml.NVMLError_Timeout:
                return
            if event.eventType == pynvml.nvmlEventTypeXidCriticalError:
                yield from ((device, int(event.eventData)) for device in self._of(event.device))

    def _of(self, handle: object) -> Sequence[int]:
        """Return the index of a handle. If NVML reports an unknown handle, return all indexes."""
        named = [index for index, one in self._handles.items() if _address(one) == _address(handle)]
        return named or list(self._handles)

    def end(self) -> None:
        """Free the event set. Events that were not read are lost."""
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
    """Return the driver's own reserve on a device, or 0 if NVML does not report the reserve."""
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).reserved)
    except (pynvml.NVMLError, AttributeError):
        return 0


def checks(root: Path) -> list[Check]:
    """Return the findings about the driver for `fgpu doctor`: libraries exist, respond, and have required functions."""
    try:
        nvml = Nvml(root)
    except DriverError as error:
        return [Check("driver", False, "no driver", str(error))]
    count = len(nvml.devices)
    found = f"{nvml.driver_version}, {count} {'device' if count == 1 else 'devices'}"
    found += "".join(f"; {name} does not respond: {why}" for name, why in nvml.missing.items())
    libraries = library_files.driver_libraries(root, "libcuda.so.1")
    if not libraries:
        return [Check("driver", False, found, f"no libcuda.so.1 under {root}: install the driver's CUDA library")]
    for path in libraries:
        missing = probe_plan.missing_functions(str(path))
        if missing:
            return [Check("driver", False, found, f"{path} lacks {', '.join(missing)}: update the driver")]
    return [Check("driver", True, found), *_mig(nvml)]


def _mig(nvml: Nvml) -> list[Check]:
    """Return the finding about MIG mode, or nothing if no device is in that mode."""
    named = [f"{device.index} ({device.name})" for device in nvml.devices if nvml.in_mig_mode(device.index)]
    if not named:
        return []
    found = f"MIG mode is on: device {', '.join(named)}; a tenant with a limit gets no memory on a MIG instance"
    fix = "leave the device out of policies and shares (devices:), or disable MIG: nvidia-smi -i INDEX -mig 0"
    return [Check("mig", False, found, fix)]


def uuid_bytes(text: str) -> bytes:
    """Return the 16 bytes of a device's UUID from the form `GPU-…` that NVML prints. Raise ValueError on failure."""
    raw = bytes.fromhex(text.removeprefix("GPU-").replace("-", ""))
    if len(raw) != 16:
        raise ValueError(f"not the UUID of a device: {text!r}")
    return raw


def uuid_text(raw: bytes) -> str:
    """Return a device's UUID in the form `GPU-…` that NVML prints. Raise ValueError unless `raw` has 16 bytes."""
    if len(raw) != 16:
        raise ValueError(f"a UUID has 16 bytes, not {len(raw)}")
    text = raw.hex()
    return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
