"""Tests of agent/shortfalls.py: which tenants have too little time, by how much, and for which reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from fgpu_ebpf.agent import shortfalls
from fgpu_ebpf.agent.shortfalls import LOOKS, Shortfalls
from fgpu_ebpf.ledger.compute_maps import Key, TurnCounts
from fgpu_ebpf.tenancy.event_log import EventLog

NS = 1_000_000_000


@dataclass
class Host:
    """A clock, and counts of tenants. A test advances both."""

    now: float = 100.0
    counts: dict[Key, TurnCounts] = field(default_factory=dict)
    history: EventLog = field(default_factory=EventLog)

    def __post_init__(self) -> None:
        self.shortfalls = Shortfalls(lambda: self.counts, lambda level: f"tenant-{level}", self.history)

    def run(self, seconds: int, overruns: int = 0, **tenants: tuple[float, float, float]) -> None:
        """Advance the clock, one second at a time.

        `tenants` has the seconds that a tenant owned and waited in each second, and its entitlement as a ratio.
        `overruns` is the number for each tenant in each second.
        """
        for _ in range(seconds):
            self.now += 1
            for name, (owned, waited, entitled) in tenants.items():
                key = int(name[1:]), 0
                before = self.counts.get(key, TurnCounts())
                self.counts[key] = TurnCounts(
                    owned_ns=before.owned_ns + int(owned * NS),
                    wait_ns=before.wait_ns + int(waited * NS),
                    overruns=before.overruns + overruns,
                    entitled_millionths=int(entitled * 1_000_000),
                )
            self.shortfalls.look()

    def found(self) -> dict[Key, float]:
        return {key: round(shortfall.ratio, 3) for key, shortfall in self.shortfalls.found.items()}

    def told(self) -> list[tuple[str, str]]:
        return [(event["tenant"], event["what"]) for event in self.history.since(0)["events"]]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host()
    monkeypatch.setattr(shortfalls.time, "monotonic", lambda: made.now)
    return made


def test_a_tenant_that_gets_its_entitlement_is_not_named(host: Host) -> None:
    host.run(30, t1=(0.74, 0.25, 0.75), t2=(0.25, 0.74, 0.25))
    assert host.found() == {}
    assert host.told() == []


def test_a_tenant_below_its_entitlement_is_reported_with_the_tenant_that_had_more(host: Host) -> None:
    host.run(LOOKS, t1=(0.55, 0.45, 0.75), t2=(0.45, 0.55, 0.25))
    assert host.found() == {}, "ten seconds have not passed"
    host.run(2, t1=(0.55, 0.45, 0.75), t2=(0.45, 0.55, 0.25))
    assert host.found() == {(1, 0): 0.2}
    why = "had 55.0% in 10 s, entitled to 75.0%; tenant-2 had 45.0%, entitled to 25.0%"
    assert host.shortfalls.found[1, 0].why == why
    assert host.told() == [("tenant-1", "short of time")]


def test_a_shortfall_ends_when_the_tenant_gets_its_entitlement(host: Host) -> None:
    host.run(12, t1=(0.55, 0.45, 0.75), t2=(0.45, 0.55, 0.25))
    host.run(10, t1=(0.75, 0.25, 0.75), t2=(0.25, 0.75, 0.25))
    assert host.found() == {}


def test_work_in_flight_after_turns_is_given_as_the_reason(host: Host) -> None:
    host.run(12, overruns=3, t1=(0.2, 0.8, 0.5), t2=(0.8, 0.2, 0.5))
    assert host.shortfalls.found[1, 0].why.endswith(
        "tenant-2 had 80.0%, entitled to 50.0%, and 30 of its turns ended with work in flight"
    )


def test_time_that_no_tenant_had_is_reported(host: Host) -> None:
    host.run(12, t1=(0.3, 0.7, 0.5), t2=(0.3, 0.7, 0.5))
    assert host.found() == {(1, 0): 0.2, (2, 0): 0.2}
    assert "lost between turns" in host.shortfalls.found[1, 0].why


def test_a_tenant_that_seldom_waits_is_not_short_of_time(host: Host) -> None:
    host.run(12, t1=(0.2, 0.1, 0.75), t2=(0.8, 0.2, 0.25))
    assert host.found() == {}


def test_an_unfinished_wait_is_counted(host: Host) -> None:
    host.run(1, t1=(0.0, 0.0, 0.5), t2=(1.0, 0.0, 0.5))
    waits = TurnCounts(entitled_millionths=500_000, since_ns=int(host.now * NS))
    for _ in range(LOOKS + 1):
        host.counts[1, 0] = waits
        host.run(1, t2=(1.0, 0.0, 0.5))
    assert host.found() == {(1, 0): 0.5}


def one_that_is_alone(host: Host) -> None:
    host.counts[1, 0] = TurnCounts(free=1)


def one_that_is_anothers(host: Host) -> None:
    host.counts[1, 0] = TurnCounts()


def one_that_is_gone(host: Host) -> None:
    del host.counts[1, 0]


@pytest.mark.parametrize("change", [one_that_is_alone, one_that_is_anothers, one_that_is_gone])
def test_time_before_a_change_is_not_counted(host: Host, change: Callable[[Host], None]) -> None:
    host.run(12, t1=(0.55, 0.45, 0.75), t2=(0.45, 0.55, 0.25))
    change(host)
    host.run(1, t2=(0.45, 0.55, 0.25))
    assert host.found() == {}
    host.run(LOOKS - 1, t1=(0.55, 0.45, 0.75), t2=(0.45, 0.55, 0.25))
    assert host.found() == {}
    host.run(2, t1=(0.55, 0.45, 0.75), t2=(0.45, 0.55, 0.25))
    assert host.found() == {(1, 0): 0.2}
