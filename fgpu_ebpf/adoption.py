"""Processes of tenants whose memory nobody saw them take: who they are, told once each in `fgpu events`.

Owns: who has been told. Never: ends a process, or tells of one twice, or of one that holds what an exec left behind.
Cannot fail: of whom NVML is silent, so are we.
"""

from __future__ import annotations

from collections.abc import Callable

from fgpu_ebpf import pages, procfs
from fgpu_ebpf.enforcer import Enforcer
from fgpu_ebpf.history import History
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.processes import Process, levels_of
from fgpu_ebpf.quantities import memory_text
from fgpu_ebpf.reconcile import Truth
from fgpu_ebpf.unwitnessed import Unwitnessed

_Who = tuple[int, int]  # pid, generation


class Adoption:
    """`truth` returns NVML's last look."""

    def __init__(
        self,
        truth: Callable[[], Truth],
        ledger: Ledger,
        enforcer: Enforcer,
        history: History,
        unwitnessed: Unwitnessed,
    ) -> None:
        self._truth = truth
        self._ledger = ledger
        self._enforcer = enforcer
        self._history = history
        self._unwitnessed = unwitnessed
        self._last: Truth | None = None
        self._told: set[_Who] = set()
        self._held: set[_Who] = set()  # at the last look

    def look(self) -> None:
        """Tells of those that are new since NVML was last asked; nothing where it was not asked since.

        Who is older than fgpu at once, others at the second look that finds them: after an exec the driver takes a
        moment to let go of what the program before it held.
        """
        truth = self._truth()
        if truth is self._last:
            return
        self._last = truth
        self._enforcer.spare_elders()
        self._enforcer.use_charged(levels_of(truth.processes))
        beyond = self._unwitnessed.find(truth.processes, truth.orphans)
        strangers = truth.strangers() | {pid for pid, _ in beyond}
        known = {pid: p for pid in strangers if (p := self._ledger.process(pid)) and p.levels}
        self._told &= {(pid, p.generation) for pid, p in known.items()}
        before, self._held = self._held, {(pid, p.generation) for pid, p in known.items() if any(p.bytes)}
        for who in self._held - self._told:
            if who in before or who[0] in self._enforcer.elders:
                self._told.add(who)
                self._tell(who[0], known[who[0]], any(pid == who[0] for pid, _ in beyond))

    def _tell(self, pid: int, process: Process, is_beyond: bool) -> None:
        tenant = self._enforcer.get(process.levels[0])
        is_elder = pid in self._enforcer.elders
        if tenant is None or procfs.ended(pid):
            return
        if process.flags & (pages.Seen.SHIM | pages.Seen.CALL) and not is_elder and not is_beyond:
            return
        for device, bytes_ in enumerate(process.bytes):
            if bytes_:
                self._history.add(
                    "adopted", tenant=tenant.name, pid=pid, gpu=device, bytes=bytes_,
                    reason="older than fgpu" if is_elder else "unwitnessed", text=self._beyond(tenant.cgroup, device),
                )  # fmt: skip

    def _beyond(self, cgroup: int, device: int) -> str:
        """By how much the tenant is beyond its limit; empty: it is not."""
        (usage,) = self._ledger.usage(cgroup, (device,)) or (None,)
        if usage is None or usage.limit == pages.NO_LIMIT or usage.used <= usage.limit:
            return ""
        return f"the tenant has {memory_text(usage.used)} of {memory_text(usage.limit)}: nothing more is admitted"
