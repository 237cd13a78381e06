"""Tests of concurrent devices: tenants run at the same time, and their progress follows their weights.

The simulated device runs the kernels of different tenants side by side, as with MPS, and each takes longer meanwhile.
The `work` of a tenant is what it completes, as a fraction of what it completes alone in the same time.
"""

from __future__ import annotations

import functools
import random

import pytest

from fgpu_ebpf.scheduling.fair_queue import Share
from tests.unit.scheduling.slices_kit import MS, US, Loop, S, Tenant, World

STEPS = {  # kernels in a step, the length of each, and the time to the next step
    "training": (80, 100 * US, 300 * US),
    "inference": (1, 180 * US, 60 * US),
    "llm": (1, 1000 * US, 80 * US),
    "notebook": (20, 200 * US, 12 * MS),
}


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


def test_an_idle_time_does_not_change_what_a_launch_costs():
    late = tenant(2, "notebook")
    it = world(tenant(1), late, slower=1.2)
    it.run_observed(5)
    before = it.turns.places[2].alone.of(1000)
    late.stopped = True
    it.run_observed(4)
    assert it.turns.places[2].alone.of(1000) == pytest.approx(before, rel=0.05)


def test_false_launches_gain_a_bounded_part():
    """The first tenant reports a tenth of its launches while all run, so it seems to make no progress."""

    class Liar(Tenant):
        hidden, last = 0, 0

        def tell(self) -> None:
            super().tell()
            place = it.turns.places.get(1) if it else None
            if place and place.lent:
                self.hidden += (self.launches - self.last) * 9 // 10
            self.last = self.launches
            self.said = (self.said[0], self.launches - self.hidden, *self.said[2:])

    it: World | None = None
    it = world(Liar(1, Share()), tenant(2), slower=1.75)
    got = work(it, ["busy", "busy"])
    assert got[1] > 0.3, got


def test_tenants_of_other_devices_take_turns():
    it = World(tenant(1), tenant(2), parallel=1.75).run_observed(5)
    assert it.turns.devices[0].lent_ns == 0
