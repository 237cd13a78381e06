"""A tenant is due only after a time in which every look found it idle; a refused one is tried more and more rarely."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.agent.idle_tenants import MOST_AGAIN, MOST_PAUSE, Idleness, Look

AFTER = 10.0
ONE, OTHER = 1, 2


def idle(signs: int = 0, after: float = AFTER) -> Look:
    return Look(after, signs, is_busy=False)


BUSY = Look(AFTER, 0, is_busy=True)


def due_at(idleness: Idleness, looks: dict[int, Look], seconds: range) -> list[int]:
    """Return the seconds at which the first tenant is due, with one look a second."""
    return [now for now in seconds if ONE in idleness.look(now, looks)]


def test_an_idle_tenant_is_due_after_its_time_and_not_before() -> None:
    assert due_at(Idleness(), {ONE: idle()}, range(100, 113)) == [110, 111, 112]


@pytest.mark.parametrize(("what", "due"), [(BUSY, 119), (idle(1), 120)])
def test_a_busy_look_and_a_call_begin_the_time_anew(what: Look, due: int) -> None:
    idleness = Idleness()
    assert due_at(idleness, {ONE: idle()}, range(100, 109)) == []
    assert idleness.look(109, {ONE: what}) == []
    assert due_at(idleness, {ONE: idle()}, range(110, 121))[0] == due


def test_a_time_without_looks_begins_the_time_anew() -> None:
    idleness, gap = Idleness(), int(MOST_PAUSE) + 1
    assert due_at(idleness, {ONE: idle()}, range(100, 109)) == []
    assert due_at(idleness, {ONE: idle()}, range(108 + gap, 108 + gap + 11)) == [108 + gap + 10]


def test_a_tenant_that_is_left_out_once_begins_anew() -> None:
    idleness = Idleness()
    due_at(idleness, {ONE: idle()}, range(100, 109))
    idleness.look(109, {})
    assert due_at(idleness, {ONE: idle()}, range(110, 121)) == [120]


def test_the_longest_idle_tenant_is_first_whatever_its_time() -> None:
    idleness = Idleness()
    idleness.look(98, {ONE: idle(after=12)})
    for now in range(100, 111):
        due = idleness.look(now, {OTHER: idle(), ONE: idle(after=12)})
    assert due == [ONE, OTHER]


def test_a_refused_tenant_is_tried_again_after_twice_the_time_up_to_an_hour() -> None:
    idleness, tried, now = Idleness(), [], 0
    while len(tried) < 13:
        if idleness.look(now, {ONE: idle()}):
            tried.append(now)
            idleness.failed(now, ONE)
        now += 1
    pauses = [after - before for before, after in itertools.pairwise(tried)]
    assert pauses[:4] == [20, 40, 80, 160]
    assert set(pauses[9:]) == {int(MOST_AGAIN)}


def test_a_refused_tenant_that_has_worked_is_tried_after_its_time() -> None:
    idleness = Idleness()
    assert due_at(idleness, {ONE: idle()}, range(11)) == [10]
    for _ in range(8):
        idleness.failed(10, ONE)
    assert due_at(idleness, {ONE: idle(1)}, range(11, 22)) == [21]


def test_the_time_until_a_tenant_is_due_is_told() -> None:
    idleness = Idleness()
    assert (idleness.seconds(5, ONE), idleness.due_in(5, ONE, AFTER)) == (0, AFTER)
    due_at(idleness, {ONE: idle()}, range(5, 10))
    assert (idleness.seconds(9, ONE), idleness.due_in(9, ONE, AFTER)) == (4, 6)
    due_at(idleness, {ONE: idle()}, range(10, 16))
    idleness.failed(15, ONE)
    assert idleness.due_in(16, ONE, AFTER) == 19


@given(
    st.lists(st.tuples(st.floats(0.5, 7), st.booleans(), st.integers(0, 1)), max_size=60), st.sampled_from([10.0, 20.0])
)
def test_no_look_within_the_time_before_has_found_a_sign_of_work(
    steps: list[tuple[float, bool, int]], after: float
) -> None:
    idleness, now, seen = Idleness(), 0.0, list[tuple[float, Look]]()
    for pause, is_busy, signs in steps:
        now += pause
        look = Look(after, signs, is_busy)
        seen.append((now, look))
        if not idleness.look(now, {ONE: look}):
            continue
        first = max(i for i, (at, _) in enumerate(seen) if now - at >= after)
        window = seen[first:]
        assert {found.signs for _, found in window} == {signs}
        assert not any(found.is_busy for _, found in window[1:])
        assert all(b[0] - a[0] <= MOST_PAUSE for a, b in itertools.pairwise(window))
