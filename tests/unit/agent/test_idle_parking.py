"""The signs of work, the attempts to park a tenant that cannot be parked, and the idle times that users see."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.agent import idle_parking
from fgpu_ebpf.agent.idle_parking import BUSY, NAME, STAY_SECONDS, IdleParking
from fgpu_ebpf.agent.nvml_reconcile import STALE_SECONDS
from fgpu_ebpf.agent.parked_tenant import LOST_SECONDS, Errand, Goal, ParkedTenant, Phase
from fgpu_ebpf.agent.parking import ParkingError
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.ledger.usage_pages import Usage
from fgpu_ebpf.policy.rules import Park
from fgpu_ebpf.tenancy.event_log import EventLog

AFTER, PID = 10, 4711
ZERO = (0,) * abi.DEVICES


def process(device: int = 0, **more: Any) -> Process:
    bytes_ = tuple(64 << 20 if index == device else 0 for index in range(abi.DEVICES))
    return replace(Process(1001, (7,), abi.Seen.SHIM, 3, True, bytes_, ZERO, ZERO, ZERO, ZERO, begun=3), **more)


class Host:
    """An agent with tenants that hold memory, on a clock of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cgroups: tuple[int, ...] = (7,), is_on: bool = True) -> None:
        self.now, self.history, self.checks = 1000.0, EventLog(), dict[str, Any]()
        self.tenants = {
            cgroup: SimpleNamespace(name=f"t{cgroup}", cgroup=cgroup, policy="notebooks", park=Park(AFTER * 10**9))
            for cgroup in cgroups
        }
        self.processes = {PID + cgroup: process(levels=(cgroup,)) for cgroup in cgroups}
        self.usage = Usage(1 << 30, 64 << 20, 64 << 20, 0, 64 << 20, 64 << 20, 0)
        self.percent: Any = {0: {}}
        self.stale = 0.0
        self.away: set[int] = set()
        self.asked: list[tuple[str, str]] = []
        self.errands: dict[int, Errand] = {}
        self.parked: dict[int, ParkedTenant] = {}
        self.obstacle = ""
        enforcer = type("Enforcer", (), {"__iter__": lambda _: iter(self.tenants.values())})()
        ledger = SimpleNamespace(processes=lambda: self.processes, usage=lambda _: [self.usage])
        parkable = SimpleNamespace(
            ledger=ledger, enforcer=enforcer, is_on=is_on, obstacle=lambda *_: self.obstacle,
            processes_of=lambda _: self.processes,
        )  # fmt: skip
        parking: Any = SimpleNamespace(
            parkable=parkable,
            park=self._park,
            is_away=self.away.__contains__,
            view=lambda _: None,
            tenants=self.parked.values,
        )
        monkeypatch.setattr(idle_parking.time, "monotonic", lambda: self.now)
        self.idle = IdleParking(parking, self._truth, self.history, self.checks)

    def _truth(self) -> Any:
        return SimpleNamespace(percent=self.percent, sampled=self.now - self.stale)

    def _park(self, tenant: Any, why: str) -> Errand:
        self.asked.append((tenant.name, why))
        if self.obstacle:
            raise ParkingError(self.obstacle)
        parked = ParkedTenant(tenant.cgroup, tenant.name, "/t", {}, Phase.PARKING, since=self.now)
        self.parked[tenant.cgroup] = parked
        self.errands[tenant.cgroup] = Errand(1, Goal.PARK, tenant.name, 64 << 20)
        return self.errands[tenant.cgroup]

    def idles(self, seconds: int = AFTER + 1) -> list[tuple[str, str]]:
        """Let time pass, with a round each second. Return the tenants that were parked meanwhile."""
        self.asked.clear()
        for _ in range(seconds):
            self.idle.look()
            self.now += 1
        return list(self.asked)

    def works(self, how: str) -> None:
        """Let the program do something that the ledger shows."""
        if how == "a call":
            self.usage = self.usage._replace(called_ns=self.usage.called_ns + 1)
        elif how == "a refusal":
            self.usage = self.usage._replace(refused=self.usage.refused + 1)
        elif how == "a new process":
            self.processes[max(self.processes) + 1] = process(bytes=ZERO)
        else:
            pid = next(iter(self.processes))
            self.processes[pid] = replace(self.processes[pid], changes=self.processes[pid].changes + 1)

    def texts(self) -> list[str]:
        return [f"{event['what']}: {event['text']}" for event in self.history.since(0)["events"]]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch)


def test_an_idle_tenant_is_parked_once(host: Host) -> None:
    assert host.idles() == [("t7", "idle for 10 s")]
    assert host.idles() == [], "it is being parked"


@pytest.mark.parametrize("how", ["a call", "a refusal", "a new process", "a change"])
def test_a_tenant_that_works_once_per_half_of_the_time_is_never_parked(host: Host, how: str) -> None:
    for _ in range(20):
        assert host.idles(AFTER // 2) == []
        host.works(how)
    assert host.idles()


@pytest.mark.parametrize("percent", [{0: {PID + 7: 1}}, {0: None}, {}])
def test_a_tenant_that_runs_kernels_or_of_which_nothing_is_known_is_busy(host: Host, percent: Any) -> None:
    host.percent = percent
    assert host.idles(5 * AFTER) == []
    host.percent = {0: {9999: 100}}
    assert host.idles()


def test_a_sample_that_is_too_old_tells_nothing(host: Host) -> None:
    host.stale = STALE_SECONDS + 1
    assert host.idles(5 * AFTER) == []


def test_a_tenant_without_memory_or_without_such_a_policy_is_not_parked(host: Host) -> None:
    host.processes = {PID: process(bytes=ZERO)}
    assert host.idles(5 * AFTER) == []
    host.processes = {PID: process()}
    host.tenants[7].park = Park(0)
    assert host.idles(5 * AFTER) == []


def test_a_tenant_that_is_woken_stays_for_its_time(host: Host) -> None:
    host.idles()
    host.errands[7].finish(1.5)
    host.away.add(7)
    assert host.idles(100) == []
    host.away.clear()
    host.works("a change")
    assert host.idles(AFTER) == []
    assert host.idles(1) == [("t7", "idle for 10 s")]


def test_a_tenant_that_is_parked_and_woken_between_two_looks_stays_for_its_time(host: Host) -> None:
    host.idles()
    host.errands[7].finish(0.1)
    view = host.idle.view(host.tenants[7])
    assert view
    assert view.idle_seconds is None
    assert host.idles(AFTER) == []
    assert host.idles(1) == [("t7", "idle for 10 s")]


def test_one_tenant_of_a_device_is_parked_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, (7, 8, 9))
    host.processes[PID + 9] = process(device=1, levels=(9,))
    host.percent = {0: {}, 1: {}}
    assert [name for name, _ in host.idles()] == ["t7", "t9"]
    host.errands[7].finish(1.0)
    host.away.add(7)
    assert [name for name, _ in host.idles(1)] == ["t8"]


def test_a_refused_tenant_is_tried_more_rarely_and_reported_once(host: Host) -> None:
    host.obstacle = "pid 4718 has managed memory"
    assert [why for _, why in host.idles(200)] == [f"idle for {seconds} s" for seconds in (10, 30, 70, 150)]
    assert host.texts() == ["not parked: pid 4718 has managed memory"]
    assert "cannot be parked now: pid 4718 has managed memory" in host.idle.explain(host.tenants[7])
    host.obstacle = "pid 4718 has exported memory"
    host.idles(400)
    assert host.texts()[1:] == ["not parked: pid 4718 has exported memory"]


def test_an_attempt_that_fails_later_counts_as_a_refusal(host: Host) -> None:
    host.idles()
    host.errands[7].finish(0.0, "thread 5 of pid 4718 is in a call of the driver")
    host.works("a change")  # the attempt itself changes the ledger's entry
    assert host.idles(AFTER) == []
    assert host.texts() == ["not parked: thread 5 of pid 4718 is in a call of the driver"]
    assert "at the last attempt: thread 5 of pid 4718" in host.idle.explain(host.tenants[7])
    assert host.idles(2 * AFTER)


def test_attempts_that_fail_later_become_rarer_and_are_reported_once(host: Host) -> None:
    attempts = []
    for second in range(300):
        if host.idles(1):
            attempts.append(second)
            host.works("a change")
            host.idles(3)  # the attempt takes some time
            host.away.discard(7)
            host.works("a change")
            host.errands[7].finish(0.0, f"thread {second} of pid 4718 is in a call of the driver")
    pauses = [later - earlier for earlier, later in itertools.pairwise(attempts)]
    assert pauses == sorted(pauses)
    assert pauses[1] > 1.5 * pauses[0]
    assert len(host.texts()) == 1


def hindrance(host: Host) -> str:
    return host.idle.hindrance(host.now, host.tenants[7], host.processes)


def test_an_idle_tenant_may_be_parked_for_others_before_its_time(host: Host) -> None:
    host.tenants[7].park = Park(3600 * 10**9)
    assert host.idles(int(STAY_SECONDS)) == []
    assert hindrance(host) == "", "it was idle for STAY_SECONDS"
    host.works("a call")
    assert hindrance(host) == BUSY, "the call is seen at once"
    host.idles(int(STAY_SECONDS))
    assert hindrance(host) == ""


def test_a_process_without_memory_is_no_hindrance_and_its_end_is_a_sign_of_work(host: Host) -> None:
    host.tenants[7].park = Park(3600 * 10**9)
    host.processes[PID] = process(bytes=ZERO, levels=(7,))
    host.idles(int(STAY_SECONDS) + 1)
    assert hindrance(host) == ""
    del host.processes[PID]
    assert hindrance(host) == BUSY


def test_a_woken_tenant_stays_for_its_time_if_others_wait(host: Host) -> None:
    host.idles()
    host.errands[7].finish(1.5)
    host.away.add(7)
    host.idles(100)
    assert hindrance(host)
    host.away.clear()
    host.works("a change")
    host.idles(int(STAY_SECONDS) - 1)
    assert hindrance(host) == BUSY
    host.idles(1)
    assert not hindrance(host)


@pytest.mark.parametrize("why", ["no policy", "an obstacle", "a kernel", "an old sample", "no looks"])
def test_a_tenant_that_must_stay_is_not_parked_for_others(host: Host, why: str) -> None:
    host.tenants[7].park = Park(3600 * 10**9)
    host.idles(int(STAY_SECONDS) + 1)
    assert not hindrance(host)
    if why == "no policy":
        host.tenants[7].park = Park(0)
        assert hindrance(host) == "the policy does not park the tenant"
    elif why == "an obstacle":
        host.obstacle = "pid 4718 has managed memory"
        assert hindrance(host) == host.obstacle
    elif why == "a kernel":
        host.percent = {0: {PID + 7: 1}}
    elif why == "an old sample":
        host.stale = STALE_SECONDS + 1
    else:
        host.now += 10
    assert hindrance(host)


@pytest.mark.parametrize(
    ("phase", "seconds", "begins"),
    [
        (Phase.PARKING, LOST_SECONDS + 1, False),
        (Phase.UNKNOWN, LOST_SECONDS - 1, False),
        (Phase.UNKNOWN, LOST_SECONDS + 1, True),
        (Phase.WAITING, 0, True),
    ],
)
def test_another_tenant_is_parked_if_the_result_of_an_attempt_stays_unknown(
    monkeypatch: pytest.MonkeyPatch, phase: Phase, seconds: float, begins: bool
) -> None:
    host = Host(monkeypatch, cgroups=(7, 8))
    assert host.idle.begin(host.now, host.tenants[7], host.processes)
    host.parked[7].phase = phase
    host.now += seconds
    assert host.idle.begin(host.now, host.tenants[8], host.processes) == begins


def test_an_attempt_for_others_that_fails_is_repeated_more_and_more_rarely(host: Host) -> None:
    host.tenants[7].park = Park(3600 * 10**9)
    tried = []
    for second in range(200):
        host.idle.look()
        host.now += 1
        if not hindrance(host):
            tried.append(second)
            assert host.idle.begin(host.now, host.tenants[7], host.processes, ", to make room for bob")
            assert not host.idle.begin(host.now, host.tenants[7], host.processes), "it is being parked"
            host.errands[7].finish(0.0, "thread 5 of pid 4718 is in a call of the driver")
            assert "at the last attempt: thread 5 of pid 4718" in hindrance(host)
    assert host.asked[0] == ("t7", "idle for 10 s, to make room for bob")
    pauses = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert len(pauses) >= 3
    assert all(later > 1.5 * earlier for earlier, later in itertools.pairwise(pauses))


def test_users_see_the_idle_time_and_when_the_tenant_is_parked(host: Host) -> None:
    host.idles(6)
    view = host.idle.view(host.tenants[7])
    assert view
    assert (view.state, view.after_seconds, view.idle_seconds, view.parked_in_seconds) == ("running", 10, 6, 4)
    said = host.idle.explain(host.tenants[7])
    assert (
        said == "can be parked while no call is running; idle for 6 s, will be parked in 4 s if the tenant stays idle"
    )


def test_a_policy_without_effect_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, is_on=False)
    assert host.idles() == []
    assert "parking is off (notebooks)" in host.checks[NAME].found
    assert "set `parking: on`" in host.idle.explain(host.tenants[7])
    host.tenants.clear()
    host.idles(1)
    assert NAME not in host.checks
