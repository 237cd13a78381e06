"""Tests of the scan of all processes: it does not block on any process, and a slow cgroup does not delay others."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fgpu_ebpf.driver import process_scan
from fgpu_ebpf.driver.libraries import Job, Taken
from fgpu_ebpf.driver.library_search import Found
from fgpu_ebpf.driver.process_scan import HostScan, Scanned
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.linux.mapped_files import MappedFile
from fgpu_ebpf.linux.worker_threads import Workers
from tests.support.wait import Deadline

HOSTILE, HONEST = "/user/hostile", "/honest"
ONE = MappedFile("/lib/libcuda.so.1", 1, 2)
Read = Callable[[int], Found]


class World:
    """Processes of two cgroups, and threads that examine them. `share` is the number of jobs that a cgroup may have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, read: Read, share: int = 1000) -> None:
        self.pids = {10: HOSTILE, 11: HOSTILE, 12: HOSTILE, 20: HONEST, 21: HONEST}
        self.jobs, self.share = Counter[str](), share
        self.seen: list[int] = []
        self.ended: list[Scanned] = []
        self.workers = Workers[str, Job, Taken](lambda job: job(), lambda _: True, lambda: None, few=2)
        self.owners: list[str] = []  # the argument of each call of owner_of()
        self.scan = HostScan(self.work, self.owner_of, read, lambda pid, _, found: self.seen.append(pid))
        monkeypatch.setattr(procfs, "pids", lambda: list(self.pids))
        monkeypatch.setattr(procfs, "cgroup_path", self.pids.__getitem__)
        monkeypatch.setattr(procfs, "has_memory", lambda _: True)

    def owner_of(self, path: str) -> str:
        self.owners.append(path)
        return path

    def work(self, cgroup: str, job: Job) -> bool:
        self.jobs[cgroup] += 1
        if self.jobs[cgroup] > self.share:
            return False
        queued = self.workers.want(cgroup, job)
        self.workers.go()
        return queued

    def begin(self) -> None:
        self.scan.begin(self.ended.append)

    def until(self, true: Callable[[], object], seconds: float = 10) -> None:
        """Apply the threads' results until `true` returns a true value, within `seconds`."""
        deadline = Deadline(seconds)
        while not true():
            assert not deadline.is_over(), f"not within {seconds} s"
            time.sleep(0.002)
            self.workers.go()
            for done in self.workers.take():
                done.result()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Return an event. Jobs that hang wait for it."""
    event = threading.Event()
    yield event
    event.set()


def test_every_process_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, lambda pid: Found([ONE] if pid == 20 else []))
    world.begin()
    world.until(lambda: world.ended)
    (found,) = world.ended
    assert sorted(found.pids) == sorted(world.seen) == [10, 11, 12, 20, 21]
    assert (found.used, found.left_out, found.is_whole) == ({(1, 2)}, [], True)
    assert sorted(world.owners) == sorted({HOSTILE, HONEST}), "the owner of a cgroup is searched once, in each scan"


def test_only_one_scan_runs_at_a_time(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> None:
    world = World(monkeypatch, lambda pid: Found([]) if gate.wait(5) else Found(None))
    world.begin()
    world.begin()
    gate.set()
    world.until(lambda: world.ended)
    assert (len(world.ended), world.jobs[""]) == (1, 1)
    world.begin()
    world.until(lambda: len(world.ended) == 2)


def test_slow_processes_are_examined_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_scan, "SLICE_SECONDS", 0.0)
    world = World(monkeypatch, lambda pid: Found([]))
    world.begin()
    world.until(lambda: world.ended)
    assert world.jobs == {"": 1, HOSTILE: 3, HONEST: 2}
    assert sorted(world.seen) == [10, 11, 12, 20, 21]


def test_processes_beyond_the_share_of_their_cgroup_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_scan, "SLICE_SECONDS", 0.0)
    world = World(monkeypatch, lambda pid: Found([]), share=2)
    world.begin()
    world.until(lambda: world.ended)
    assert sorted(world.seen) == [10, 11, 20, 21]
    assert (world.ended[0].left_out, world.ended[0].is_whole) == ([12], True)


def test_a_process_that_cannot_be_read_is_reported_as_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, lambda pid: Found(None if pid == 21 else []))
    world.begin()
    world.until(lambda: world.ended)
    assert world.ended[0].left_out == [21]


@pytest.mark.parametrize("where", ["of all", "of one"])
def test_a_failure_ends_the_scan_of_one_cgroup_or_of_all_and_allows_the_next_scan(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def read(pid: int) -> Found:
        if world.pids[pid] == HOSTILE:
            raise OSError("too many open files")
        return Found([])

    world = World(monkeypatch, read)
    if where == "of all":
        monkeypatch.setattr(procfs, "pids", lambda: [1 / 0])
    world.begin()
    world.until(lambda: world.ended)
    (found,) = world.ended
    assert (found.is_whole, sorted(found.left_out)) == ((True, [10, 11, 12]) if where == "of one" else (False, []))
    assert world.seen == ([20, 21] if where == "of one" else [])
    world.begin()
    world.until(lambda: len(world.ended) == 2)


def test_a_process_that_hangs_does_not_prevent_the_scan_of_other_cgroups(
    monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    monkeypatch.setattr(process_scan, "MOST_SECONDS", 0.3)

    def read(pid: int) -> Found:
        if pid == 11:
            gate.wait(20)
        return Found([])

    world = World(monkeypatch, read)
    world.begin()
    world.until(lambda: sorted(world.seen) == [20, 21])
    assert not world.ended
    time.sleep(0.3)
    world.begin()  # the previous scan is abandoned
    assert (sorted(world.ended[0].left_out), world.ended[0].is_whole) == ([10, 11, 12], True)
    world.until(lambda: sorted(world.seen) == [20, 20, 21, 21])
    gate.set()
    world.until(lambda: len(world.ended) == 2)
    assert world.ended[1].left_out == []


def test_a_scan_that_cannot_start_is_reported_as_not_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = World(monkeypatch, lambda _: Found([]), share=0)
    world.begin()
    assert (world.ended[0].is_whole, world.ended[0].used) == (False, set())
