"""NVML's own memory limits of cgroups, which NVIDIA's driver enforces from r615 on.

This module runs in the agent's reconcile thread, and in `fgpu detach`. The functions are found by their names, because
a driver's version does not tell whether it has them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pynvml

SET, GET = "nvmlDeviceSetMemoryLimits_v1", "nvmlDeviceGetMemoryLimits_v1"
NO_LIMIT = (1 << 64) - 1  # NVML_DEVICE_MEMORY_LIMIT_MAX


class Limits(NamedTuple):
    """The limits of a cgroup on a device, in bytes. `soft`: guaranteed; `hard`: the maximum."""

    soft: int
    hard: int


NONE = Limits(0, NO_LIMIT)


class _Set(ctypes.Structure):
    _fields_ = (("folder", ctypes.c_char_p), ("soft", ctypes.c_ulonglong), ("hard", ctypes.c_ulonglong))


class _Get(ctypes.Structure):
    _fields_ = (*_Set._fields_, ("used", ctypes.c_ulonglong))


class MemoryLimits:
    """The two functions of NVML.

    Args:
        library: libnvidia-ml.
        handle: returns the handle of the device with this index in the ledger, or raises NVMLError.
    """

    def __init__(self, library: ctypes.CDLL, handle: Callable[[int], Any]) -> None:
        self._handle = handle
        self._set: Any = getattr(library, SET, None)
        self._get: Any = getattr(library, GET, None)
        self.exist = bool(self._set and self._get)
        """True if the driver has the functions."""
        self.absent: set[int] = set()
        """The devices, by index in the ledger, for which the driver has no limits."""

    def get(self, device: int, folder: str) -> Limits | None:
        """Return the limits of a cgroup on a device, or None if NVML does not report them.

        Args:
            device: the index of the device in the ledger.
            folder: the path of the cgroup's folder.
        """
        asked = _Get(os.fsencode(folder))
        return Limits(asked.soft, asked.hard) if self._call(self._get, device, asked) else None

    def set(self, device: int, folder: str, limits: Limits) -> bool:
        """Set the limits of a cgroup on a device. Return whether the driver has set them. NONE clears the limits."""
        return self._call(self._set, device, _Set(os.fsencode(folder), *limits))

    def _call(self, function: Any, device: int, asked: ctypes.Structure) -> bool:
        try:
            code = function(self._handle(device), ctypes.byref(asked)) if self.exist else None
        except pynvml.NVMLError:  # the device has no handle
            return False
        if code == pynvml.NVML_ERROR_NOT_SUPPORTED:
            self.absent.add(device)
        return bool(code == pynvml.NVML_SUCCESS)
