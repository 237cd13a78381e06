"""Tests of the bars of the hostile soak, of its figures, and of its search for what is left."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import pytest

from bench.lib import hostile_books, hostile_remains
from bench.lib.hostile_bars import Bar, ProcessorUse, highest_of_99_percent
from bench.lib.hostile_books import CONTEXT_REST_BYTES, DEVICE_REST_BYTES, Excess, compare
from bench.lib.hostile_remains import STAYING, Host, until_none

MIB = 1 << 20
TENANT = "/hostile/tenant"


def test_a_bar_is_missed_above_its_highest_figure_only() -> None:
    assert Bar("ping", 100.0, "ms", 100).line() == "hostile_bar_ping 100.00, at most 100 ms: met"
    assert Bar("ping", 100.01, "ms", 100).line() == "hostile_bar_ping 100.01, at most 100 ms: MISSED"
    assert Bar("left", 1, "", 0).line() == "hostile_bar_left 1.00, at most 0: MISSED"


@pytest.mark.parametrize(("values", "highest"), [([7.0], 7), (range(100), 99), (range(200), 198), (range(1000), 990)])
def test_one_percent_of_the_values_is_above_the_percentile(values: Sequence[float], highest: float) -> None:
    assert highest_of_99_percent(values) == highest


def test_the_processor_time_of_this_process_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    use, until = ProcessorUse({"this": os.getpid()}), time.process_time() + 0.2
    while time.process_time() < until:
        pass
    monkeypatch.setattr(time, "monotonic", lambda: use._began + 10)
    assert use.percent()["this"] == pytest.approx(2, abs=0.5)


def books(contexts: int, driver: float, exported: int) -> dict[str, Any]:
    """Return a dump of the simulated driver with an honest process, an ended one, and exported memory. Sizes: MiB."""
    device = {"driver_bytes": int((driver + exported) * MIB), "exported_bytes": exported * MIB}
    honest = {"pid": 1, "device": 0, "ended": False, "contexts": contexts, "bytes": 518 * MIB}
    ended = {"pid": 2, "device": 0, "ended": True, "contexts": 0, "bytes": 5 * MIB}
    return {"devices": [device], "processes": [honest, ended]}


def test_the_excess_of_the_estimate_lasts_for_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(hostile_books.time, "monotonic", lambda: now[0])
    excess, own = Excess(), 10 * 5.5625 + 3.25
    many = int(10 * CONTEXT_REST_BYTES + DEVICE_REST_BYTES - own * MIB)
    assert excess.look(books(10, own, 30)) == many == int(5.125 * MIB)
    now[0] += 4.9
    assert excess.look(books(1, 5.5625 + 3.25, 0)) == many
    now[0] += 0.2
    assert excess.look(books(1, 5.5625 + 3.25, 0)) == int(1.1875 * MIB)


@pytest.mark.parametrize(
    ("charged", "excess", "uncharged"), [(15, 0, False), (14, 0, True), (14, 1, False), (13, 1, True)]
)
def test_bytes_beyond_charge_and_excess_are_uncharged(charged: int, excess: int, uncharged: bool) -> None:
    """Ended processes and exports hold 15 MiB."""
    tenant = {"path": TENANT, "devices": [{"used_bytes": charged * MIB}], "processes": []}
    found = compare(books(1, 8.8125, 10), [tenant], TENANT, [1], excess * MIB)
    assert found.uncharged == ({"ended"} if uncharged else set())


def test_what_exists_beyond_an_earlier_state_is_left() -> None:
    before = Host(frozenset({"/a"}), frozenset({"/etc/x"}), frozenset(), frozenset({"1 init"}))
    after = Host(frozenset({"/a", "/a/b"}), frozenset(STAYING), frozenset({"/pin"}), frozenset({"2 agent"}))
    assert before.more(after) == {"cgroups: /a/b", "pins: /pin", "processes: 2 agent"}
    assert before.more(before) == set()


def test_the_processes_of_this_mount_namespace_are_found() -> None:
    assert any(line.startswith(f"{os.getpid()} ") for line in hostile_remains._processes())


def test_what_is_left_may_disappear_within_the_given_time() -> None:
    found = [{"b", "a"}, {"a"}, set[str]()]
    assert until_none(lambda: found.pop(0), 10) == []
    assert until_none(lambda: {"b", "a"}, 0.01) == ["a", "b"]
