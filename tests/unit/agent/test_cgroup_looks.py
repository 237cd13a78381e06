"""Scans of cgroups alternate in slices of the loop's time. Each slice is followed by a pause of the same length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fgpu_ebpf.agent import sliced_looks
from fgpu_ebpf.agent.cgroup_looks import chunks, is_inside
from fgpu_ebpf.agent.sliced_looks import ALL, PAUSE, PAUSE_SECONDS, RESCAN_SECONDS, SLICE_SECONDS, Looks
from fgpu_ebpf.tenancy.unmanaged_cgroups import UnmanagedCgroups
from fgpu_ebpf.workloads.cgroups import Workloads

STEP_SECONDS = 0.004


class Loop:
    """A loop with simulated time. `steps` has the number of steps for each path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: dict[str, int]) -> None:
        self.now, self.steps, self.done = 1000.0, steps, Counter[str]()
        self.begun: list[str] = []
        monkeypatch.setattr(sliced_looks, "monotonic", lambda: self.now)
        self.looks = Looks(self._look)

    def _look(self, path: str) -> Iterator[None]:
        self.begun.append(path)
        for _ in range(self.steps[path]):
            self.now += STEP_SECONDS
            self.done[path] += 1
            yield

    def slice(self) -> float:
        """Sleep until the loop may continue the scans, and run one slice. Return the seconds that the slice took."""
        self.now += self.looks.wait(1.0)
        began = self.now
        self.looks.go_on()
        return self.now - began


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Loop]:
    return lambda **steps: Loop(monkeypatch, {ALL if path == "everything" else path: n for path, n in steps.items()})


def test_a_scan_takes_at_most_a_slice_and_then_pauses_as_long(loop):
    world = loop(large=1000)
    world.looks.ask("large")
    world.looks.keep()
    began = world.now
    taken = [world.slice() for _ in range(20)]
    assert all(0 < seconds <= SLICE_SECONDS + STEP_SECONDS for seconds in taken)
    assert sum(taken) <= (world.now - began) / 2 + SLICE_SECONDS


def test_scans_alternate(loop):
    world = loop(large=1000, small=3)
    for path in ("large", "small"):
        world.looks.ask(path)
    world.looks.keep()
    for _ in range(2):
        world.slice()
    assert world.done["small"] == 3


def test_a_long_scan_is_followed_by_a_long_pause(loop):
    world = loop(large=500)
    world.looks.ask("large")
    world.looks.keep()
    while world.done["large"] < 500 or world.looks.wait(1.0) < 1.0:
        world.slice()
    ended, spent = world.now, 500 * STEP_SECONDS
    assert PAUSE * spent > PAUSE_SECONDS
    world.looks.ask("large")
    while len(world.begun) < 2:
        world.now += 1.0
        world.looks.keep()
        world.slice()
        assert world.now < ended + 100
    assert world.now - ended >= PAUSE * spent


def test_a_scan_requested_during_a_scan_is_repeated(loop):
    world = loop(one=6)
    world.looks.ask("one")
    world.looks.keep()
    world.slice()
    world.looks.ask("one")
    for _ in range(10):
        world.now += PAUSE_SECONDS
        world.looks.keep()
        world.slice()
    assert world.begun == ["one", "one"]


def test_every_cgroup_is_scanned_every_half_minute(loop):
    world = loop(everything=2)
    world.looks.keep()
    assert world.begun == []
    for _ in range(3):
        world.now += RESCAN_SECONDS
        world.looks.keep()
        world.slice()
        world.slice()
    assert world.begun == [ALL] * 3


def test_a_failed_scan_ends_and_other_scans_continue(loop):
    world = loop(good=2)
    world.looks.ask("bad")  # it has no number of steps
    world.looks.ask("good")
    world.looks.keep()
    with pytest.raises(KeyError):
        world.slice()
    world.slice()
    assert world.done["good"] == 2
    assert world.looks.wait(1.0) == 1.0


# -- data that a scan uses


def test_a_decision_during_a_scan_is_kept():
    decided = {1: False, 2: False, 3: False}
    ledger = SimpleNamespace(not_managed=lambda: iter(list(decided)), forget=decided.pop)
    answered = UnmanagedCgroups(ledger, 10)  # type: ignore[arg-type]
    before = answered.known()
    decided[4] = False  # this decision follows after the scan has passed the cgroup
    answered.forget_gone(before, {None, 1, 3})
    assert sorted(decided) == [1, 3, 4]


def test_children_of_a_cgroup_are_found_with_their_ids(tmp_path: Path):
    (tmp_path / "a/b/c").mkdir(parents=True)
    (tmp_path / "a/cgroup.procs").touch()
    workloads = Workloads(tmp_path)
    assert list(workloads.inside("/a")) == [((tmp_path / "a/b").stat().st_ino, "/a/b")]
    assert list(workloads.inside("/gone")) == []
    assert list(workloads.walk()) == ["/a", "/a/b", "/a/b/c"]


def test_a_cgroup_is_inside_another_only_by_whole_names():
    assert is_inside("/a", "/a")
    assert is_inside("/a/b", "/a")
    assert is_inside("/a", ALL)
    assert not is_inside("/ab", "/a")


def test_chunks_contain_every_element():
    assert list(chunks(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks([], 3)) == []
