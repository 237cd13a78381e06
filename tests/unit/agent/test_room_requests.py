"""Requests for memory on a full device: which wait, for how long, and when each is repeated or fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.agent import room_requests
from fgpu_ebpf.agent.parked_tenant import ParkedTenant, Phase
from fgpu_ebpf.agent.room_requests import (
    DECISION_SECONDS,
    REPORT_SECONDS,
    SPARE_BYTES,
    TAKE_SECONDS,
    WAIT_SECONDS,
    RoomRequests,
)
from fgpu_ebpf.policy.rules import Park
from fgpu_ebpf.tenancy.event_log import EventLog

GIB = 1 << 30
ANN, BEN, LAB = 1, 2, 3
NAMES = {ANN: "ann", BEN: "ben", LAB: "lab"}
WAIT, GO, FAIL = WAIT_SECONDS, 0.0, None


class Host:
    """A full device, tenants with 8 GiB each in a group with 8 GiB, and a clock.

    `parks`: the result of an attempt to park a tenant.
    """

    def __init__(self) -> None:
        self.now, self.free = 100.0, {0: 0, 1: 0}
        self.parks: tuple[Phase | None, str] = Phase.PARKING, "carol is being parked"
        self.limit, self.used, self.used_by_group = 8 * GIB, 0, 0
        self.away: list[ParkedTenant] = []
        self.decisions: list[tuple[int, int, float | None]] = []
        self.lacking_bytes: list[int] = []
        self.asking: frozenset[int] = frozenset()
        self.claimant = ""
        self.history = EventLog()
        parked = SimpleNamespace(decide_on_room=lambda *said: self.decisions.append(said), entries=dict)
        ledger = SimpleNamespace(usage=self._usage, parked=parked, process=lambda pid: None)
        tenants = {
            cgroup: SimpleNamespace(cgroup=cgroup, name=name, park=Park(), observe=False)
            for cgroup, name in NAMES.items()
        }
        self.tenants = tenants
        enforcer = SimpleNamespace(name_of=NAMES.get, get=tenants.get, around=lambda tenant: [tenants[LAB]])
        self.parkable: Any = SimpleNamespace(ledger=ledger, enforcer=enforcer, promised=Counter())
        parking: Any = SimpleNamespace(parkable=self.parkable, tenants=lambda: self.away)
        maker: Any = SimpleNamespace(
            keep=lambda asking: setattr(self, "asking", asking), lacking=self._lacking, park_one=self._park_one,
            claimant=lambda devices: self.claimant,
        )  # fmt: skip
        self.requests = RoomRequests(parking, maker, self.history)

    def _usage(self, cgroup: int, devices: list[int]) -> list[Any] | None:
        used = self.used_by_group if cgroup == LAB else self.used
        return [SimpleNamespace(limit=self.limit, used=used, parked=0)] if cgroup in NAMES else None

    def _lacking(self, needs: Mapping[int, int]) -> dict[int, int]:
        return {device: n - self.free[device] for device, n in needs.items() if n > self.free[device]}

    def _park_one(self, name: str, lacking: Mapping[int, int]) -> tuple[Phase | None, str]:
        self.lacking_bytes += lacking.values()
        return self.parks

    def asks(self, cgroup: int = ANN, bytes_: int = 2 * GIB, device: int = 0) -> float | None:
        """Have a program report a request, and return the decision."""
        self.requests.ask(cgroup, device, bytes_, self.now)
        return self.last()

    def last(self) -> float | None:
        return self.decisions[-1][2]

    def is_in(self, phase: Phase, cgroup: int = ANN) -> ParkedTenant:
        """Have a tenant not run."""
        self.away = [ParkedTenant(cgroup, "ann", "/ann", {}, phase)]
        return self.away[0]

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.requests.look()

    def what(self) -> list[str]:
        return [event["what"] for event in self.history.since(0)["events"]]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host()
    monkeypatch.setattr(room_requests, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_a_request_waits_while_tenants_are_parked_and_is_repeated_when_there_is_room(host: Host) -> None:
    assert host.asks() == WAIT
    host.passes(1)
    assert host.decisions == [(ANN, 0, WAIT)] * 2
    host.free[0] = 2 * GIB
    host.passes(1)
    assert host.decisions[2:] == [(ANN, 0, GO)]
    assert host.what() == ["memory waits"]


def test_a_request_waits_no_longer_than_its_policy_permits(host: Host) -> None:
    host.tenants[ANN].park = Park(deadline_ns=30 * 10**9)
    for _ in range(30):
        assert host.asks() == WAIT
        host.passes(1)
    assert host.last() is FAIL
    assert host.what() == ["memory waits", "no room made"]
    assert "memory.park.deadline has passed: carol is being parked" in host.history.since(0)["events"][-1]["text"]
    host.passes(1)
    assert host.asks() == WAIT, "a later request has its own time"


def test_the_time_limit_of_a_request_begins_anew_when_there_was_room(host: Host) -> None:
    """A program that loads a model makes many requests, and each of them waits for a short time."""
    host.tenants[ANN].park = Park(deadline_ns=3 * 10**9)
    for _ in range(10):
        host.free[0] = 0
        assert host.asks() == WAIT
        host.passes(1)
        host.free[0] = 3 * GIB
        host.passes(0.5)
        assert host.last() == GO
        host.now += 0.5
    assert host.what() == ["memory waits"]


def test_a_request_without_a_time_limit_waits_for_as_long_as_its_program(host: Host) -> None:
    for _ in range(300):
        assert host.asks() == WAIT
        host.passes(1)


def test_a_request_fails_if_no_tenant_can_be_parked(host: Host) -> None:
    host.parks = (None, "held by carol (busy)")
    assert host.asks() is FAIL
    (event,) = host.history.since(0)["events"]
    assert (event["what"], event["tenant"], event["text"]) == ("no room made", "ann", "held by carol (busy)")
    host.passes(1)
    assert len(host.decisions) == 1


def test_a_request_that_waits_fails_when_no_further_tenant_can_be_parked(host: Host) -> None:
    host.asks()
    host.parks = (None, "held by carol (busy)")
    host.passes(1)
    assert host.last() is FAIL
    assert (host.asking, host.parkable.promised) == (frozenset(), {})


def test_a_request_is_repeated_once_if_the_device_has_room_at_once(host: Host) -> None:
    """A tenant may have freed it since. If the driver has no memory nevertheless, no tenant is parked for that."""
    host.free[0] = 2 * GIB + SPARE_BYTES
    assert host.asks() == GO
    host.now += 0.1
    assert host.asks() is FAIL
    assert host.lacking_bytes == []


def fails_with_room(host: Host) -> float | None:
    """Have the driver fail although NVML reports as many bytes as are requested, and return the second decision."""
    host.free[0] = 2 * GIB
    assert host.asks() == GO
    host.now += 0.1
    return host.asks()


def test_more_is_made_free_if_the_bytes_of_a_request_were_not_enough(host: Host) -> None:
    assert fails_with_room(host) == WAIT
    host.passes(0.1)
    assert host.last() == WAIT
    assert host.lacking_bytes == [SPARE_BYTES, SPARE_BYTES]
    assert host.parkable.promised == {0: 2 * GIB + SPARE_BYTES}
    host.free[0] += SPARE_BYTES
    host.passes(0.1)
    assert host.last() == GO
    host.now += 0.1
    assert host.asks() is FAIL


def test_a_request_is_repeated_if_less_than_that_becomes_free(host: Host) -> None:
    assert fails_with_room(host) == WAIT
    host.free[0] += 1
    host.parks = (None, "held by carol (busy)")
    host.passes(0.1)
    assert host.last() == GO
    host.now += 0.1
    assert host.asks() is FAIL


def test_a_report_from_before_there_was_room_does_not_end_the_request(host: Host) -> None:
    host.free[0] = 2 * GIB
    host.asks()
    host.now += 0.02
    assert host.asks() == GO
    assert len(host.decisions) == 1


def test_room_that_another_process_has_taken_is_made_again(host: Host) -> None:
    host.asks()
    host.free[0] = 2 * GIB
    host.passes(1)
    host.free[0] = GIB
    host.now += 0.1
    assert host.asks(bytes_=3 * GIB) == WAIT
    assert host.lacking_bytes == [2 * GIB, 2 * GIB]


@pytest.mark.parametrize("is_taken", [True, False])
def test_room_is_left_free_for_a_request_while_it_is_made_and_until_it_is_taken(host: Host, is_taken: bool) -> None:
    host.asks()
    assert host.parkable.promised == {0: 2 * GIB}
    host.free[0] = 2 * GIB
    host.passes(1)
    assert host.parkable.promised == {0: 2 * GIB}
    host.free[0] = 0 if is_taken else 2 * GIB
    host.passes(TAKE_SECONDS + 0.1)
    assert (host.parkable.promised, host.asking) == ({}, frozenset())


def test_no_room_is_left_free_for_a_request_for_which_no_tenant_was_parked(host: Host) -> None:
    """A program that lies about its requests cannot keep others from waking up."""
    host.free[0] = 2 * GIB
    host.asks()
    assert host.parkable.promised == {}


@pytest.mark.parametrize("phase", [Phase.WAKING, Phase.UNKNOWN])
def test_a_request_waits_while_another_tenant_is_being_woken_and_no_room_is_left_free_for_it(
    host: Host, phase: Phase
) -> None:
    """The state of a tenant is also unknown for a moment after each failed attempt to park or wake the tenant."""
    host.parks = (phase, "carol is being woken")
    assert host.asks() == WAIT
    assert host.parkable.promised == {}
    host.parks = (Phase.CHECKING, "dan is about to be parked")
    host.passes(0.1)
    host.parks = (phase, "carol is being woken")
    host.passes(0.1)
    assert (host.last(), host.parkable.promised) == (WAIT, {0: 2 * GIB}), "the room of dan"


def test_a_request_that_is_not_reported_any_more_is_forgotten(host: Host) -> None:
    host.asks()
    host.passes(REPORT_SECONDS - 0.5)
    assert (host.asking, host.last()) == ({ANN}, WAIT)
    host.asks()
    host.passes(REPORT_SECONDS - 0.5)
    assert host.asking == {ANN}
    host.passes(1)
    assert (host.asking, host.parkable.promised) == (frozenset(), {})


def test_no_tenant_is_parked_for_a_report_of_a_request_that_has_failed_meanwhile(host: Host) -> None:
    """The program has waited for half a second, while the agent did not run."""
    host.requests.ask(ANN, 0, 2 * GIB, host.now - DECISION_SECONDS - 0.01)
    assert (host.decisions, host.lacking_bytes, host.asking) == ([], [], frozenset())
    host.requests.ask(ANN, 0, 2 * GIB, host.now - DECISION_SECONDS + 0.01)
    assert host.last() == WAIT


def test_a_late_report_of_a_request_that_waits_counts(host: Host) -> None:
    host.asks()
    host.now += REPORT_SECONDS
    host.requests.ask(ANN, 0, 2 * GIB, host.now - 1)
    host.passes(1)
    assert host.asking == {ANN}


def test_the_largest_request_of_a_tenant_counts(host: Host) -> None:
    host.asks(bytes_=2 * GIB)
    host.asks(bytes_=3 * GIB)
    host.asks(bytes_=GIB)
    assert host.lacking_bytes == [2 * GIB, 3 * GIB, 3 * GIB]


def test_a_request_that_cannot_be_granted_does_not_make_smaller_requests_of_the_tenant_fail(host: Host) -> None:
    assert host.asks(bytes_=2 * GIB) == WAIT
    assert host.asks(bytes_=9 * GIB) == WAIT
    assert host.parkable.promised == {0: 2 * GIB}
    host.free[0] = 2 * GIB
    host.passes(0.1)
    assert host.last() == GO
    host.free[0] = 0
    host.now += 0.1
    assert host.asks(bytes_=9 * GIB) is FAIL, "the smaller request is not repeated any more"


def test_the_tenants_of_a_device_are_served_one_after_another(host: Host) -> None:
    host.asks(ANN)
    assert host.asks(BEN, 4 * GIB) == WAIT
    assert host.parkable.promised == {0: 2 * GIB}
    assert host.asks(BEN, GIB, device=1) == WAIT
    assert host.parkable.promised == {0: 2 * GIB, 1: GIB}
    assert host.lacking_bytes == [2 * GIB, GIB]
    host.free[0] = 2 * GIB
    host.passes(1)
    host.asks(BEN, 4 * GIB)
    assert host.last() == WAIT
    host.free[0] = 0
    host.passes(TAKE_SECONDS + 0.1)
    host.passes(0)
    assert host.parkable.promised[0] == 4 * GIB


def test_a_tenant_that_wakes_up_and_came_first_gets_its_room_first(host: Host) -> None:
    host.claimant = "dan"
    assert host.asks() == WAIT
    assert (host.lacking_bytes, host.parkable.promised) == ([], {})
    assert host.history.since(0)["events"][0]["text"] == "room is made for dan first"


REFUSED: dict[str, dict[str, Any]] = {
    "the tenant has no limit": {"limit": abi.NO_LIMIT},
    "the limit of ann has no room": {"used": 6 * GIB + 1},
    "the limit of lab has no room": {"used_by_group": 6 * GIB + 1},
    "the tenant is parked": {"away": [ParkedTenant(ANN, "ann", "/ann", {}, Phase.PARKED)]},
}


@pytest.mark.parametrize("why", REFUSED)
def test_no_tenant_is_parked_for_a_request_that_cannot_be_granted(host: Host, why: str) -> None:
    """A program may report any request."""
    for name, value in REFUSED[why].items():
        setattr(host, name, value)
    assert host.asks() is FAIL
    assert host.history.since(0)["events"][0]["text"] == why
    assert host.lacking_bytes == []


@pytest.mark.parametrize(("observed", "decision"), [(LAB, WAIT), (ANN, FAIL)])
def test_a_full_group_that_only_observes_refuses_no_room(host: Host, observed: int, decision: float | None) -> None:
    """The kernel admits requests beyond the limit of such a group. A tenant that only observes makes no requests."""
    host.used, host.used_by_group = (8 * GIB, 0) if observed == ANN else (0, 8 * GIB)
    host.tenants[observed].observe = True
    assert host.asks() == decision


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.PARKED])
def test_a_request_of_a_tenant_that_is_being_parked_or_woken_waits_until_it_runs(host: Host, phase: Phase) -> None:
    """It is unlocked before the agent has the parker's result, or begins to work while its calls are looked at."""
    ann = host.is_in(phase)
    assert host.asks() == WAIT
    assert ann.shall_wake, "it does not become parked while it waits"
    assert (host.lacking_bytes, host.parkable.promised) == ([], {})
    host.away = []
    host.passes(0.1)
    assert (host.last(), host.lacking_bytes) == (WAIT, [2 * GIB])


def test_a_tenant_that_does_not_run_does_not_keep_the_requests_of_others(host: Host) -> None:
    host.is_in(Phase.UNKNOWN)
    assert host.asks() == WAIT
    assert host.asks(BEN) == WAIT
    assert host.parkable.promised == {0: 2 * GIB}


def test_a_report_of_no_device_is_ignored(host: Host) -> None:
    host.requests.ask(ANN, abi.DEVICES, GIB, host.now)
    host.requests.ask(7, 0, GIB, host.now)
    assert host.decisions == [(7, 0, FAIL)], "a level that is gone"
    assert host.asking == frozenset()
