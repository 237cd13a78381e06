"""Events on a host that is short of memory or files. Kernel, manager and event log are models."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf.abi import News
from fgpu_ebpf.agent import kernel_events
from fgpu_ebpf.agent.kernel_events import KernelEvents
from fgpu_ebpf.ledger.ring_buffer import Event
from fgpu_ebpf.tenancy.event_log import EventLog

PROCESS = Event(1, News.PROCESS, 7, 1, 0, 0, 0, 0)
REFUSED = Event(2, News.REFUSED, 8, 2, 4096, 0, 0, 0)
MADE = Event(3, News.MADE, 0, 0, 0, 0, 0, 0, "/x")


class Host:
    """The objects that KernelEvents calls. `short`: the names of the calls that fail with ENFILE."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.short: set[str] = set()
        self.considered: list[str] = []
        self.history = EventLog()
        self.queued: list[Event] = []
        budgets = SimpleNamespace(note=lambda paths: list(paths), lost=self._lost)
        monkeypatch.setattr(kernel_events, "EventBudgets", lambda *_: budgets)
        enforcer = SimpleNamespace(
            places=SimpleNamespace(owner=None),
            use=lambda _: self._fails("use"),
            get=lambda _: None,
            name_of=lambda _: "tenant",
        )
        manager = SimpleNamespace(
            enforcer=enforcer, entered=None, remove_empty=lambda paths: list(paths), consider=self._consider
        )
        ledger = SimpleNamespace(
            events=lambda: SimpleNamespace(read=lambda: self.queued),
            event_budgets=0,
            incidents=lambda *_: 0,
            processes=dict,
        )
        made: Any = KernelEvents
        self.events: KernelEvents = made(ledger, manager, self.history, None, dict, None, lambda *_: True)

    def _fails(self, call: str) -> None:
        if call in self.short:
            raise OSError(errno.ENFILE, "Too many open files in system")

    def _lost(self) -> list[str]:
        self._fails("lost")
        return []

    def _consider(self, paths: Iterable[str]) -> None:
        self._fails("consider")
        self.considered += paths

    def read(self, *events: Event) -> None:
        self.queued = list(events)
        self.events.read()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_the_other_events_are_handled_if_the_handler_of_one_fails(host: Host) -> None:
    host.short = {"use"}
    with pytest.raises(OSError, match="Too many open files"):  # the agent counts the failures of its main loop
        host.read(PROCESS, REFUSED, MADE)
    assert [event["what"] for event in host.history.since(0)["events"]] == ["refused"]
    assert host.considered == ["/x"]
    assert host.events.lost() == []


def test_all_cgroups_are_scanned_once_if_the_cgroups_of_events_cannot_be_examined(host: Host) -> None:
    host.short = {"consider", "lost"}
    with pytest.raises(OSError, match="Too many open files"):
        host.read(MADE)
    with pytest.raises(OSError, match="Too many open files"):
        host.events.lost()
    host.short = set()
    assert host.events.lost() == [""]
    assert host.events.lost() == []
