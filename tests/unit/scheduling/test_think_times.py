"""Programs that synchronise each step: nothing is in flight while they think, and they still get their shares.

A step's work is followed by a think time, which includes the late wake-up of a thread. The shim's estimates of the work
in flight are too short or too long. Time is simulated.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fgpu_ebpf.scheduling.fair_queue import CREDIT_QUANTA, Account, Leave, Share
from fgpu_ebpf.scheduling.think_times import IDLE_NS, MOST_NS, ThinkTimes
from tests.unit.scheduling.slices_kit import MS, US, Loop, S, Steps, Tenant, World

WINDOW_SECONDS, WINDOWS = 2.0, 4
Think = Callable[[random.Random], float]


def short(chance: random.Random) -> float:
    """Return the time of a call that synchronises, and of the host's part of the next step."""
    return chance.uniform(10 * US, 300 * US)


def longer(chance: random.Random) -> float:
    return chance.uniform(100 * US, 1_500 * US)


def with_pauses(chance: random.Random) -> float:
    """Return a time with pauses: sometimes the program loads data, or its thread wakes up late."""
    return chance.uniform(1 * MS, 5 * MS) if chance.random() < 0.05 else short(chance)


def right(_: random.Random) -> float:
    return 1.0


def wrong(chance: random.Random) -> float:
    return chance.uniform(0.5, 1.3)


def program(key: int, weight: int, think: Think, guess: Think = right, step_ns: int = 2_800 * US) -> Tenant:
    """Return a program that launches kernels of 200 us, waits for all kernels of a step, and thinks."""
    chance = random.Random(key)
    loop = Loop(step_ns // (200 * US), lambda: int(think(chance)), lambda: guess(chance))
    return Tenant(key, Share(weight=100 * weight), steps=loop)


def parts(it: World, rates: dict[int, float]) -> list[dict[int, float]]:
    """Return the part of each tenant in windows of 2 s after the first, and in all windows together.

    `rates` is the part of the time in which a program that is alone has work in flight. Programs that are not listed
    have 1.0.
    """
    it.run(WINDOW_SECONDS)
    first = {key: tenant.done_ns for key, tenant in it.tenants.items()}
    found, before = [], first
    for _ in range(WINDOWS):
        it.run(WINDOW_SECONDS)
        now = {key: tenant.done_ns for key, tenant in it.tenants.items()}
        found.append({key: (now[key] - before[key]) / rates.get(key, 1.0) for key in now})
        before = now
    found.append({key: (before[key] - first[key]) / rates.get(key, 1.0) for key in before})
    return [{key: ns / sum(window.values()) for key, ns in window.items()} for window in found]


def assert_by_weight(it: World, rates: dict[int, float] | None = None) -> None:
    """Check the parts by weight: within 1 point over all windows, within 3 points in each."""
    weights = {key: tenant.share.weight for key, tenant in it.tenants.items()}
    *windows, whole = parts(it, rates or {})
    for key, weight in weights.items():
        entitled = weight / sum(weights.values())
        assert whole[key] == pytest.approx(entitled, abs=0.01)
        for window in windows:
            assert window[key] == pytest.approx(entitled, abs=0.03)


@pytest.mark.parametrize("guess", [right, wrong])
@pytest.mark.parametrize("think", [short, longer, with_pauses])
@pytest.mark.parametrize("weights", [(3, 1), (1, 1)])
def test_programs_that_synchronise_each_step_get_their_shares(
    weights: tuple[int, ...], think: Think, guess: Think
) -> None:
    assert_by_weight(World(*(program(n + 1, weight, think, guess) for n, weight in enumerate(weights))))


@pytest.mark.parametrize("think", [short, longer])
def test_a_program_that_synchronises_gets_its_share_beside_one_that_does_not(think: Think) -> None:
    """A part is relative to the work that the program does alone, because its turns include its think times."""
    alone = World(program(1, 3, think)).run(4.0).tenants[1].done_ns / (4.0 * S)
    assert_by_weight(World(program(1, 3, think, wrong), Tenant(2)), {1: alone})


@pytest.mark.parametrize("think", [short, longer])
def test_short_think_times_cost_at_most_3_percent_of_the_work_of_a_lone_program(think: Think) -> None:
    """An owner keeps its turn during such a think time, so two programs lose only the time of the changes of turns."""
    alone = World(program(1, 1, think)).run(4.0).tenants[1].done_ns
    pair = World(program(1, 3, think, wrong), program(2, 1, think, wrong)).run(4.0)
    assert sum(tenant.done_ns for tenant in pair.tenants.values()) >= 0.97 * alone


@pytest.mark.parametrize("late_part", [0.1, 0.5])
@pytest.mark.parametrize("kernel_ms", [4, 8])
@pytest.mark.parametrize("think_us", [50, 250])
def test_kernels_that_outlast_their_estimates_do_not_change_the_division_of_time(
    think_us: int, kernel_ms: int, late_part: float
) -> None:
    """Some kernels take five times as long as estimated, so their owner seems to be idle, and its gates are closed.

    The owner requests its next turn before or after the scheduler has noticed the end of the kernel: it notices the end
    after 200 us.
    """

    def guess(chance: random.Random) -> float:
        return 0.2 if chance.random() < late_part else 1.0

    tenants = [
        program(key, weight, lambda _: think_us * US, guess, step_ns=200 * US) for key, weight in ((1, 3), (2, 1))
    ]
    for tenant in tenants:
        tenant.kernel_ns = kernel_ms * MS  # a step is one kernel
    assert_by_weight(World(*tenants))


@pytest.mark.parametrize("is_alternating", [False, True])
def test_the_device_does_not_wait_for_a_tenant_that_does_not_report_the_end_of_its_work(is_alternating: bool) -> None:
    """The tenant launches without a synchronise, at every step or every second one, and then computes on the host."""
    unaware, busy = program(1, 1, lambda _: 0, step_ns=1 * MS), Tenant(2)
    unaware.unaware = True

    def thinks() -> int:
        unaware.unaware ^= is_alternating
        return 10 * MS

    unaware.steps = Loop(5, thinks)
    World(unaware, busy).run(8.0)
    assert busy.done_ns > 0.68 * 8.0 * S  # without this, 0.55


def one_kernel(think_ns: int, late_part: float, kind: type[Tenant] = Tenant) -> Tenant:
    """Return a program with steps of one kernel of 8 ms. A part of the kernels is estimated as five times as short."""
    chance = random.Random(1)
    loop = Loop(1, lambda: think_ns, lambda: 0.2 if chance.random() < late_part else 1.0)
    return kind(1, steps=loop, kernel_ns=8 * MS)


def test_a_tenant_that_requests_its_next_turn_as_its_turn_ends_keeps_its_lag() -> None:
    """The tenant does not synchronise, so each of its turns ends when a thread arrives at the closed gate."""
    unaware, busy = program(1, 1, lambda _: 3 * MS), Tenant(2)
    unaware.unaware = True
    World(unaware, busy).run(8.0)
    assert unaware.done_ns > 0.2 * 8.0 * S  # without the lag, 0.10
    assert busy.done_ns > 0.52 * 8.0 * S  # if the device waited for reported ends, 0.485


class TwoThreads(Tenant):
    """A program with a second thread, which waits at the gate whenever it is closed."""

    def tell(self) -> None:
        super().tell()
        if self.closed_ns > self.begun_ns:
            wanted_ns = self.wanted_ns if self.waiting else self.closed_ns
            self.said = (True, *self.said[1:5], wanted_ns, *self.said[6:])


def test_a_second_thread_at_the_gate_gains_nothing() -> None:
    tenant, busy = one_kernel(250 * US, 0.5, TwoThreads), Tenant(2)
    assert World(tenant, busy).run(8.0).shares()[1] <= 0.5 + 0.01


def test_a_tenant_with_long_think_times_gets_no_turn_in_advance() -> None:
    """The turn would be over before the tenant launches."""
    tenant, busy = one_kernel(10 * MS, 1.0), Tenant(2)
    World(tenant, busy).run(8.0)
    assert tenant.done_ns > 0.38 * 8.0 * S  # with such turns, 0.25
    assert busy.done_ns > 0.57 * 8.0 * S


def test_a_stopped_tenant_gains_no_credit_by_turns_without_work() -> None:
    stopped, busy = Tenant(1), Tenant(2)
    it = World(stopped, busy).run(2.0)
    stopped.stopped = True
    it.run(1.0)
    before, stopped.stopped = it.tenants[1].done_ns, False
    it._ring(stopped)
    it.run(1.0)
    assert stopped.done_ns - before <= 0.53 * S


def test_no_turn_passes_with_work_in_flight() -> None:
    it = World(program(1, 3, with_pauses, wrong), program(2, 1, with_pauses, wrong)).run(10.0)
    assert [place.counts[0].overruns for place in it.turns.places.values()] == [0, 0]


def test_no_turn_overruns_because_the_next_turn_delays_its_last_kernel() -> None:
    """The first launch of the next turn takes 2 ms of the device from the last kernel of a turn."""
    it = World(Tenant(1, kernel_ns=13 * MS), Tenant(2, kernel_ns=13 * MS), slice_ns=2 * MS)
    for _ in range(8000):
        it.run(0.0005)  # begins with a step, so no deadline passes unnoticed
    assert it.counted() > 100
    assert [place.counts[0].overruns for place in it.turns.places.values()] == [0, 0]


@settings(max_examples=12, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=8),
    st.sampled_from([1 * MS, 2_800 * US, 6 * MS]),
    st.sampled_from([short, longer, with_pauses]),
    st.sampled_from([right, wrong]),
)
def test_time_is_divided_by_weight_with_any_think_times(
    weights: list[int], step_ns: int, think: Think, guess: Think
) -> None:
    assert_by_weight(World(*(program(n + 1, weight, think, guess, step_ns) for n, weight in enumerate(weights))))


def test_a_tenant_that_leaves_with_each_step_gains_nothing_over_its_share() -> None:
    """The tenant thinks for longer than any owner keeps its turn.

    Each of its turns therefore ends while it is behind the virtual clock, and it returns with that credit.
    """
    leaver, busy = program(1, 1, lambda _: 4 * MS, step_ns=10 * MS), Tenant(2)
    it = World(leaver, busy).run(10.0)
    assert it.shares()[1] <= 0.5 + 0.01


def test_a_false_report_of_think_times_gains_nothing() -> None:
    """The tenant reports at each step that it has rested for 10 s."""
    liar, honest = program(1, 1, longer, wrong), program(2, 1, longer, wrong)
    liar.restless = True
    it = World(liar, honest).run(10.0)
    assert it.shares()[1] <= 0.5 + 0.01


@pytest.mark.parametrize("pause_ms", [30, 100, 400])
def test_an_occasional_tenant_delays_its_neighbour_by_at_most_two_quanta(pause_ms: int) -> None:
    visitor = Tenant(1, steps=Steps(50 * MS, (50 + pause_ms) * MS))
    busy = Tenant(2)
    it = World(visitor, busy).run(2.0)
    busy.longest_wait_ns = 0
    it.run(8.0)
    assert busy.longest_wait_ns <= (2 * 20 + 2 + 2) * MS
    assert busy.done_ns >= 0.48 * 10 * S


def test_an_owner_without_work_delays_its_neighbour_by_a_tenth_of_a_quantum_at_most() -> None:
    """The owner has thought for 0.9 ms each time, and does not return."""
    owner, other = program(1, 1, lambda _: 900 * US), Tenant(2)
    it = World(owner, other).run(1.0)
    while not (it.is_open(owner) and it.turns.places[1].turn and not owner.flights):
        it.run(0.0001)
    owner.steps, began = Steps(0, 60 * S, 60 * S + it.now), it.now
    while not it.is_open(other):
        it.run(0.0001)
    assert it.now - began <= MOST_NS + 1 * MS


def test_the_wait_for_a_thinking_owner_adapts_and_is_bounded() -> None:
    thinks = ThinkTimes()
    assert thinks.patience_ns(20 * MS) == IDLE_NS
    for ns in [100 * US] * 15 + [60 * S]:
        thinks.add(ns)
    assert thinks.patience_ns(20 * MS) == IDLE_NS, "the patience is below its minimum"
    for _ in range(16):
        thinks.add(700 * US)
    assert thinks.patience_ns(20 * MS) == 1_400 * US
    assert thinks.patience_ns(10 * MS) == 1_000 * US, "the patience exceeds a tenth of the quantum"
    for _ in range(8):
        thinks.add(5 * MS)
    assert thinks.patience_ns(20 * MS) == 1_400 * US, "rare long pauses change the patience"
    for _ in range(5):
        thinks.add(5 * MS)
    assert thinks.patience_ns(20 * MS) == IDLE_NS, "the owner waits in vain for long pauses"


def test_the_credit_of_a_tenant_that_left_expires_after_some_quanta() -> None:
    share = Share(weight=200)
    left = Leave(1 * S, 7 * MS)
    assert left.credit_ns(1 * S + 1 * MS, share) == 7 * MS
    assert left.credit_ns(1 * S + CREDIT_QUANTA * share.quantum_ns - 4 * MS, share) == 2 * MS
    assert left.credit_ns(60 * S, share) == 0
    assert Leave().credit_ns(1 * S, share) == 0
    assert Account(3 * MS).joining(9 * MS - 7 * MS).virtual_ns == 3 * MS


def test_a_limit_that_is_lifted_leaves_no_credit() -> None:
    limited, busy = Tenant(1, Share(limit_millionths=100_000)), Tenant(2)
    it = World(limited, busy).run(5.0)
    it.turns.share_out({1: Share(), 2: Share()}, it.now)
    it._ring()
    before, busy.longest_wait_ns = busy.done_ns, 0
    it.run(1.0)
    assert busy.longest_wait_ns <= (2 * 20 + 4) * MS
    assert busy.done_ns - before > 0.48 * S
