"""The reasons why a tenant cannot be parked now: memory that the driver cannot copy, or fgpu cannot restore safely.

The reasons depend on the kinds of memory in the ledger. The parker also refuses processes that are stopped, traced or
frozen, and a copy for which the host has no room. This module runs in the agent's main loop.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fgpu_ebpf import abi
from fgpu_ebpf.check import has_host_pids
from fgpu_ebpf.driver.nvml import Nvml
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.policy.units import memory_text
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.tenant import Tenant

LEAST_DRIVER = 570
MOST_PROCESSES = 512  # the most processes in one request to the parker
PATIENCE_SECONDS = 0.5  # for an answer of NVML
_EXPORTS = abi.Seen.EXPORT | abi.Seen.POOL_EXPORT
T = TypeVar("T")


class PromptNvml:
    """The answers of NVML that parking needs; None: NVML does not answer.

    The main loop must not wait for a call that hangs. Each question runs in a thread of its own, and has no answer if
    the call takes longer than PATIENCE_SECONDS. While a call hangs, no further question is asked.
    """

    def __init__(self, nvml: Nvml) -> None:
        self._nvml, self._thread = nvml, threading.Thread()
        self.driver_version = nvml.driver_version

    def free_bytes(self, index: int) -> int | None:
        """Return the bytes of a device that no process holds."""
        return self._ask(lambda: self._nvml.free_bytes(index))

    def in_mig_mode(self, index: int) -> bool | None:
        """Return whether the device is divided into MIG instances."""
        return self._ask(lambda: self._nvml.in_mig_mode(index))

    def _ask(self, question: Callable[[], T]) -> T | None:
        if self._thread.is_alive():
            return None
        answers: list[T] = []
        self._thread = threading.Thread(target=lambda: answers.append(question()), name="nvml", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no room for a thread
            return None
        self._thread.join(PATIENCE_SECONDS)
        return answers[0] if answers else None


@dataclass(frozen=True, slots=True)
class Parkable:
    """The state of the host that determines whether a tenant can be parked.

    `is_on`: whether parking is on. `root`: the root of the cgroup hierarchy. `nvml`: None if no driver responds, so
    that no tenant can be parked. `unwitnessed`: returns the bytes by (pid, device) that no probe has recorded.
    `promised`: the bytes by device for which room is made for requests of programs (room_requests.py).
    """

    is_on: bool
    root: Path
    ledger: Ledger
    nvml: PromptNvml | None
    enforcer: Enforcer
    unwitnessed: Callable[[], Mapping[tuple[int, int], int]]
    promised: Counter[int] = field(default_factory=Counter)

    def processes_of(self, tenant: Tenant) -> dict[int, Process]:
        """Return the processes of a tenant that hold device memory, by pid."""
        found = self.ledger.processes().items()
        return {pid: p for pid, p in found if p.levels[:1] == (tenant.cgroup,) and any(p.bytes)}

    def obstacle(self, tenant: Tenant, processes: Mapping[int, Process]) -> str:
        """Return the first reason why these processes of a tenant cannot be parked, or an empty text."""
        if not self.is_on or not self.nvml:
            return "parking is off: set `parking: on` in agent.yaml"
        if not has_host_pids():
            return "the agent runs in its own pid namespace"
        if self.enforcer.has_inside(tenant.path):
            return "the target is a group: park the tenants in the group"
        if why := _amount(tenant, processes):
            return why
        version = self.nvml.driver_version.split(".")[0]
        if version.isdigit() and int(version) < LEAST_DRIVER:
            return f"driver {self.nvml.driver_version} cannot copy processes to the host: use {LEAST_DRIVER} or later"
        devices = sorted({device for process in processes.values() for device in devices_of(process)})
        if why := self.split_device(devices):
            return why
        if tenant.shares and (shared := self.ledger.times.concurrent().intersection(devices)):
            return f"gpu {min(shared)} is concurrent, and the driver cannot copy programs that use MPS"
        unwitnessed = self.unwitnessed()
        for pid, process in processes.items():
            for reason in _reasons(process, any((pid, device) in unwitnessed for device in range(abi.DEVICES))):
                return f"pid {pid} {reason}"
        return ""

    def split_device(self, devices: Iterable[int]) -> str:
        """Return a text about the first device that is, or may be, in MIG mode, or an empty text."""
        for device in devices:
            is_split = self.nvml.in_mig_mode(device) if self.nvml else False
            if is_split is None:
                return f"NVML does not report whether gpu {device} is in MIG mode"
            if is_split:
                return f"gpu {device} is in MIG mode"
        return ""

    def full_device(self, bytes_: Mapping[int, int]) -> str:
        """Return a text about the first device without room for these bytes, or an empty text if all devices have room.

        The limits do not reserve the room. The sum of limits may exceed a device, and processes without a limit use
        memory too.
        """
        for device, needed in bytes_.items():
            free = self.nvml.free_bytes(device) if self.nvml else None
            if self.nvml and (free is None or needed > free):
                has = "an unknown number of bytes" if free is None else memory_text(free)
                return f"gpu {device} has {has} free, and {memory_text(needed)} are needed"
        return ""


def by_tenant(ledger: Ledger) -> defaultdict[int, dict[int, Process]]:
    """Return all processes of the ledger, by the cgroup of the tenant and by pid."""
    found: defaultdict[int, dict[int, Process]] = defaultdict(dict)
    for pid, process in ledger.processes().items():
        for cgroup in process.levels[:1]:
            found[cgroup][pid] = process
    return found


def devices_of(process: Process) -> list[int]:
    """Return the devices on which a process is charged."""
    return [device for device, bytes_ in enumerate(process.bytes) if bytes_]


def _amount(tenant: Tenant, processes: Mapping[int, Process]) -> str:
    """Return why a tenant has too few or too many processes or bytes to be parked, or an empty text."""
    if not processes:
        return "no process of the tenant holds device memory"
    if len(processes) > MOST_PROCESSES:
        return f"more than {MOST_PROCESSES} processes of the tenant hold device memory"
    size, most = sum(sum(process.bytes) for process in processes.values()), tenant.park.most_bytes
    if most and size > most:
        return f"the tenant holds {memory_text(size)}, more than memory.park.hostMemory permits ({memory_text(most)})"
    return ""


def _reasons(process: Process, is_unwitnessed: bool) -> Iterator[str]:
    if process.is_parked:
        yield "is being parked or woken already"
    if not process.flags & abi.Seen.SHIM:
        yield "has not registered through the shim"
    elif not process.flags & abi.SEEN_CALLED:
        yield "has the shim of an earlier version, which does not block calls: restart the process"
    if process.flags & abi.Seen.BYPASS or is_unwitnessed:
        yield "has memory that was not requested through the shim"
    if any(process.managed):
        yield "has managed memory"
    if process.flags & _EXPORTS or any(process.exported):
        yield "has exported memory, which other processes may have open"
    if process.flags & abi.Seen.IMPORT:
        yield "has opened memory of other processes"
    if len(devices_of(process)) > 1:
        yield "has memory on several devices, which may be joined (multicast, peer access)"
