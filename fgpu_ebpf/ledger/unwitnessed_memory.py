"""Memory that NVML shows for a process and that no probe has seen allocated, beyond what the driver takes by itself.

A process of a tenant that has more than contexts and modules explain uses a driver library that is not probed, with or
without the shim. Pure functions, used by the agent's reconcile thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.orphans import Orphan
from fgpu_ebpf.ledger.process_entry import Process

MODULES_BYTES = 1 << 30  # code and data that a program may load: NVML shows them, and no call reports them before


class Unwitnessed:
    """`contexts`: bytes of one context by ledger index. `modules`: bytes that a process's code and data may take."""

    def __init__(self, contexts: Mapping[int, int], modules: int = MODULES_BYTES) -> None:
        self._contexts = contexts
        self._modules = modules

    def find(self, processes: Mapping[int, Process], orphans: Iterable[Orphan]) -> dict[tuple[int, int], int]:
        """Return bytes by (pid, device) for processes that have more memory than can be explained.

        A process that has opened memory of others may have all that other processes export, or have exported before
        their end.
        """
        exported = {d: sum(p.exported[d] for p in processes.values()) for d in self._contexts}
        for orphan in orphans:
            if orphan.device in exported:
                exported[orphan.device] += orphan.bytes
        found = {
            (pid, device): self._beyond(process, device, exported[device] - process.exported[device])
            for pid, process in processes.items()
            for device in self._contexts
        }
        return {where: bytes_ for where, bytes_ in found.items() if bytes_ > 0}

    def _beyond(self, process: Process, device: int, importable: int) -> int:
        imported = importable if process.flags & abi.Seen.IMPORT else 0
        contexts = process.contexts[device] * self._contexts[device]
        return process.overhead[device] - contexts - imported - self._modules
