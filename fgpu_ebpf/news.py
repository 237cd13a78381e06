"""What the kernel tells at once, and who is told of it.

Owns: the order in which cgroups that came, went or were entered are looked at, and the names in `fgpu events`. Never:
waits. On failure: events that were lost make it look at everything again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from fgpu_ebpf import pages, procfs
from fgpu_ebpf.enforcer import Enforcer
from fgpu_ebpf.events import Event, Events
from fgpu_ebpf.history import History
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.manager import Manager
from fgpu_ebpf.pages import Fate, News

log = logging.getLogger("fgpu.agent")
_OPERATION = {kind.value: kind.name.lower() for kind in pages.Kind}
_OF_CGROUPS = {News.MOVED, News.MADE, News.EMPTIED, News.REMOVED}


class Newsreader:
    """The only reader of the ring.

    `held` answers who holds memory by NVML: device -> pid -> bytes or "N/A"; `began` hears of programs that begin.
    """

    def __init__(
        self,
        ledger: Ledger,
        manager: Manager,
        history: History,
        orphaned: Callable[[int], None],
        held: Callable[[], Mapping[int, Mapping[int, int | None]]],
        began: Callable[[int], None],
    ) -> None:
        self._events: Events = ledger.events()
        self._ledger = ledger
        self._manager = manager
        self._enforcer: Enforcer = manager.enforcer
        self._history = history
        self._orphaned = orphaned
        self._held = held
        self._began = began
        self._lost = self._lost_so_far()

    def fileno(self) -> int:
        """Readable when there is news."""
        return self._events.fileno()

    def read(self) -> None:
        """Everything that is there."""
        events = list(self._events.read())
        for event in events:
            if event.kind not in _OF_CGROUPS:
                self._tell(event)
        self._look_at_cgroups([event for event in events if event.kind in _OF_CGROUPS])

    def lost(self) -> bool:
        """Some did not get into the ring since this was last asked."""
        before, self._lost = self._lost, self._lost_so_far()
        return self._lost > before

    def _lost_so_far(self) -> int:
        return sum(self._ledger.incidents(pages.Kind.EVENTS, fate) for fate in (Fate.FULL, Fate.RATE))

    # -- one process or level

    def _tell(self, event: Event) -> None:
        match event.kind:
            case News.PROCESS:
                self._enforcer.use(event.cgroup)
            case News.FIRST_USE:
                self._use_device(event)
            case News.EXECUTED:
                self._began(event.tgid)
            case News.ORPHANED:
                tenant = self._enforcer.get(event.cgroup)
                for level in [tenant, *self._enforcer.around(tenant)] if tenant else []:
                    self._orphaned(level.cgroup)
            case News.REFUSED:
                self._note("refused", event, pages.Reason(event.reason).name.lower(), self._bounds_met(event))
            case News.BYPASS:
                self._note("bypass", event, "no admission")
            case News.KILLED:
                self._note("killed", event, "onBypass")

    def _use_device(self, event: Event) -> None:
        try:
            lack = self._enforcer.use_device(event.cgroup, event.device)
        except OSError as error:
            log.error("a first use of device %d waits: %s", event.device, error)  # the program asks again
            return
        if lack:
            self._note("no room", event, "", lack)

    def _bounds_met(self, event: Event) -> str:
        """Which bounds of which workload refuse entries to this level; empty: it was refused for bytes."""
        tenant = self._enforcer.get(event.cgroup) if event.reason == pages.Reason.ENTRIES else None
        return "; ".join(self._enforcer.places.crowds([tenant.path])) if tenant else ""

    def _note(self, what: str, event: Event, reason: str, text: str = "") -> None:
        self._history.add(
            what, tenant=self._enforcer.name_of(event.cgroup), pid=event.tgid, gpu=event.device,
            operation=_OPERATION.get(event.operation, ""), reason=reason, bytes=event.bytes,
            text=text,
        )  # fmt: skip

    # -- cgroups

    def _look_at_cgroups(self, events: Iterable[Event]) -> None:
        """As they are now: what happened to a path in between does not matter."""
        seen: dict[str, set[News]] = {}
        for event in events:
            seen.setdefault(event.path, set()).add(event.kind)
        if not seen:
            return
        moved = [path for path, kinds in seen.items() if News.MOVED in kinds]
        for path in moved:
            self._manager.entered(path)
        self._manager.tidy(path for path, kinds in seen.items() if News.EMPTIED in kinds)
        self._manager.consider(path for path, kinds in seen.items() if kinds - {News.EMPTIED})
        self.follow(moved)

    def follow(self, paths: Iterable[str]) -> None:
        """Charges go where their processes went."""
        known = self._ledger.processes()
        holders = {pid for held in self._held().values() for pid in held}
        for path in paths:
            levels = self._enforcer.levels(path)
            for pid in self._manager.workloads.pids(path):
                if pid in known and known[pid].levels != levels:
                    self._ledger.move(pid, known[pid].generation, levels)
                    self._ledger.new_epoch()
                elif pid in holders and pid not in known and levels:
                    self._ledger.new_epoch()  # its shim believes that nobody manages it

    def follow_all(self) -> None:
        """As follow(), for every process that is charged."""
        self.follow({path for pid in self._ledger.processes() if (path := procfs.cgroup_path(pid))})
