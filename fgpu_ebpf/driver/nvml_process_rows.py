"""NVML's rows: the processes that hold memory on a device, with the number of bytes.

NVML lists processes that compute and processes that draw or encode (Vulkan, OpenGL, NVENC) separately. A process that
computes and draws is in both lists, with the same bytes. This module runs in the agent's reconcile thread, and in the
agent's main thread at its start.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pynvml

COMPUTE, GRAPHICS = "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3"
_NOT_REPORTED = pynvml.NVML_VALUE_NOT_AVAILABLE_ulonglong.value
_TRIES = 4  # the number of processes may grow between two calls
_ABSENT = {pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND}


class ProcessRows:
    """All rows of a device. `library`: libnvidia-ml."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._compute = _List(library, COMPUTE)
        self._graphics = _List(library, GRAPHICS)

    def ask(self, handle: object) -> dict[int, int | None]:
        """Return bytes by host pid; None: NVML does not report the bytes. Raise NVMLError on failure.

        If a device or a driver has no list of processes that draw, this list counts as empty.
        """
        found = self._compute.ask(handle)
        try:
            drawing = self._graphics.ask(handle)
        except pynvml.NVMLError as error:
            if error.value not in _ABSENT:
                raise
            return found
        for pid, held in drawing.items():
            other = found.get(pid, 0)
            found[pid] = None if held is None or other is None else max(held, other)
        return found


class _List:
    """One of NVML's two lists. ask() usually makes one call. pynvml makes an additional call for the row count."""

    def __init__(self, library: ctypes.CDLL, question: str) -> None:
        self._ask: Any = getattr(library, question, None)
        self._rows: Any = _room(64)

    def ask(self, handle: object) -> dict[int, int | None]:
        """Return bytes by host pid; None: NVML does not report the bytes. Raise NVMLError on failure."""
        code, n = pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, ctypes.c_uint()
        for _ in range(_TRIES if self._ask else 0):
            n.value = len(self._rows)
            code = self._ask(handle, ctypes.byref(n), self._rows)
            if code != pynvml.NVML_ERROR_INSUFFICIENT_SIZE:
                break
            self._rows = _room(2 * max(n.value, len(self._rows)))
        if code != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(code)
        return _sums([(row.pid, row.usedGpuMemory) for row in self._rows[: n.value]])


def _sums(rows: list[tuple[int, int]]) -> dict[int, int | None]:
    held: dict[int, int | None] = {}
    for pid, more in rows:
        before = held.get(pid, 0)
        held[pid] = None if before is None or more == _NOT_REPORTED else before + more
    return held


def _room(rows: int) -> ctypes.Array[Any]:
    room: ctypes.Array[Any] = (pynvml.c_nvmlProcessInfo_v3_t * rows)()
    return room
