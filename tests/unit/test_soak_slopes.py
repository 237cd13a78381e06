"""Tests of what a soak says about growth: no slope is no evidence."""

from __future__ import annotations

import collections
from types import SimpleNamespace
from typing import Any

import pytest

from bench import soak
from bench.lib.slopes import EVERY_SECONDS, Watch

NAMES = ("agent_resident", "gatekeeper_resident")


def watch(lives: list[float], each_minute: float = 0.0, names: tuple[str, ...] = NAMES) -> Watch:
    """Return a watch of processes that lived for these seconds one after the other, and grew by so many KiB."""
    watched, begun = Watch(dict), 0.0
    for pid, seconds in enumerate(lives):
        times = [begun + n * EVERY_SECONDS for n in range(int(seconds / EVERY_SECONDS))]
        for name in names:
            watched.samples[name, pid] = [(at, 1000 + each_minute * at / 60) for at in times]
        begun += seconds
    return watched


def report(monkeypatch: pytest.MonkeyPatch, watched: Watch, minutes: float) -> int:
    """Return the exit status of a soak without errors."""
    pytest.importorskip("scipy")
    monkeypatch.setattr(soak, "record", lambda *_: None)
    quiet: Any = SimpleNamespace(done=collections.Counter(), wrong=collections.Counter(), above=0)
    return soak.report(quiet, watched, minutes)


@pytest.mark.parametrize(
    "watched",
    [watch([]), watch([120] * 5), watch([600], names=NAMES[:1]), watch([600], names=NAMES[1:])],
    ids=["no sample", "short lives", "no gatekeeper", "no agent"],
)
def test_a_run_without_both_slopes_has_not_found_that_nothing_grows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], watched: Watch
) -> None:
    assert report(monkeypatch, watched, 10) == 1
    assert capsys.readouterr().out == "soak_grows unknown\n"


def test_a_short_run_may_be_without_slopes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(monkeypatch, watch([40]), 40 / 60) == 0
    assert capsys.readouterr().out == "soak_grows unknown\n"


def test_growth_is_an_error_and_its_absence_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(monkeypatch, watch([600]), 10) == 0
    assert report(monkeypatch, watch([600], each_minute=2.0), 10) == 1
    assert capsys.readouterr().out == "soak_grows nothing\nsoak_grows agent_resident gatekeeper_resident\n"


@pytest.mark.parametrize("minutes", [soak.SLOPE_MINUTES, 8.5, 10, 19.9, 20, 60, 120])
def test_a_run_with_the_default_interval_has_slopes(minutes: float) -> None:
    """The worst case: each restart takes ten seconds, and kills both processes."""
    pytest.importorskip("scipy")
    every, lives, left = soak.restart_seconds(minutes), [], minutes * 60
    while left > 0:
        lives.append(max(EVERY_SECONDS, min(every, left) - 10))
        left -= every
    assert watch(lives).slope("agent_resident")


def test_a_failed_sampling_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def pids() -> dict[str, int]:
        raise ValueError("no pid here")

    monkeypatch.setattr("bench.lib.slopes.EVERY_SECONDS", 0)
    failed = Watch(pids)
    failed.start()
    failed.join(60)
    failed.end()
    failed.samples.update(watch([600]).samples)
    assert report(monkeypatch, failed, 10) == 1
    assert "soak_grows unknown\n" in capsys.readouterr().out
