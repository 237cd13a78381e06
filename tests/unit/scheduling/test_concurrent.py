"""Tests of concurrent devices: tenants run at the same time, and their progress follows their weights.

The simulated device runs the kernels of different tenants side by side, as with MPS, and each takes longer meanwhile.
The `work` of a tenant is what it completes, as a fraction of what it completes alone in the same time.
"""

from __future__ import annotations

import functools
import random

import pytest

from fgpu_ebpf.gatekeeper.turn_rows import counts_of
from fgpu_ebpf.scheduling.accounts import Accounts
from fgpu_ebpf.scheduling.alone_cost import AloneCost
from fgpu_ebpf.scheduling.concurrent import _Runner
from fgpu_ebpf.scheduling.fair_queue import Share
from fgpu_ebpf.scheduling.reports import Seen
from fgpu_ebpf.scheduling.state import Place
from tests.unit.scheduling.slices_kit import MS, US, Loop, S, Tenant, World

STEPS = {  # kernels in a step, the length of each, and the time to the next step
    "training": (80, 100 * US, 300 * US),
    "inference": (1, 180 * US, 60 * US),
    "llm": (1, 1000 * US, 80 * US),
    "notebook": (20, 200 * US, 12 * MS),
}


class Liar(Tenant):
    """A program that reports a tenth of its launches while its gate is open beside others."""

    world: World | None = None
    hidden, last = 0, 0

    def tell(self) -> None:
        super().tell()
        place = self.world.turns.places.get(self.key) if self.world else None
        if place and place.lent:
            self.hidden += (self.launches - self.last) * 9 // 10
        self.last = self.launches
        self.said = (self.said[0], self.launches - self.hidden, *self.said[2:])


def tenant(key: int, kind: str = "busy", **share) -> Tenant:
    dice = random.Random(key)
    if kind == "busy":
        return Tenant(key, Share(**share))
    count, kernel_ns, think_ns = STEPS[kind]
    return Tenant(key, Share(**share), kernel_ns, steps=Loop(count, lambda: round(think_ns * dice.uniform(0.8, 1.2))))


@functools.cache
def alone(kind: str) -> int:
    return World(tenant(1, kind)).run_observed(3).tenants[1].done_ns // 3


def world(*tenants: Tenant, slower: float) -> World:
    return World(*tenants, parallel=slower, concurrent={0})


def work(it: World, kinds: list[str], seconds: int = 10, warm: int = 3) -> list[float]:
    """Return each tenant's work, after some seconds in which nothing is counted."""
    before = {key: one.done_ns for key, one in it.run_observed(warm).tenants.items()}
    it.run_observed(seconds)
    return [
        (one.done_ns - before[key]) / seconds / alone(kind)
        for (key, one), kind in zip(it.tenants.items(), kinds, strict=True)
    ]


def is_shared(it: World) -> bool:
    return all(place.lent for place in it.turns.places.values())


@pytest.mark.parametrize("weight", [100, 300])
@pytest.mark.parametrize(
    "kinds", [("busy", "busy"), ("training", "llm"), ("llm", "inference"), ("inference", "training")]
)
def test_work_follows_weights_and_is_more_than_a_device(kinds, weight):
    it = world(tenant(1, kinds[0], weight=weight), tenant(2, kinds[1]), slower=1.75)
    got = work(it, kinds)
    assert got[0] / sum(got) == pytest.approx(weight / (weight + 100), abs=0.02), got
    assert sum(got) > 1.04
    assert is_shared(it)


def test_a_wrong_first_cost_is_measured_again_within_seconds() -> None:
    """A tenant with a cost that is too high does not seem to be slowed, so no other tenant is held."""
    it = world(tenant(1, weight=300), tenant(2), slower=1.4)
    while 1 not in it.turns.places or not (place := it.turns.places[1]).alone.is_known:
        it.run(0.01)
    place.alone.learn(1000, round(1.45 * place.alone.of(1000)))
    done = work(it, ["busy", "busy"], seconds=5, warm=3)
    assert done[0] / sum(done) == pytest.approx(0.75, abs=0.02), done


def test_tenants_that_do_not_slow_each_other_down_are_never_held():
    it = world(tenant(1, "inference", weight=300), tenant(2, "notebook"), slower=1.0)
    got = work(it, ["inference", "notebook"])
    assert all(part > 0.98 for part in got), got
    assert not any(place.held for place in it.turns.places.values())


def test_four_tenants():
    weights = (400, 300, 200, 100)
    got = work(world(*(tenant(n + 1, weight=w) for n, w in enumerate(weights)), slower=1.5), ["busy"] * 4)
    for part, weight in zip(got, weights, strict=True):
        assert part / sum(got) == pytest.approx(weight / 1000, abs=0.02)
    assert sum(got) > 1.2


def test_eight_equal_tenants_get_the_same():
    got = work(world(*(tenant(n + 1) for n in range(8)), slower=1.1), ["busy"] * 8)
    assert sum(got) ** 2 / (8 * sum(part**2 for part in got)) > 0.995  # Jain's index


@pytest.mark.parametrize("millionths", [250_000, 500_000])
def test_a_ceiling_is_one_of_progress(millionths):
    it = world(tenant(1, limit_millionths=millionths), tenant(2), slower=1.75)
    got = work(it, ["busy", "busy"])
    assert got[0] == pytest.approx(millionths / 1e6, abs=0.02)
    assert got[1] > 0.6
    assert is_shared(it)


def test_a_tenant_that_comes_and_goes_causes_no_charge_beyond_the_progress() -> None:
    """Work in flight that counts as progress when sharing begins again must not be charged as late work too."""
    third = tenant(3, "notebook")
    it = world(tenant(1), tenant(2), third, slower=1.75).run(3.0)
    for _ in range(4):
        third.dead, third.waiting, third.flights = not third.dead, False, []
        it._ring()
        it.run(0.3)
        places = [it.turns.places[key] for key in (1, 2)]
        assert [(place.lent, place.late_ns) for place in places] == [(True, 0), (True, 0)]


def test_a_higher_priority_is_never_held():
    it = world(tenant(1), tenant(2, "llm", rank=0), slower=1.75)
    got = work(it, ["busy", "llm"])
    assert got[1] > 0.9
    assert got[0] > 0.05  # while the higher priority is not slowed


def test_tenants_take_turns_again_if_the_device_does_less_for_both():
    it = world(tenant(1), tenant(2), slower=2.5)
    got = work(it, ["busy", "busy"])
    assert got == pytest.approx([0.5, 0.5], abs=0.03)
    assert it.turns.devices[0].lent_ns < 0.2 * 13 * S


def test_a_tenant_that_was_idle_has_no_credit_and_no_debt():
    late = tenant(2)
    late.stopped = True
    it = world(tenant(1), late, slower=1.75).run_observed(5)
    late.stopped = False
    it._ring()
    got = work(it, ["busy", "busy"], seconds=2, warm=1)
    assert got[0] == pytest.approx(got[1], abs=0.03)


def test_a_tenant_that_joins_later_takes_nothing_for_the_time_before():
    late = tenant(3)
    late.dead = True
    it = world(tenant(1), tenant(2), late, slower=1.5).run_observed(8)
    assert it.turns.places[1].lent
    late.dead = False
    it._ring()
    got = work(it, ["busy"] * 3, seconds=4, warm=0)
    assert min(got) > 0.25, got


def test_a_tenant_that_does_other_work_after_a_rest_is_measured_again():
    """The launches of a program that starts cost more than later ones, but not so much more that claims show it."""
    starts = tenant(1)
    usual_ns, starts.kernel_ns = starts.kernel_ns, round(1.4 * starts.kernel_ns)
    it = world(starts, tenant(2), slower=1.75).run_observed(3)
    starts.steps = Loop(1, lambda: 100 * S)
    it.run_observed(6)
    starts.steps, starts.kernel_ns = None, usual_ns
    it._ring()
    got = work(it, ["busy", "busy"], seconds=4, warm=1)
    assert got[0] == pytest.approx(got[1], abs=0.04), got
    assert is_shared(it)


def test_a_tenant_whose_work_changes_is_measured_again_before_all_take_turns():
    changes = tenant(1)
    it = world(changes, tenant(2), slower=1.5).run_observed(3)
    changes.kernel_ns *= 5
    for _ in range(50):
        it.run(0.1)
        assert is_shared(it)
    assert it.turns.places[1].alone.of(1) == pytest.approx(changes.kernel_ns, rel=0.2)


def test_an_idle_tenant_that_begins_to_launch_does_not_change_the_cost_of_others():
    dice = random.Random(2)
    bursts = Tenant(1, Share(), 200 * US, steps=Loop(40, lambda: round(75 * MS * dice.uniform(0.9, 1.1))))
    it = world(bursts, tenant(2), slower=1.75).run_observed(5)
    assert it.turns.places[2].alone.of(1) == pytest.approx(it.tenants[2].kernel_ns, rel=0.03)


def test_changes_of_other_devices_do_not_end_concurrency():
    other = Tenant(3, Share(), devices=frozenset({1}))
    it = world(tenant(1), tenant(2), other, slower=1.5).run_observed(3)
    before = it.turns.devices[0].lent_ns
    for _ in range(20):
        other.dead = not other.dead
        it._ring()
        it.run(0.2)
    assert it.turns.devices[0].lent_ns - before > 3.8 * S


@pytest.mark.parametrize("kernel_ms", [30, 100])
def test_long_kernels_cost_their_whole_length(kernel_ms):
    long = Tenant(1, Share(), kernel_ms * MS)
    it = world(long, tenant(2), slower=1.6)
    got = work(it, ["busy", "busy"], seconds=20)
    assert got[0] / sum(got) == pytest.approx(0.5, abs=0.04), got


@pytest.mark.parametrize("share", [Share(), Share(limit_millionths=500_000)])
def test_a_tenant_that_thinks_for_long_does_not_hold_others_meanwhile(share):
    dice = random.Random(1)
    thinking = Tenant(1, share, 200 * US, steps=Loop(20, lambda: round(70 * MS * dice.uniform(0.9, 1.1))))
    it = world(thinking, tenant(2), slower=1.75)
    got = work(it, ["busy", "busy"])
    assert got[1] > 0.85, got


def test_an_idle_tenant_with_a_ceiling_does_not_protect_false_launches():
    idle = tenant(3, limit_millionths=500_000)
    idle.stopped = True
    liar = Liar(1, Share())
    it = liar.world = world(liar, tenant(2), idle, slower=1.75)
    got = work(it, ["busy", "busy", "busy"], seconds=20)
    assert got[1] > 0.4, got


def test_quanta_are_those_of_the_policy_while_no_trial_is_due():
    share = Share(quantum_ns=5 * MS)
    it = World(*(Tenant(n, share) for n in (1, 2)), parallel=2.5, concurrent={0}).run_observed(10)
    for one in it.tenants.values():
        one.waits_ns.clear()
    it.run(0.5)
    assert it.turns.devices[0].lent_ns < 4 * S
    assert max(one.longest_wait_ns for one in it.tenants.values()) > 0
    assert sorted(it.tenants[1].waits_ns)[len(it.tenants[1].waits_ns) // 2] < 20 * MS


def test_a_cost_is_that_of_the_last_measurements():
    cost = AloneCost()
    assert cost.of(1) == 0
    for _ in range(100):
        cost.learn(1, 4 * MS)
    for _ in range(200):
        cost.learn(4, 4 * MS)
    assert cost.of(1) == pytest.approx(1 * MS, rel=0.5)
    cost.forget()
    assert not cost.is_known


def test_a_kernel_that_began_beside_others_does_not_count_as_alone() -> None:
    cost = AloneCost()
    for _ in range(100):  # the tenant is alone for short times, each of which begins inside a slowed kernel
        cost.interrupt(is_idle=False)
        for took_ns in (6 * MS, 4 * MS, 4 * MS):
            cost.observe(1, took_ns)
    assert cost.of(1) == 4 * MS


@pytest.mark.parametrize(("period_ms", "work_ms"), [(16.2, 4), (16.2, 1), (33, 8), (45, 20), (120, 110)])
def test_a_measurement_has_whole_steps(period_ms: float, work_ms: float) -> None:
    """A step launches ten kernels at its begin. The measurement begins at any moment of a step."""
    period_ns, work_ns = round(period_ms * MS), work_ms * MS
    for part in range(20):
        place = Place(1, Share(), Accounts(Share(), 0))
        runner, now = _Runner(place, 0), S + period_ns * part // 20
        place.seen = observed(now, period_ns, work_ns)
        runner.begin(now)
        while not runner.is_measured():
            now += 4 * MS
            place.seen = observed(now, period_ns, work_ns)
            runner.count(4 * MS, now)
            runner.progress(4 * MS, alone=True)
        place.alone.renew()
        assert place.alone.of(10) == pytest.approx(period_ns, rel=0.04)


def observed(now_ns: int, period_ns: int, work_ns: int) -> Seen:
    """Return what the scheduler observes of a program that launches ten kernels at the begin of each period."""
    steps, since_ns = divmod(now_ns, period_ns)
    until_ns = now_ns - since_ns + work_ns
    return Seen(frozenset({0}), launches=steps * 10 + 10, in_flight=int(since_ns < work_ns), busy_until_ns=until_ns)


def test_an_idle_time_does_not_change_what_a_launch_costs():
    late = tenant(2, "notebook")
    it = world(tenant(1), late, slower=1.2)
    it.run_observed(5)
    before = it.turns.places[2].alone.of(1000)
    late.stopped = True
    it.run_observed(4)
    assert it.turns.places[2].alone.of(1000) == pytest.approx(before, rel=0.05)


def test_a_report_is_counted_once():
    """An idle tenant is seen less often than progress is charged."""
    place = Place(1, Share(), Accounts(Share(), 0))
    place.alone.learn(32, 100 * MS)
    runner = _Runner(place, 0)
    place.seen = Seen(frozenset({0}), launches=32)
    charged_ns = 0
    for look in range(100):
        runner.count(4 * MS, look * 4 * MS)
        charged_ns += runner.progress(4 * MS, alone=False)
    assert charged_ns == 24 * MS


def test_false_launches_gain_a_bounded_part():
    """The first tenant reports a tenth of its launches while all run, so it seems to make no progress."""

    liar = Liar(1, Share())
    it = liar.world = world(liar, tenant(2), slower=1.75)
    got = work(it, ["busy", "busy"])
    assert got[1] > 0.3, got


def test_tenants_of_other_devices_take_turns():
    it = World(tenant(1), tenant(2), parallel=1.75).run_observed(5)
    assert it.turns.devices[0].lent_ns == 0


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("claim", ["in flight", "waiting"])
def test_a_tenant_with_a_claim_of_the_past_delays_no_other_tenant(claim, is_known):
    """It was stopped, or its program waits for its work in a way that the shim does not see."""
    it = world(tenant(1), tenant(2), slower=1.75)
    it.run_observed(8 if is_known else 0)
    stuck, other = it.tenants[1], it.tenants[2]
    if not is_known:
        it.run(0.01)
    past = it.now
    stuck.stopped, stuck.flights = True, []
    stuck.said = (claim == "waiting", stuck.launches, int(claim == "in flight"), past, False, past, past, past)
    it.run_observed(3)
    before, other.longest_wait_ns = other.done_ns, 0
    it.run_observed(20)
    assert (other.done_ns - before) / 20 / alone("busy") > 0.97
    assert other.longest_wait_ns < 100 * MS


def test_a_tenant_that_comes_and_goes_causes_no_measurement_of_the_others():
    it = world(*[tenant(key) for key in range(1, 6)], slower=1.2)
    it.run_observed(8)
    comes, others = it.tenants[5], [it.tenants[key] for key in range(1, 5)]
    comes.stopped = True
    before = [sum(one.waits_ns) for one in others]
    for second in range(20):
        comes.dead = second % 2 == 0
        it.run_observed(1)
    assert max(sum(one.waits_ns) - was for one, was in zip(others, before, strict=True)) < 2_000 * MS


def test_published_rows_name_tenants_that_run_beside_others():
    it = world(tenant(1), tenant(2), slower=1.75).run_observed(3)
    assert {counts_of(place, 0, 0, 0).free for place in it.turns.places.values()} == {2}
    lone = world(tenant(1), slower=1.75).run_observed(1)
    assert counts_of(lone.turns.places[1], 0, 0, 0).free == 1
