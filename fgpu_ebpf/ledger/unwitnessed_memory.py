"""Search for memory that NVML shows for a process although no probe has recorded its allocation.

Contexts, modules and imports explain a part of such memory. The driver allocates contexts and modules by itself.
Imports are memory of other processes: NVML shows exported memory in the row of the exporter and, after the exporter has
freed this memory or exited, in the row of an importer. If a tenant's process has more memory than these parts explain,
the process uses a driver library that is not probed, with or without the shim.

This module runs in the agent's main thread.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.orphans import Orphan
from fgpu_ebpf.ledger.process_entry import Process

LOOKS = 4  # an importer's row grows by the bytes that an exporter has freed within this number of passes


class Unwitnessed:
    """Search for memory that is not explained, over successive passes of the reconciliation.

    Args:
        contexts: bytes of one context by ledger index.
        modules: bytes that a process's code and data may take on a device; NVML shows these bytes, and no probed call
            allocates these bytes.
    """

    def __init__(self, contexts: Mapping[int, int], modules: int) -> None:
        self._contexts = contexts
        self.modules = modules
        self._last: Mapping[int, Process] | None = None
        self._found: Mapping[tuple[int, int], int] = {}
        self._exported: Counter[tuple[int, int, int]] = Counter()  # by (pid, generation, device)
        self._freed: deque[Counter[int]] = deque(maxlen=LOOKS)  # exported bytes that exporters have freed, by device
        self._kept: dict[tuple[int, int, int], int] = {}  # by (pid, generation, device): bytes that an importer keeps

    def find(self, processes: Mapping[int, Process], orphans: Iterable[Orphan]) -> Mapping[tuple[int, int], int]:
        """Return the unexplained bytes by (pid, device) of all processes that have unexplained bytes.

        A process that has imported memory may hold three kinds of memory: memory that other processes export, memory
        that exited processes have exported, and memory that exporters have freed while this process had the memory
        open.

        Args:
            processes: the ledger's processes, a new mapping for each pass.
            orphans: the ledger's orphans.
        """
        if processes is not self._last:
            self._look(processes, self._exports(processes, orphans))
            found = {
                (pid, device): self._beyond(pid, process, device) - self._importable(pid, process, device)
                for pid, process in processes.items()
                for device in self._contexts
            }
            self._found = {where: bytes_ for where, bytes_ in found.items() if bytes_ > 0}
        return self._found

    def _exports(self, processes: Mapping[int, Process], orphans: Iterable[Orphan]) -> Counter[tuple[int, int, int]]:
        found: Counter[tuple[int, int, int]] = Counter()
        for pid, process in processes.items():
            for device in self._contexts:
                if bytes_ := _exported(process, device):
                    found[pid, process.generation, device] = bytes_
        for orphan in orphans:
            found[orphan.tgid, orphan.generation, orphan.device] += orphan.bytes
        return found

    def _look(self, processes: Mapping[int, Process], exported: Counter[tuple[int, int, int]]) -> None:
        """Record the memory that exporters have freed since the last pass, and assign this memory to importers."""
        is_first = self._last is None
        freed: Counter[int] = Counter()
        for (_, _, device), bytes_ in (self._exported - exported).items():
            freed[device] += bytes_
        self._freed.append(freed)
        self._last, self._exported = processes, exported
        before, self._kept = self._kept, {}
        for pid, process in processes.items():
            if process.flags & abi.Seen.IMPORT:
                for device in self._contexts:
                    key = pid, process.generation, device
                    beyond = max(0, self._beyond(pid, process, device))
                    kept = min(before.get(key, 0), beyond)
                    # At the first pass, all memory of an importer counts as kept: an earlier agent has examined it.
                    more = beyond if is_first else self._take(device, beyond - kept)
                    self._kept[key] = kept + more

    def _take(self, device: int, bytes_: int) -> int:
        """Return how many of these bytes exporters have freed, and subtract this number from the freed bytes.

        Therefore the bytes are assigned to one importer only.
        """
        taken = 0
        for freed in self._freed:
            part = min(bytes_ - taken, freed[device])
            freed[device] -= part
            taken += part
        return taken

    def _importable(self, pid: int, process: Process, device: int) -> int:
        if not process.flags & abi.Seen.IMPORT:
            return 0
        others = sum(
            bytes_ for (other, generation, its), bytes_ in self._exported.items()
            if its == device and (other, generation) != (pid, process.generation)
        )  # fmt: skip
        return others + self._kept.get((pid, process.generation, device), 0)

    def _beyond(self, pid: int, process: Process, device: int) -> int:
        return process.overhead[device] - process.contexts[device] * self._contexts[device] - self.modules


def _exported(process: Process, device: int) -> int:
    """Return how many bytes of a process's memory other processes may have open."""
    if process.flags & abi.Seen.EXPORT:  # the process has exported memory that has no entry
        return process.bytes[device]
    return process.exported[device] + (process.pool[device] if process.flags & abi.Seen.POOL_EXPORT else 0)
