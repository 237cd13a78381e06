"""NVML's figures of device 0 and its processes. To be called after nvmlInit(). The functions raise NVMLError."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pynvml


def device() -> object:
    """Return NVML's handle of device 0."""
    return pynvml.nvmlDeviceGetHandleByIndex(0)


def bytes_in_use() -> int:
    """Return the memory in use on the device, in bytes."""
    return int(pynvml.nvmlDeviceGetMemoryInfo(device()).used)


def bytes_in_all() -> int:
    """Return the memory of the device, in bytes."""
    return int(pynvml.nvmlDeviceGetMemoryInfo(device()).total)


def bytes_by_pid() -> Mapping[int, int]:
    """Return NVML's bytes of each process, by host pid."""
    return {p.pid: p.usedGpuMemory or 0 for p in pynvml.nvmlDeviceGetComputeRunningProcesses(device())}


def bytes_of(pids: set[int]) -> int:
    """Return the sum of NVML's bytes of these processes."""
    return sum(bytes_ for pid, bytes_ in bytes_by_pid().items() if pid in pids)


def pids_of(cgroup: Path) -> set[int]:
    """Return the pids of the processes in a cgroup. Raises FileNotFoundError if there is no such cgroup."""
    return set(map(int, (cgroup / "cgroup.procs").read_text().split()))
