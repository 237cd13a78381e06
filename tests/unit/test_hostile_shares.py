"""Tests of the shares that the hostile soak reports, with records whose result is known."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from bench.lib.hostile_shares import KERNEL_NS, WINDOW_NS, Progress, Waits, windows
from tests.support.wait import eventually

MS, S = 1_000_000, 1_000_000_000


def record(folder: Path, *steps: tuple[int, int, int]) -> Path:
    file = folder / "honest"
    file.write_bytes(b"".join(struct.pack("=qqq", *step) for step in steps))
    return file


def test_kernels_of_a_step_are_spread_evenly_over_the_step(tmp_path: Path) -> None:
    progress = Progress(record(tmp_path, (100, 200, 10), (300, 400, 20)))
    found = [progress.until(at) for at in (0, 100, 150, 200, 250, 350, 400, 500)]
    assert found == [0, 0, 5, 10, 10, 20, 30, 30]


def test_a_window_in_which_a_program_runs_nothing_is_50_points_below_its_share(tmp_path: Path) -> None:
    """A program has half of the device's time for ten seconds without a pause, then nothing for three seconds."""
    per_second = S // 2 // KERNEL_NS
    steps = [(second * S, (second + 1) * S, per_second) for second in range(10)]
    waits = Waits([Path("/nowhere"), Path("/nowhere")])
    waits.end()
    found = windows([record(tmp_path, *steps)], [0.5], waits, 0, 13 * S)
    assert [one.points for one in found if one.at_seconds <= 8] == pytest.approx([0.0] * 41)
    assert min(one.points for one in found) == pytest.approx(-50)
    assert all(one.points == one.ready_points for one in found)


def test_time_without_a_processor_is_not_counted_as_waiting_for_a_turn(tmp_path: Path) -> None:
    program, gatekeeper = tmp_path / "program", tmp_path / "gatekeeper"
    for task in (program, gatekeeper):
        task.mkdir()
        (task / "schedstat").write_text("0 0 0")
    waits = Waits([program, gatekeeper])
    eventually(lambda: waits._at_ns)
    begun = time.monotonic_ns()
    for task in (program, gatekeeper):
        (task / "new").write_text(f"0 {WINDOW_NS // 10} 0")
        (task / "new").rename(task / "schedstat")
    written = time.monotonic_ns()
    eventually(lambda: waits._at_ns[-1] > written)
    waits.end()
    step = (begun, begun + 10 * WINDOW_NS, 10 * WINDOW_NS // KERNEL_NS * 4 // 10)
    first = windows([record(tmp_path, step)], [0.5], waits, begun, begun + 2 * WINDOW_NS)[0]
    assert first.waited == pytest.approx(0.2)
    assert first.points == pytest.approx(-10)
    assert first.ready_points == pytest.approx(0)
