"""Tests in simulated time of how long a tenant with many processes can delay others by false claims of work."""

from __future__ import annotations

import random

import pytest

from fgpu_ebpf.scheduling.claim_trust import BUDGET_NS, UNPROVEN_NS, Trust
from fgpu_ebpf.scheduling.fair_queue import Share
from fgpu_ebpf.scheduling.reports import Seen
from tests.unit.scheduling.slices_kit import MS, Hog, S, Tenant, World

WEIGHTS = (300, 200, 100)
HOSTILE, OUTER = 9, 100
WINDOW, STEP_SECONDS = 20, 0.1


class Garbage(Hog):
    """A tenant with an idle program and a program that leaves arbitrary bytes on its page.

    The latter runs for up to 0.3 s, and starts again up to 1.5 s later. The scheduler always reads its page as work
    that stays in flight for another second.
    """

    chance: random.Random
    world: World
    next_ns: int = 0
    is_there: bool = False
    said = (False, 0, 0, 0, True, 0, 0, 0)

    def act(self, now_ns: int, is_open: bool, believed_ns: int) -> None:
        if now_ns >= self.next_ns:
            if self.is_there and self.said[2]:
                self.world.turns.lose(self.key, now_ns)
                self.world._ring(self)
            self.is_there = not self.is_there
            self.next_ns = now_ns + self.chance.randrange(1, 300 if self.is_there else 1500) * MS
        if not self.is_there:
            self.said = (False, self.launches, 0, 0, True, 0, 0, 0)
            return
        self.launches += self.chance.randrange(3)
        self.said = (True, self.launches, 1, now_ns + S, False, now_ns, 0, 0)


class Arbitrary(Hog):
    """A program with arbitrary contents of its page, which change after at most twice `pause_ms`."""

    chance: random.Random
    world: World
    pause_ms: int = 2
    next_ns: int = 0
    said = (False, 0, 0, 0, True, 0, 0, 0)

    def act(self, now_ns: int, is_open: bool, believed_ns: int) -> None:
        if now_ns < self.next_ns:
            return
        any_of, until = self.chance.choice, (-MS, MS, 3 * MS, 50 * MS, 240 * MS, S)
        self.next_ns = now_ns + self.chance.randrange(1, 1 + 2 * self.pause_ms) * MS
        self.launches = any_of([self.launches, self.launches + 1, self.chance.randrange(2**62)])
        times = [any_of([0, now_ns, now_ns - self.chance.randrange(500) * MS]) for _ in range(3)]
        in_flight = any_of([0, 1, 1, 2**62])
        drained = not in_flight or any_of([True, False])
        waiting = any_of([True, True, False])
        self.said = (waiting, self.launches, in_flight, now_ns + any_of(until), drained, *times)
        if any_of([True, False]):
            self.world._ring(self)

    def seen(self) -> Seen:
        return Seen(self.devices, *self.said, self.chance.choice([0, MS, 10 * S]))


def least_share(it: World, honest: list[Tenant], seconds: float) -> float:
    """Return the smallest difference between a tenant's share in a window of 2 s and its part by weight, in points.

    It is below 0 if a tenant got less than its part.
    """
    done = [[tenant.done_ns for tenant in honest]]
    for _ in range(round(seconds / STEP_SECONDS)):
        it.run(STEP_SECONDS)
        done.append([tenant.done_ns for tenant in honest])
    whole = sum(WEIGHTS) + 100
    return min(
        100 * ((done[at + WINDOW][n] - done[at][n]) / (WINDOW * STEP_SECONDS * S) - weight / whole)
        for n, weight in enumerate(WEIGHTS)
        for at in range(len(done) - WINDOW)
    )


def neighbours() -> list[Tenant]:
    return [Tenant(n + 1, Share(weight=weight)) for n, weight in enumerate(WEIGHTS)]


@pytest.mark.parametrize("seed", [0, 3])
def test_a_program_that_exits_with_work_in_flight_proves_no_claim_and_costs_at_most_3_points(seed: int) -> None:
    """A program that exits before the claimed end of its work leaves nothing in flight, so its claim is not proven."""
    honest, hostile = neighbours(), Garbage(HOSTILE)
    it = World(*honest, hostile)
    hostile.chance, hostile.world = random.Random(seed), it
    assert least_share(it.run(1.0), honest, 30.0) >= -3
    assert it.turns.places[HOSTILE].counts[0].overruns >= 3, "the scheduler never waited in vain for the hostile tenant"
    assert not it.turns.places[HOSTILE].trust.standing.proven


@pytest.mark.parametrize("pause_ms", [2, 20])
def test_arbitrary_words_on_a_page_cost_honest_tenants_at_most_3_points_of_share(pause_ms: int) -> None:
    honest, hostile = neighbours(), Arbitrary(HOSTILE)
    it = World(*honest, hostile)
    hostile.chance, hostile.world, hostile.pause_ms = random.Random(pause_ms), it, pause_ms
    assert least_share(it.run(1.0), honest, 15.0) >= -3
    assert it.turns.places[HOSTILE].counts[0].overruns >= 3, "the scheduler never waited in vain for the hostile tenant"


def test_a_claim_of_an_exited_program_is_not_proven_by_the_next_program() -> None:
    """One program claims work of a second and exits. Another program starts, and drains before that second is over."""
    honest, hog = Tenant(1), Hog(2)
    it = World(honest, hog)
    place = it.turns.places[2]
    while not place.late_ns:
        it.run(0.005)
    it.turns.leave(2, it.now)
    hog.cunning, hog.lies = True, False
    it.rung |= {1, 2}
    it.run(0.9)
    assert place.counts[0].switches >= 3
    assert not place.trust.standing.proven
    assert place.trust.standing.pace_ns


def test_a_recreated_cgroup_delays_an_honest_tenant_by_less_than_60_ms() -> None:
    """Every 0.3 s the tenant continues in a new cgroup below its own, and claims a second of work there."""
    honest = Tenant(1)
    it = World(honest, outer={OUTER: Share()})
    for number in range(2, 22):
        it.turns.share_out({1: Share(), OUTER: Share(), number: Share()}, it.now)
        it.turns.nest(number, [OUTER], it.now)
        it.tenants = {1: honest, number: Hog(number)}
        it.rung, it.bell = {1, number}, it.now
        it.run(0.3)
        if number == 3:
            honest.waits_ns.clear()
        it.turns.leave(number, it.now)
    assert len(honest.waits_ns) > 20
    assert max(honest.waits_ns) < 60 * MS


def test_an_unproven_claim_is_never_trusted_for_longer_than_at_first() -> None:
    trust = Trust()
    trust.claims(S, S)
    trust.overran(S + UNPROVEN_NS)
    trust.forget_overrun()
    assert trust.believed_ns(S + UNPROVEN_NS) == BUDGET_NS
    assert trust.believed_ns(3600 * S) == UNPROVEN_NS


def test_a_true_claim_of_12_ms_does_not_prove_claims_and_a_true_claim_of_400_ms_does() -> None:
    """The first claim is false, so the bound falls to BUDGET_NS. Work of 12 ms that ends as claimed proves no claim."""
    trust = Trust()
    trust.claims(S, S)
    trust.overran(S + UNPROVEN_NS)
    trust.claims(2 * S, 12 * MS)
    trust.overran(2 * S + 5 * MS)
    trust.ended(2 * S + 12 * MS, 2 * S + 13 * MS)
    assert not trust.standing.proven
    trust.claims(3 * S, 400 * MS)
    trust.overran(3 * S + 5 * MS)
    trust.ended(3 * S + 400 * MS, 3 * S + 401 * MS)
    assert trust.standing.proven
