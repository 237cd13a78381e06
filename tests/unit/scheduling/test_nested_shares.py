"""Tests in simulated time of shares inside a share: a tenant gets no more time through cgroups below its own."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fgpu_ebpf.scheduling.fair_queue import MILLION, Share
from fgpu_ebpf.scheduling.nested_shares import Unit, entitled
from tests.unit.scheduling.slices_kit import MS, US, Hog, S, Steps, Tenant, World

SECONDS = 10.0
OUTER = 100


def nested(share: Share, inner: list[Share], *others: Tenant, kernel_ns: int = 200 * US) -> World:
    """Return a world with a level of this share, busy tenants inside it (numbered from 1), and other tenants."""
    made = [Tenant(n + 1, one, kernel_ns) for n, one in enumerate(inner)]
    return World(*made, *others, outer={OUTER: share}, inside={tenant.key: [OUTER] for tenant in made})


@pytest.mark.parametrize("number", [1, 2, 3, 8])
@pytest.mark.parametrize("percent", [25, 50])
def test_a_ceiling_limits_all_levels_inside_together(percent: int, number: int) -> None:
    limit = Share(limit_millionths=percent * 10_000)
    it = nested(limit, [limit] * number).run(SECONDS)
    done = [tenant.done_ns / (SECONDS * S) for tenant in it.tenants.values()]
    assert sum(done) == pytest.approx(percent / 100, abs=0.015)
    assert min(done) == pytest.approx(percent / 100 / number, abs=0.015)


@pytest.mark.parametrize("number", [1, 2, 3, 8])
@pytest.mark.parametrize("kernel_us", [200, 4_000])
def test_a_weight_counts_for_all_levels_inside_together(number: int, kernel_us: int) -> None:
    other = Tenant(50, kernel_ns=kernel_us * US)
    got = nested(Share(), [Share()] * number, other, kernel_ns=kernel_us * US).run(SECONDS).shares()
    assert got[50] == pytest.approx(0.5, abs=0.01)


def test_levels_inside_divide_the_outer_share_by_their_weights() -> None:
    got = nested(Share(weight=200), [Share(weight=300), Share()], Tenant(50)).run(SECONDS).shares()
    assert (got[1], got[2], got[50]) == pytest.approx((0.5, 1 / 6, 1 / 3), abs=0.015)


def test_a_ceiling_inside_holds_below_the_outer_one() -> None:
    it = nested(Share(limit_millionths=500_000), [Share(limit_millionths=100_000), Share()]).run(SECONDS)
    one, two = (it.tenants[key].done_ns / (SECONDS * S) for key in (1, 2))
    assert (one, two) == pytest.approx((0.1, 0.4), abs=0.02)


def test_a_level_s_own_programs_are_not_charged_for_time_of_levels_inside() -> None:
    limit = Share(limit_millionths=500_000)
    own, inner = Tenant(OUTER, limit), Tenant(1, limit)
    it = World(own, inner, inside={1: [OUTER]})
    for _ in range(10):
        it.run(1.0)
        it.turns.observed(1, 0, inner.done_ns, it.now)
        it.turns.observed(OUTER, 0, inner.done_ns + own.done_ns, it.now)
    done = [tenant.done_ns / (10 * S) for tenant in (own, inner)]
    assert done == pytest.approx([0.25, 0.25], abs=0.03)


def test_a_ceiling_of_a_middle_level_holds() -> None:
    middle, outer = Share(limit_millionths=200_000), Share(limit_millionths=600_000)
    tenants = [Tenant(n) for n in (1, 2, 3)]
    inside = {1: [90, OUTER], 2: [90, OUTER], 3: [OUTER]}
    World(*tenants, outer={90: middle, OUTER: outer}, inside=inside).run(SECONDS)
    done = [tenant.done_ns / (SECONDS * S) for tenant in tenants]
    assert done[0] + done[1] <= 0.2 + 0.015
    assert sum(done) == pytest.approx(0.6, abs=0.02)


def test_a_priority_inside_is_no_higher_than_the_outer_one() -> None:
    low = nested(Share(rank=2), [Share(rank=0)], Tenant(50, Share(rank=1))).run(SECONDS).shares()
    assert low[50] > 0.9


def test_programs_of_the_level_itself_count_as_inside() -> None:
    own, inner, other = Tenant(OUTER), Tenant(1), Tenant(50)
    it = World(own, inner, other, inside={1: [OUTER]}).run(SECONDS)
    got = it.shares()
    assert (got[50], got[OUTER], got[1]) == pytest.approx((0.5, 0.25, 0.25), abs=0.015)


def test_new_cgroups_do_not_remove_a_debt() -> None:
    """Every 50 ms the tenant continues in a new cgroup below its own. Its debt stays."""
    limit = Share(limit_millionths=250_000)
    it, done = nested(limit, [limit]), 0
    for number in range(2, 200):
        it.run(0.05)
        before = it.tenants.pop(number - 1)
        it.turns.leave(before.key, it.now)
        done += before.done_ns
        it.tenants = {number: Tenant(number, limit)}
        it.nvml = {number: 0}
        it.turns.share_out({OUTER: limit, number: limit}, it.now)
        it.turns.nest(number, [OUTER], it.now)
        it.free_at, it.rung, it.bell = {}, {number}, it.now
    assert done / (198 * 50 * MS) <= 0.25 + 0.03


@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(
    st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 2**32),
)  # fmt: skip
def test_nested_levels_of_any_weights_all_run_and_leave_a_neighbour_its_part(
    weight: int, inner: list[int], seed: int
) -> None:
    chance = random.Random(seed)
    made = [
        Tenant(n + 1, Share(weight=100 * w), steps=Steps(chance.randrange(1, 60) * MS, chance.randrange(1, 120) * MS))
        for n, w in enumerate(inner)
    ]
    other = Tenant(50)
    outer, inside = {OUTER: Share(weight=100 * weight)}, {tenant.key: [OUTER] for tenant in made}
    got = World(*made, other, outer=outer, inside=inside).run(5.0)
    assert other.done_ns / (5.0 * S) >= 1 / (1 + weight) - 0.03
    assert all(tenant.launches for tenant in got.tenants.values())


@pytest.mark.parametrize("kernel_us", [200, 50_000])
@pytest.mark.parametrize("number", [2, 8])
def test_the_floor_raises_a_unit_as_often_as_a_tenant(number: int, kernel_us: int) -> None:
    low = Share(rank=2)
    other, top = Tenant(50, low, kernel_us * US), Tenant(60, Share(rank=0))
    it = nested(low, [low] * number, other, top, kernel_ns=kernel_us * US).run(30.0)
    inside = [it.tenants[key].done_ns for key in range(1, number + 1)]
    assert other.done_ns == pytest.approx(sum(inside), rel=0.25)
    assert min(inside) > 0
    assert top.done_ns / (30.0 * S) > 0.85


def test_entitlements_belong_to_units_and_are_divided_inside() -> None:
    unit = Unit(OUTER, Share(weight=200), 0)
    shares = {1: Share(weight=300), 2: Share(), 50: Share(weight=200)}
    got = entitled(shares, {1: unit, 2: unit})
    assert (got[1], got[2], got[50]) == pytest.approx((0.375 * MILLION, 0.125 * MILLION, 0.5 * MILLION), abs=2)


def test_levels_inside_a_removed_share_keep_their_own_shares() -> None:
    it = nested(Share(), [Share(), Share()], Tenant(50)).run(2.0)
    it.turns.share_out({1: Share(), 2: Share(), 50: Share()}, it.now)
    it._ring()
    before = {key: tenant.done_ns for key, tenant in it.tenants.items()}
    it.run(SECONDS)
    part = {key: tenant.done_ns - before[key] for key, tenant in it.tenants.items()}
    assert part[50] / sum(part.values()) == pytest.approx(1 / 3, abs=0.02)


def parts(it: World, seconds: float) -> dict[int, float]:
    """Run for `seconds`. Return each tenant's part of the device's time in this period."""
    before = {key: tenant.done_ns for key, tenant in it.tenants.items()}
    it._ring()  # the next step checks every tenant
    it.run(seconds)
    return {key: (tenant.done_ns - before[key]) / (seconds * S) for key, tenant in it.tenants.items()}


@pytest.mark.parametrize("weight", [1, 100, 10_000])
def test_adding_or_removing_a_share_around_running_tenants_starves_no_tenant(weight: int) -> None:
    """Virtual time inside a unit differs from that outside, both when the unit appears and when it is removed."""
    shares = {1: Share(weight=weight), 2: Share(weight=weight), 50: Share()}
    it = World(*(Tenant(key, share) for key, share in shares.items())).run(20.0)
    it.turns.share_out(shares | {OUTER: Share()}, it.now)
    for inner in (1, 2):
        it.turns.nest(inner, [OUTER], it.now)
    got = parts(it, 2.0)
    assert (got[1], got[2], got[50]) == pytest.approx((0.25, 0.25, 0.5), abs=0.03)
    it.run(20.0)
    it.turns.share_out(shares, it.now)
    got = parts(it, 4.0)
    total = 2 * weight + 100
    assert (got[1], got[2], got[50]) == pytest.approx((weight / total, weight / total, 100 / total), abs=0.03)


class Idler(Hog):
    """A program that takes every turn, and launches nothing in it."""

    def act(self, now_ns: int, is_open: bool, believed_ns: int) -> None:
        self.said = (self.waiting, 0, 0, 0, True, now_ns, 0, 0)


COVERS: dict[str, tuple[list[Tenant], list[Tenant]]] = {
    "turns that are not used": ([Idler(3), Idler(4)], []),
    "another device": ([Tenant(3, devices=frozenset({1}))], [Tenant(60, devices=frozenset({1}))]),
    "a lower priority": ([Tenant(3, Share(rank=2))], []),
}


@pytest.mark.parametrize("cover", COVERS)
def test_waiting_time_inside_is_no_credit_for_a_new_tenant(cover: str) -> None:
    """Tenants inside the unit request turns for 20 s and use almost no time.

    Then a busy tenant appears inside the unit. It gets no credit for the waiting time of the others.
    """
    inner, others = deepcopy(COVERS[cover])
    late, honest = Tenant(2, stopped=True), [Tenant(50), Tenant(51)]
    inside = {tenant.key: [OUTER] for tenant in (late, *inner)}
    it = World(late, *inner, *honest, *others, outer={OUTER: Share()}, inside=inside).run(20.0)
    before, late.stopped = honest[0].done_ns, False
    it.run(1.0)
    assert late.done_ns / S > 0.25
    assert (honest[0].done_ns - before) / S == pytest.approx(1 / 3, abs=0.07)
