"""Tests of lending: tenants that leave the device idle in their own turns may launch at the same time."""

from __future__ import annotations

import random

import pytest

from fgpu_ebpf.scheduling.fair_queue import Share
from tests.unit.scheduling.slices_kit import MS, US, Loop, S, Tenant, World

SECONDS = 10


def light(key: int, kernel_us: int = 180, think_us: int = 820, share: Share | None = None, **more) -> Tenant:
    """Return a tenant that keeps the device busy for a small part of its own time."""
    dice = random.Random(key)
    return Tenant(
        key,
        share or Share(),
        kernel_us * US,
        steps=Loop(1, lambda: round(think_us * US * dice.uniform(0.8, 1.2))),
        **more,
    )


def run(it: World, seconds: int = SECONDS) -> dict[int, float]:
    """Return for each tenant the part of its own speed alone, after some seconds in which nothing is counted."""
    before = {key: tenant.done_ns for key, tenant in it.run_observed(5).tenants.items()}
    it.run_observed(seconds)
    alone = {key: 180 / 1000 if tenant.steps else 1.0 for key, tenant in it.tenants.items()}
    return {key: (t.done_ns - before[key]) / (seconds * S) / alone[key] for key, t in it.tenants.items()}


def is_lent(it: World) -> bool:
    return all(place.lent for place in it.turns.places.values())


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 1, 1)])
def test_tenants_that_leave_the_device_idle_run_at_the_same_time(weights):
    it = World(*(light(n + 1, share=Share(weight=100 * w)) for n, w in enumerate(weights)))
    got = run(it)
    assert all(part > 0.95 for part in got.values()), got
    assert it.turns.devices[0].lent_ns > 0.9 * SECONDS * S


@pytest.mark.parametrize("weights", [(1, 1), (3, 1)])
def test_tenants_that_slow_each_other_down_keep_their_turns(weights):
    """Side by side, kernels take seven times as long. Turns give each tenant its share of the device."""
    it = World(*(light(n + 1, share=Share(weight=100 * w)) for n, w in enumerate(weights)), crowded=7.0)
    got = run(it)
    assert got[1] == pytest.approx(weights[0] / sum(weights), abs=0.02)
    assert got[2] == pytest.approx(weights[1] / sum(weights), abs=0.02)
    assert not is_lent(it)


def test_one_that_loses_by_it_decides():
    """A tenant with weight 900 would lose a fifth of its launches, and the other would have four times as many."""
    it = World(light(1, share=Share(weight=900)), light(2), crowded=2.4)
    got = run(it)
    assert got[1] > 0.87
    assert got[2] > 0.09


def test_busy_tenants_are_never_lent():
    it = World(Tenant(1, Share(weight=300)), Tenant(2), light(3, share=Share(weight=1)))
    for _ in range(10):
        it.run_observed(1)
        assert not any(place.lent for place in it.turns.places.values())


@pytest.mark.parametrize("share", [Share(limit_millionths=600_000), Share(rank=0)])
def test_a_ceiling_or_another_priority_excludes_lending(share):
    assert light(1, share=share).share != Share()
    it = World(light(1, share=share), light(2))
    for _ in range(10):
        it.run_observed(1)
        assert not any(place.lent for place in it.turns.places.values())


def test_a_tenant_that_becomes_busy_gets_its_share_and_no_more():
    it = World(light(1), light(2)).run_observed(5)
    assert is_lent(it)
    it.tenants[2].steps = None
    it.run_observed(1)
    assert not is_lent(it)
    before = {key: tenant.done_ns for key, tenant in it.tenants.items()}
    it.run_observed(SECONDS)
    got = {key: (t.done_ns - before[key]) / (SECONDS * S) for key, t in it.tenants.items()}
    assert got[1] == pytest.approx(0.5 * 180 / 1000, abs=0.02)
    assert got[2] == pytest.approx(0.5, abs=0.05)


def test_a_tenant_that_becomes_busy_as_lending_begins_gets_its_share_and_no_more():
    it = World(light(1), light(2)).run_observed(2)
    for _ in range(100):
        if not is_lent(it):
            it.run(0.01)
    assert is_lent(it)
    for one in it.tenants.values():
        one.steps, one.kernel_ns = None, 60 * US
    it.run(1)
    assert not is_lent(it)


def test_a_tenant_that_catches_up_at_first_is_compared_with_what_it_does_usually():
    it = World(light(1), light(2, think_us=320)).run_observed(5)
    second = it.tenants[2]
    quick, second.steps = second.steps, light(3).steps
    it.run_observed(4)
    assert is_lent(it)
    second.steps = quick
    it.run(0.6)
    assert not is_lent(it)


def test_a_new_tenant_ends_lending_until_it_was_measured():
    late = light(3, dead=True)
    it = World(light(1), light(2), late).run_observed(5)
    assert it.turns.places[1].lent
    late.dead = False
    it._ring()
    it.run(0.01)
    assert not any(place.lent for place in it.turns.places.values())
    got = run(it)
    assert all(part > 0.95 for part in got.values()), got


def test_a_tenant_that_exits_leaves_its_neighbour_free():
    it = World(light(1), light(2)).run_observed(5)
    assert is_lent(it)
    it.tenants[2].dead = True
    it._ring()
    it.run(0.5)
    first, second = it.turns.places[1], it.turns.places[2]
    assert first.free_on == {0}
    assert not first.lent
    assert not second.free_on


def test_work_in_flight_at_the_end_of_lending_is_charged():
    it = World(light(1), light(2)).run_observed(5)
    assert is_lent(it)
    second = it.tenants[2]
    second.flights = [it.now + 40 * MS]
    second.tell()
    it.turns.step({1: it.tenants[1].seen(), 2: second.seen()}, it.now)
    owned = it.turns.places[2].counts[0].owned_ns
    it.turns.share_out({1: Share(), 2: Share(weight=200)}, it.now)
    it._ring()
    it.run(0.2)
    assert it.turns.places[2].counts[0].owned_ns - owned >= 30 * MS


def test_false_launches_do_not_take_a_neighbour_s_part():
    """The first tenant reports ten times as many launches as it makes. Its neighbour loses by lending."""

    class Liar(Tenant):
        def tell(self) -> None:
            super().tell()
            self.said = (self.said[0], 10 * self.launches, *self.said[2:])

    honest = light(1)
    liar = Liar(2, Share(), 180 * US, steps=Loop(1, lambda: 820 * US))
    got = run(World(honest, liar, crowded=7.0))
    assert got[1] == pytest.approx(0.5, abs=0.02)


def test_launches_just_before_a_trial_are_compared_also_after_a_long_pause():
    it = World(light(1), light(2), crowded=7.0).run_observed(8)  # trials fail, and pauses become longer
    device = it.turns._lending._devices[0]
    assert device.pause_ns > 4 * S
    for _ in range(40):
        it.run(0.2)
        assert it.now - device.since_ns <= 4.1 * S
