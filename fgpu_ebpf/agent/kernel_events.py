"""The dispatch of the events of the kernel's ring buffer.

This module runs in the agent's main loop. The module makes the manager examine cgroups that were created, emptied,
removed or entered, moves the charges of processes that have entered another cgroup, and adds refusals, bypasses and
kills to the event log. KernelEvents.lost() returns the cgroups whose events were lost and which must be scanned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice

from fgpu_ebpf import abi
from fgpu_ebpf.abi import Fate, News
from fgpu_ebpf.driver import device_nodes
from fgpu_ebpf.driver.bypass_reason import Reason, Then
from fgpu_ebpf.ledger.event_budgets import EventBudgets
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.ring_buffer import Event, Events
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.manager import Manager

log = logging.getLogger("fgpu.agent")
_OPERATION = {kind.value: kind.name.lower() for kind in abi.Kind}
MOST_AT_ONCE = 64  # events per call of read(), so that the main loop serves other descriptors in between
_OF_BYPASSES = {News.BYPASS: ("bypass", "no admission"), News.KILLED: ("killed", "onBypass")}
_OF_CGROUPS = {News.MOVED, News.MADE, News.EMPTIED, News.REMOVED}


class KernelEvents:
    """The only reader of the ring buffer.

    Args:
        orphaned: called with the cgroup id of a level that has orphaned bytes.
        held: returns the memory of processes according to NVML: device -> pid -> bytes or None.
        began: called with the pid of a process that has executed a program.
        explain: lets a worker find the reason why a process has no shim, and calls a function with the reason. The
            result is False if all workers are busy.
    """

    def __init__(
        self,
        ledger: Ledger,
        manager: Manager,
        history: EventLog,
        orphaned: Callable[[int], None],
        held: Callable[[], Mapping[int, Mapping[int, int | None]]],
        began: Callable[[int], None],
        explain: Callable[[int, Then], bool],
    ) -> None:
        self._events: Events = ledger.events()
        self._budgets = EventBudgets(ledger.event_budgets, manager.enforcer.places.owner)
        self._ledger = ledger
        self._manager = manager
        self._enforcer: Enforcer = manager.enforcer
        self._history = history
        self._orphaned = orphaned
        self._held = held
        self._began, self._explain = began, explain
        self.lacks: Callable[[int, int, int, float], object] = lambda *_: None
        """Called with tenant, device, bytes and time of a request that waits, for which the driver has no memory."""
        self._full = ledger.incidents(abi.Kind.EVENTS, Fate.FULL)
        self._is_scan_due = False

    def fileno(self) -> int:
        """Return a descriptor that is readable when there are events."""
        return self._events.fileno()

    def read(self) -> None:
        """Handle the oldest MOST_AT_ONCE events. If more events are queued, the descriptor stays readable.

        If the handling of an event fails, all other events are handled, and then the first OSError is raised.
        """
        events = list(islice(self._events.read(), MOST_AT_ONCE))
        errors = []
        for event in events:
            if event.kind not in _OF_CGROUPS:
                try:
                    self._dispatch(event)
                except OSError as error:
                    errors.append(error)
        of_cgroups = [event for event in events if event.kind in _OF_CGROUPS]
        try:
            self._budgets.note(event.path for event in of_cgroups)
            self._look_at_cgroups(of_cgroups)
        except OSError as error:
            errors.append(error)
            self._is_scan_due = True  # of all cgroups
        if errors:
            raise errors[0]

    def lost(self) -> list[str]:
        """Return the paths of workloads whose cgroup events were lost since the last call.

        An empty path means all cgroups of the host.
        """
        before, self._full = self._full, self._ledger.incidents(abi.Kind.EVENTS, Fate.FULL)
        self._is_scan_due |= self._full > before
        lost = self._budgets.lost()
        is_due, self._is_scan_due = self._is_scan_due, False
        return [*lost, ""] if is_due and "" not in lost else lost

    # -- one process or level

    def _dispatch(self, event: Event) -> None:
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
                self._note("refused", event, abi.Reason(event.reason).name.lower(), self._bounds_met(event))
            case News.BYPASS | News.KILLED:
                what, reason = _OF_BYPASSES[event.kind]
                self._note(what, event, reason)
            case News.LACKS:
                self.lacks(event.cgroup, event.device, event.bytes, event.at_ns / 1e9)
            case News.OPEN:
                self._note_open(event)

    def _use_device(self, event: Event) -> None:
        try:
            shortage = self._enforcer.use_device(event.cgroup, event.device)
        except OSError as error:
            text = "a limit cannot be written at the tenant's first use of device %d; the program tries again: %s"
            log.error(text, event.device, error)
            return
        if shortage:
            self._note("no room", event, "", shortage)

    def _note_open(self, event: Event) -> None:
        """Report a refused open of a device node. A worker thread reads the process's files to find the reason."""
        add = partial(self._add_open, event)
        if not self._explain(event.tgid, add):
            add(None, "")

    def _add_open(self, event: Event, why: Reason | None, _loader: str) -> None:
        node = device_nodes.name(event.bytes >> 32, event.bytes & 0xFFFFFFFF)
        words = why.words if why else "the process has exited, so that the reason is unknown"
        self._history.add(
            "denied", tenant=self._enforcer.name_of(event.cgroup), pid=event.tgid, reason=why or "",
            text=f"a process that does not use the shim may not open {node}: {words}",
        )  # fmt: skip

    def _bounds_met(self, event: Event) -> str:
        """Return the bounds because of which the event's level was refused entries.

        The result is empty for other refusals.
        """
        tenant = self._enforcer.get(event.cgroup) if event.reason == abi.Reason.ENTRIES else None
        return "; ".join(self._enforcer.places.crowds([tenant.path])) if tenant else ""

    def _note(self, what: str, event: Event, reason: str, text: str = "") -> None:
        self._history.add(
            what, tenant=self._enforcer.name_of(event.cgroup), pid=event.tgid, gpu=event.device,
            operation=_OPERATION.get(event.operation, ""), reason=reason, bytes=event.bytes,
            text=text,
        )  # fmt: skip

    # -- cgroups

    def _look_at_cgroups(self, events: Iterable[Event]) -> None:
        """Examine the present state of each cgroup of these events once, whatever the order of the events."""
        seen: dict[str, set[News]] = {}
        for event in events:
            seen.setdefault(event.path, set()).add(event.kind)
        if not seen:
            return
        moved = [path for path, kinds in seen.items() if News.MOVED in kinds]
        for path in moved:
            self._manager.entered(path)
        self._manager.remove_empty(path for path, kinds in seen.items() if News.EMPTIED in kinds)
        self._manager.consider(path for path, kinds in seen.items() if kinds - {News.EMPTIED})
        self.follow(moved)

    def follow(self, paths: Iterable[str]) -> None:
        """Move the charges of the processes in these cgroups to the present levels of the processes."""
        known = self._ledger.processes()
        holders = {pid for held in self._held().values() for pid in held}
        for path in paths:
            levels = self._enforcer.levels(path)
            for pid in self._manager.workloads.pids(path):
                if pid in known and known[pid].levels != levels:
                    if self._ledger.move(pid, known[pid].generation, levels):
                        self._ledger.new_epoch()
                elif pid in holders and pid not in known and levels:
                    self._ledger.new_epoch()  # the shim is registered as unmanaged and has to register again

    def charged(self) -> list[int]:
        """Return the pids of all charged processes."""
        return [*self._ledger.processes()]
