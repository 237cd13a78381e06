"""Idle tenants are parked for one that wakes up: which, in which order, and what is said if none can be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.agent import making_room
from fgpu_ebpf.agent.making_room import MOST_NAMES, RoomMaker
from fgpu_ebpf.agent.parked_tenant import LOST_SECONDS, ParkedTenant, Phase, coming_to, full_level
from fgpu_ebpf.ledger.parked import Parked
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.policy.rules import Compute, Priority

ASKER, PID = 1, 4000
ZERO = (0,) * abi.DEVICES


def on(**bytes_: int) -> tuple[int, ...]:
    """Return bytes by device: on(gpu0=5)."""
    return tuple(bytes_.get(f"gpu{device}", 0) for device in range(abi.DEVICES))


class Host:
    """A host with free bytes by device, tenants that run, and tenants that do not."""

    def __init__(self) -> None:
        self.free: dict[int, int | None] = {0: 0, 1: 0}
        self.tenants: dict[int, Any] = {ASKER: SimpleNamespace(name="asker", cgroup=ASKER, compute=None)}
        self.processes: dict[int, Process] = {}
        self.hindrances: dict[str, str] = {}
        self.idle_seconds: dict[str, float] = {}
        self.away: list[ParkedTenant] = []
        self.entries: dict[tuple[int, int], Parked] = {}
        self.parked: list[tuple[str, str]] = []
        self.full_level = self.missing = ""
        ledger = SimpleNamespace(
            processes=lambda: self.processes, process=self.processes.get,
            parked=SimpleNamespace(entries=lambda: self.entries, unmoved=set()),
        )  # fmt: skip
        enforcer = SimpleNamespace(get=self.tenants.get, leaving={})
        nvml = SimpleNamespace(free_bytes=self.free.get)
        self.promised = Counter[int]()
        parkable = SimpleNamespace(ledger=ledger, enforcer=enforcer, nvml=nvml, is_on=True, promised=self.promised)
        parking: Any = SimpleNamespace(
            parkable=parkable, tenants=lambda: self.away, is_away=lambda c: c in [parked.cgroup for parked in self.away]
        )
        idle: Any = SimpleNamespace(
            hindrance=self._hindrance,
            idle_seconds=lambda now, tenant: self.idle_seconds[tenant.name],
            begin=self._begin,
        )
        self.asker = self.put_away("asker", ASKER, Phase.WAITING)
        self.maker = RoomMaker(Path("/run/fgpu"), parking, idle)

    def runs(
        self, name: str, bytes_: tuple[int, ...], idle: float = 60.0, hindrance: str = "", priority: str = ""
    ) -> None:
        """Add a tenant that runs."""
        cgroup = len(self.tenants) + 1
        compute = Compute(priority=Priority(priority)) if priority else None
        self.tenants[cgroup] = SimpleNamespace(name=name, cgroup=cgroup, compute=compute)
        self.processes[PID + cgroup] = Process(1, (cgroup,), 0, 0, True, bytes_, ZERO, ZERO, ZERO, ZERO)
        self.hindrances[name], self.idle_seconds[name] = hindrance, idle

    def put_away(self, name: str, cgroup: int, phase: Phase) -> ParkedTenant:
        """Have a tenant not run."""
        parked = ParkedTenant(cgroup, name, f"/{name}", {(PID + cgroup, 1): 1}, phase)
        self.away.append(parked)
        return parked

    def make(self, **needs: int) -> tuple[bool, str]:
        wanted = {device: bytes_ for device, bytes_ in enumerate(on(**needs)) if bytes_}
        return self.maker.make(self.asker, wanted)

    def _hindrance(self, now: float, tenant: Any, own: dict[int, Process]) -> str:
        self.last_own = own
        return self.hindrances[tenant.name]

    def _begin(self, now: float, tenant: Any, own: Any, purpose: str) -> bool:
        assert own
        self.parked.append((tenant.name, purpose))
        return True


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host()
    monkeypatch.setattr(making_room, "HOLDERS_SECONDS", 0.0)
    monkeypatch.setattr(making_room, "full_level", lambda *_: made.full_level)
    monkeypatch.setattr(making_room.parker_client, "missing", lambda _: made.missing)
    return made


def test_the_lowest_priority_is_parked_first_and_then_the_longest_idle(host: Host) -> None:
    host.runs("high", on(gpu0=1), idle=900, priority="high")
    host.runs("plain", on(gpu0=1), idle=30)
    host.runs("normal", on(gpu0=1), idle=40, priority="normal")
    host.runs("low", on(gpu0=1), idle=11, priority="low")
    order = []
    while host.processes:
        assert host.make(gpu0=1)[0]
        name = host.parked[-1][0]
        order.append(name)
        cgroup = next(cgroup for cgroup, tenant in host.tenants.items() if tenant.name == name)
        del host.processes[PID + cgroup]
    assert order == ["low", "normal", "plain", "high"]


def test_one_tenant_is_parked_at_a_time(host: Host) -> None:
    host.runs("one", on(gpu0=5))
    host.runs("two", on(gpu0=5))
    assert host.make(gpu0=8) == (True, "one is being parked")
    assert host.parked == [("one", ", to make room for asker")]
    for phase, said in ((Phase.CHECKING, "is about to be parked"), (Phase.PARKING, "is being parked")):
        one = host.put_away("one", 2, phase)
        one.members = {(PID + 2, 1): 1}
        assert host.make(gpu0=8) == (True, f"one {said}")
        host.away.remove(one)
    assert len(host.parked) == 1


def test_nothing_is_parked_if_all_that_can_be_would_not_be_enough(host: Host) -> None:
    host.runs("idle", on(gpu0=5))
    host.runs("busy", on(gpu0=50), hindrance="busy")
    host.free[0] = 2
    is_made, why = host.make(gpu0=8)
    assert (is_made, host.parked) == (False, [])
    assert why == "held by idle (can be parked, which is not enough), busy (busy)"
    host.free[0] = 3
    assert host.make(gpu0=8) == (True, "idle is being parked")


def test_a_tenant_of_another_device_is_not_parked(host: Host) -> None:
    host.runs("elsewhere", on(gpu1=50))
    assert host.make(gpu0=8) == (False, "no tenant holds memory of the device")
    host.runs("here", on(gpu0=8))
    host.free[1] = None
    assert host.make(gpu0=8) == (True, "here is being parked")
    assert host.make(gpu0=8, gpu1=8) == (False, ""), "what is free there is not known"


def test_a_tenant_that_needs_two_devices_gets_room_on_both_or_none(host: Host) -> None:
    host.runs("one", on(gpu0=8))
    host.runs("other", on(gpu1=7))
    assert not host.make(gpu0=8, gpu1=8)[0]
    assert host.parked == []
    host.free[1] = 1
    assert host.make(gpu0=8, gpu1=8)[0]


def test_a_tenant_that_cannot_be_parked_is_named_with_the_reason(host: Host) -> None:
    host.runs("bob", on(gpu0=9), hindrance="the policy does not park the tenant")
    host.runs("carol", on(gpu0=9), hindrance="pid 7 has managed memory")
    said = "held by bob (the policy does not park the tenant), carol (pid 7 has managed memory)"
    assert host.make(gpu0=8) == (False, said)
    for number in range(MOST_NAMES):
        host.runs(f"t{number}", on(gpu0=9), hindrance="busy")
    assert host.make(gpu0=8)[1].endswith("t2 (busy), 2 more")
    assert host.parked == []


def test_no_room_is_made_without_a_parker(host: Host) -> None:
    """An attempt would fail, and the tenant would be tried again more and more rarely."""
    host.runs("idle", on(gpu0=50))
    host.missing = "the parker does not run"
    assert host.make(gpu0=8) == (False, host.missing)
    assert host.parked == []


def test_no_room_is_made_for_a_tenant_whose_group_is_full(host: Host) -> None:
    host.runs("idle", on(gpu0=50))
    host.full_level = "group lab has 8GiB of 8GiB in use on gpu 0"
    assert host.make(gpu0=8) == (False, host.full_level)
    assert host.parked == []


@pytest.mark.parametrize(("limit", "observe"), [(11, False), (10, False), (10, True)])
def test_a_group_is_full_if_it_has_no_room_for_all_processes_of_a_tenant_together(limit: int, observe: bool) -> None:
    """A group that only observes is never full."""
    lives = {(PID, 1): 1, (PID + 1, 1): 1}
    processes = {pid: Process(1, (ASKER, 5), 0, 0, True, ZERO, ZERO, ZERO, ZERO, ZERO) for pid, _ in lives}
    entries = {life: Parked(0, ASKER, on(gpu0=3)) for life in lives}
    ledger: Any = SimpleNamespace(
        process=processes.get, usage=lambda level: [SimpleNamespace(used=5, limit=limit)],
        parked=SimpleNamespace(entries=lambda: entries),
    )  # fmt: skip
    group = SimpleNamespace(observe=observe)
    enforcer: Any = SimpleNamespace(name_of=lambda level: f"g{level}", get=lambda level: group)
    found = full_level(ParkedTenant(ASKER, "asker", "/asker", lives, Phase.WAITING), ledger, enforcer)
    assert found == ("" if limit == 11 or observe else "group g5 has 5B of 10B in use on gpu 0")


def test_a_tenant_that_waited_before_gets_its_room_first(host: Host) -> None:
    host.runs("idle", on(gpu0=50))
    earlier = host.put_away("earlier", 9, Phase.WAITING)
    earlier.has_claim = True
    host.entries[PID + 9, 1] = Parked(0, 9, on(gpu0=4))
    assert host.make(gpu0=8) == (False, "room is made for earlier first")
    host.entries[PID + 9, 1] = Parked(0, 9, on(gpu1=4))
    assert host.make(gpu0=8)[0], "its room is on another device"


def test_a_tenant_that_wakes_up_gets_no_room_that_is_made_for_a_request(host: Host) -> None:
    host.runs("idle", on(gpu0=50))
    host.promised[0] = 4
    assert host.make(gpu0=8) == (False, "room is made for a request for memory first")
    assert host.parked == []
    assert coming_to(host.asker, host.away, host.maker._parkable) == {0: 4}
    assert coming_to(None, host.away, host.maker._parkable) == {}


def test_a_tenant_with_a_request_for_memory_is_not_parked(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making_room, "HOLDERS_SECONDS", 3600.0)
    host.runs("idle", on(gpu0=4))
    assert not host.make(gpu0=8)[0], "the holders are known from now on"
    host.maker.keep(frozenset({2}))
    looks = []
    monkeypatch.setattr(host.maker, "_look", lambda *words: looks.append(words) or [])
    assert host.make(gpu0=4) == (False, "held by idle (waits for memory itself)")
    host.maker.keep(frozenset())
    assert host.make(gpu0=4)[0]
    assert looks == [], "a program that reports requests again and again does not have all tenants looked at each time"


def test_a_tenant_whose_state_is_not_known_is_waited_for(host: Host) -> None:
    host.runs("idle", on(gpu0=50))
    host.runs("lost", on(gpu0=50))
    lost = host.put_away("lost", 3, Phase.UNKNOWN)
    lost.since -= LOST_SECONDS - 5
    assert host.make(gpu0=8) == (True, "lost is in a state that the parker must report")
    assert host.parked == []


def test_other_tenants_are_parked_if_the_state_of_one_stays_unknown(host: Host) -> None:
    host.runs("lost", on(gpu0=50))
    host.put_away("lost", 2, Phase.UNKNOWN).since -= LOST_SECONDS + 1
    assert host.make(gpu0=8) == (False, "held by lost (is parked)")
    host.runs("idle", on(gpu0=50))
    assert host.make(gpu0=8) == (True, "idle is being parked")


def test_a_tenant_that_cannot_be_restored_does_not_make_others_fail(host: Host) -> None:
    """A program can stop its parked process, and then each attempt to restore the process fails."""
    host.runs("hostile", on(gpu0=50))
    host.runs("idle", on(gpu0=50))
    hostile = host.put_away("hostile", 2, Phase.WAITING)
    for _ in range(3):
        for phase in (Phase.WAKING, Phase.UNKNOWN):
            hostile.since -= LOST_SECONDS + 1
            hostile.enter(phase)
            assert host.make(gpu0=8)[0]
            assert host.parked == []
    hostile.enter(Phase.WAITING)
    assert host.make(gpu0=8) == (True, "idle is being parked")


def test_nothing_is_parked_while_another_tenant_is_being_woken(host: Host) -> None:
    """A part of its charge is no longer free, so it is not known what is missing."""
    host.runs("wakes", on(gpu0=50))
    host.runs("idle", on(gpu0=50))
    host.put_away("wakes", 2, Phase.WAKING)
    assert host.make(gpu0=8) == (True, "wakes is being woken")
    assert host.parked == []


def test_many_tenants_that_wait_look_at_the_holders_together(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making_room, "HOLDERS_SECONDS", 3600.0)
    looks = []
    monkeypatch.setattr(host.maker, "_look", lambda *words: looks.append(words) or [])
    assert {host.make(gpu0=8) for _ in range(9)} == {(False, "no tenant holds memory of the device")}
    assert not host.make(gpu1=8)[0]
    assert len(looks) == 2


def test_all_processes_of_a_tenant_count(host: Host) -> None:
    host.runs("pair", on(gpu0=4))
    first = next(iter(host.processes))
    host.processes[first + 1000] = replace(host.processes[first], bytes=on(gpu0=4))
    host.processes[first + 2000] = replace(host.processes[first], bytes=ZERO)
    assert host.make(gpu0=8)[0]
    assert host.last_own.keys() == {first, first + 1000, first + 2000}, "its idle time is that of all of them"
