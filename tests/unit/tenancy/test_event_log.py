"""Tests of the event log: repeated events are combined, but every action of an administrator is reported."""

from __future__ import annotations

import pytest

from fgpu_ebpf.tenancy import event_log
from fgpu_ebpf.tenancy.event_log import AGAIN_SECONDS, FEW_KINDS, MOST, MOST_KINDS, REMEMBERED_SECONDS, EventLog


def told(one: EventLog) -> list[tuple[str, int, int]]:
    return [(h["what"], h["bytes"], h["more"]) for h in one.since(0)["events"]]


def test_equal_events_are_reported_once_a_second_with_their_count(monkeypatch: pytest.MonkeyPatch) -> None:
    one, now = EventLog(), 100.0
    monkeypatch.setattr(event_log.time, "monotonic", lambda: now)
    for bytes_ in (1, 2, 3):
        one.add("refused", tenant="a", bytes=bytes_)
    one.add("refused", tenant="b", bytes=4)
    now += 1
    one.add("refused", tenant="a", bytes=5)
    assert told(one) == [("refused", 1, 0), ("refused", 4, 0), ("refused", 5, 2)]


def test_actions_by_hand_are_reported_every_time() -> None:
    one = EventLog()
    for bytes_ in (1, 2, 2):
        one.add("set", tenant="a", bytes=bytes_)
    assert told(one) == [("set", 1, 0), ("set", 2, 0), ("set", 2, 0)]


def test_the_number_of_remembered_kinds_of_events_stays_bounded_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one, now = EventLog(), 100.0
    monkeypatch.setattr(event_log.time, "monotonic", lambda: now)
    for number in range(100 * FEW_KINDS):
        now += AGAIN_SECONDS
        one.add("refused", tenant=str(number))
        one.add("refused", tenant=str(number))
    assert len(one._told) <= FEW_KINDS


@pytest.mark.parametrize(("seconds", "more"), [(REMEMBERED_SECONDS - 1, 2), (REMEMBERED_SECONDS, 0)])
def test_counts_are_kept_for_a_minute(monkeypatch: pytest.MonkeyPatch, seconds: float, more: int) -> None:
    one, now = EventLog(), 100.0
    monkeypatch.setattr(event_log.time, "monotonic", lambda: now)
    for _ in range(3):
        one.add("refused", tenant="often")
    now += seconds
    for number in range(FEW_KINDS):
        one.add("refused", tenant=str(number))
    one.add("refused", tenant="often", bytes=7)
    assert told(one)[-1] == ("refused", 7, more)


def test_many_kinds_of_events_at_once_are_each_reported_once_and_their_record_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = EventLog()
    monkeypatch.setattr(event_log.time, "monotonic", lambda: 100.0)
    for _ in range(2):
        for number in range(10 * FEW_KINDS):
            one.add("refused", tenant=str(number))
    assert one.since(0)["last"] == 10 * FEW_KINDS
    for number in range(2 * MOST_KINDS):
        one.add("refused", tenant=str(number))
    assert len(one._told) <= MOST_KINDS


def test_the_event_log_keeps_a_bounded_number_of_events_and_counts_forgotten_events() -> None:
    one = EventLog()
    for number in range(MOST + 23):
        one.add("refused", tenant=str(number))
    assert len(one.since(0)["events"]) == MOST
    assert one.since(0)["forgotten"] == 23


def test_the_same_event_of_another_device_is_another_event() -> None:
    events = EventLog()
    for gpu in (0, 1, 0):
        events.add("failed", gpu=gpu, text="79")
    assert [event["gpu"] for event in events.since(0)["events"]] == [0, 1]


def test_any_number_may_be_the_last_that_a_reader_has_seen() -> None:
    events = EventLog()
    events.add("failed")
    assert events.since(10**30)["events"] == events.since(1)["events"] == []
    assert len(events.since(-(10**30))["events"]) == 1
