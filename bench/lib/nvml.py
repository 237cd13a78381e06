"""What NVML says of device 0 and its processes, for the benchmarks. After nvmlInit(). Raises NVMLError."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pynvml


def device() -> object:
    """NVML's handle of it."""
    return pynvml.nvmlDeviceGetHandleByIndex(0)


def bytes_in_use() -> int:
    """Memory in use."""
    return int(pynvml.nvmlDeviceGetMemoryInfo(device()).used)


def bytes_by_pid() -> Mapping[int, int]:
    """What NVML shows of each process, by host pid."""
    return {p.pid: p.usedGpuMemory or 0 for p in pynvml.nvmlDeviceGetComputeRunningProcesses(device())}


def bytes_of(pids: set[int]) -> int:
    """What it shows of these processes."""
    return sum(bytes_ for pid, bytes_ in bytes_by_pid().items() if pid in pids)


def pids_of(cgroup: Path) -> set[int]:
    """The processes in a cgroup. FileNotFoundError: there is none."""
    return set(map(int, (cgroup / "cgroup.procs").read_text().split()))
