"""Tests of memory that outlives its process: the search for its keepers, the time of its report, and the texts."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf.agent.nvml_reconcile import Truth
from fgpu_ebpf.agent.reporters import TOLD_AGE_NS, OrphanReports
from fgpu_ebpf.driver import descriptor_holders
from fgpu_ebpf.driver.descriptor_holders import Held, Keepers, descriptors, find, parent
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.tenancy import orphan_text
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.gone_tenants import FRESH_SECONDS, GoneTenants, left_behind
from tests.unit.orphan_kit import MIB, Books, orphan, tenant

Start = Callable[..., subprocess.Popen[bytes]]
NONE = frozenset[int]().__contains__  # no cgroup has a limit that counts


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """Return a file that stands for a device node of the driver."""
    path = tmp_path / "nvidiactl"
    path.touch()
    return path


@pytest.fixture
def keeper(node: Path) -> Iterator[Start]:
    """Return a function that starts processes which have the node open."""
    started = []

    def start(**options: Any) -> subprocess.Popen[bytes]:
        with node.open() as file:
            started.append(subprocess.Popen(["sleep", "60"], pass_fds=[file.fileno()], **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def _beside_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore programs of other tests in the same cgroup, which have such descriptors too."""
    monkeypatch.setattr(descriptor_holders, "MOST_KEEPERS", 1 << 20)


def here() -> str:
    path = procfs.cgroup_path(os.getpid())
    assert path
    return path


# -- keepers


def test_only_processes_that_have_the_node_open_are_found(keeper: Start) -> None:
    kept = keeper()
    with subprocess.Popen(["sleep", "60"]) as other:
        found = find(Held(1 << 22, (here(),)))
        other.kill()
    assert kept.pid in found
    assert other.pid not in found


def test_the_parent_of_a_process_is_reported_unless_it_is_init() -> None:
    """Init is no parent: it adopts each process whose parent has exited."""
    assert parent(os.getpid()) == (os.getppid() if os.getppid() != 1 else 0)
    assert (parent(1), parent(1 << 22)) == (0, 0)
    with subprocess.Popen(["sh", "-c", "echo $$; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert parent(child.pid) == os.getpid()


def test_only_a_relative_of_the_ended_process_is_named(keeper: Start) -> None:
    keeper()
    child = keeper(start_new_session=True)
    assert find(Held(child.pid, (here(),))) == (child.pid,)


def test_a_cgroup_whose_name_is_a_prefix_is_another_cgroup(keeper: Start) -> None:
    keeper()
    assert find(Held(1 << 22, (here()[:-1] or "/x",))) == ()


def test_the_outer_cgroup_is_searched_if_the_innermost_has_no_keeper(keeper: Start) -> None:
    kept = keeper()
    assert kept.pid in find(Held(1 << 22, ("/no/such/cgroup", here())))


def test_processes_of_other_cgroups_do_not_use_up_the_search(keeper: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, paths = keeper(), {1: "/elsewhere", 2: "/elsewhere"}
    monkeypatch.setattr(descriptor_holders, "MOST_PROCESSES", 1)
    monkeypatch.setattr(procfs, "pids", lambda: [1, 2, kept.pid])
    monkeypatch.setattr(procfs, "cgroup_path", lambda pid: paths.get(pid, "/a"))
    assert find(Held(1 << 22, ("/a",))) == (kept.pid,)


def test_an_ended_process_has_no_descriptors() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert descriptors(ended.pid, 9) == []


def test_no_more_descriptors_are_read_than_asked_for() -> None:
    with socket.socket(), socket.socket():
        assert len(descriptors(os.getpid(), 2)) == 2


def test_one_search_serves_all_orphans_of_a_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant can have thousands of orphans, and each search reads the cgroup of each process of the host."""
    searched, keepers = [], Keepers()
    monkeypatch.setattr(procfs, "pids", lambda: searched.append(1) or [])

    def end(_: float) -> None:
        keepers._held = ()

    monkeypatch.setattr(descriptor_holders.time, "sleep", end)
    keepers._held = [Held(pid, ("/a", "/")) for pid in range(1, 51)]
    keepers._run()
    assert len(searched) == 2


def test_a_thread_finds_keepers_and_later_drops_them(keeper: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptor_holders, "PERIOD_SECONDS", 0.01)
    kept, keepers = keeper(start_new_session=True), Keepers()
    assert keepers.of(kept.pid) == ()
    keepers.look([Held(kept.pid, (here(),))])
    deadline = time.monotonic() + 20
    while not keepers.of(kept.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert keepers.of(kept.pid) == (kept.pid,)
    assert keepers.parents_of(kept.pid) == (os.getpid(),)
    keepers.look([])
    assert keepers.of(kept.pid) == keepers.parents_of(kept.pid) == ()
    assert keepers._thread
    keepers._thread.join(20)
    assert not keepers._thread.is_alive()
    keepers.look([Held(kept.pid, (here(),))])
    assert keepers._thread.is_alive(), "it runs again for other orphans"
    keepers.look([])


# -- reports


class Reports:
    """OrphanReports of one tenant. `asked` is the list of the searches for keepers."""

    def __init__(self, *gone: Any) -> None:
        self.truth, self.history, self.asked = Truth(), EventLog(), list[list[Held]]()
        manager = SimpleNamespace(enforcer=[tenant()], gone=gone)
        keepers = SimpleNamespace(look=self.asked.append, of=lambda pid: (4711,) if pid == 11 else ())
        self._reports = OrphanReports(lambda: self.truth, manager, keepers, self.history)  # type: ignore[arg-type]

    def told(self) -> list[dict[str, Any]]:
        self._reports.look()
        return list(self.history.since(0)["events"])


def aged(age_ns: int) -> int:
    return time.monotonic_ns() - age_ns


def test_an_orphan_is_reported_once_when_it_is_old_enough() -> None:
    reports = Reports()
    reports.truth = Truth(orphans=(orphan(since_ns=aged(TOLD_AGE_NS // 2)),))
    assert reports.told() == []
    assert reports.asked == [[Held(11, ("/a", "/"))]], "keepers are searched before the report"
    reports.truth = Truth(orphans=(orphan(since_ns=aged(2 * TOLD_AGE_NS)),))
    for _ in range(2):
        (event,) = reports.told()
    named = {key: event[key] for key in ("what", "tenant", "pid", "gpu", "bytes", "reason", "text")}
    assert named == {
        "what": "orphaned", "tenant": "a", "pid": 11, "gpu": 0, "bytes": MIB, "reason": "ended",
        "text": "kept by pid 4711",
    }  # fmt: skip


def test_keepers_of_a_process_that_has_just_ended_are_not_searched() -> None:
    reports = Reports()
    reports.truth = Truth(orphans=(orphan(since_ns=aged(0)),))
    reports.told()
    assert reports.asked == [[]]


def test_an_export_without_a_keeper_is_reported_as_such() -> None:
    reports = Reports()
    reports.truth = Truth(orphans=(orphan(tgid=12, ended_ns=0, since_ns=aged(2 * TOLD_AGE_NS)),))
    (event,) = reports.told()
    assert (event["reason"], event["text"]) == ("exported", "no process that keeps the memory was found")


def test_an_orphan_is_reported_with_its_tenant_although_the_cgroup_is_removed() -> None:
    reports = Reports(tenant(cgroup=9, path="/b"))
    reports.truth = Truth(orphans=(orphan(levels=(9,), since_ns=aged(2 * TOLD_AGE_NS)),))
    assert [event["tenant"] for event in reports.told()] == ["a"]
    assert reports.asked[-1] == [Held(11, ("/b", "/"))]


# -- texts


def row(**more: Any) -> dict[str, Any]:
    return {"pid": 11, "gpu": 0, "bytes": 5 * MIB, "seconds": 2.0, "ended": True, "keepers": (4711,)} | more


@pytest.mark.parametrize(
    ("orphan_row", "sentence"),
    [
        (
            row(),
            "5MiB on gpu 0 stay charged for process 11, which has ended: kept by pid 4711; "
            "end this process, or make the program close the driver's descriptors",
        ),
        (
            row(ended=False, keepers=(1, 2)),
            "5MiB on gpu 0 stay charged for process 11, which exported and freed these bytes: kept by pid 1, 2; "
            "end these processes, or make the program close the driver's descriptors",
        ),
        (
            row(parents=(4700,)),
            "5MiB on gpu 0 stay charged for process 11, which has ended: kept by pid 4711; "
            "end pid 4711, a child of 4700, or make the program close the driver's descriptors",
        ),
        (
            row(keepers=(1, 2), parents=(0, 9)),
            "5MiB on gpu 0 stay charged for process 11, which has ended: kept by pid 1, 2; "
            "end pid 1 and pid 2, a child of 9, or make the program close the driver's descriptors",
        ),
        (
            row(keepers=(1, 2), parents=(0, 0)),
            "5MiB on gpu 0 stay charged for process 11, which has ended: kept by pid 1, 2; "
            "end these processes, or make the program close the driver's descriptors",
        ),
        (
            row(keepers=()),
            "5MiB on gpu 0 stay charged for process 11, which has ended: no process with a descriptor of "
            "the driver was found; a descriptor may be unread in a socket",
        ),
    ],
)
def test_the_text_of_an_orphan_gives_its_bytes_its_process_and_its_keepers(
    orphan_row: dict[str, Any], sentence: str
) -> None:
    assert orphan_text.sentence(orphan_row) == sentence


def test_an_orphan_younger_than_a_second_is_not_shown() -> None:
    assert orphan_text.lasting([row(seconds=0.4), row(seconds=1.1)]) == [row(seconds=1.1)]


# -- tenants with a removed cgroup


def test_a_tenant_is_kept_while_the_device_holds_its_memory() -> None:
    books = Books()
    gone, kept = GoneTenants(books), tenant()  # type: ignore[arg-type]
    books.orphaned = {7: MIB}
    assert gone.keep([kept, tenant(cgroup=8)]) == {7}
    assert [(t.cgroup, t.name) for t in gone] == [(7, "a-7")]
    gone.release_freed()
    assert [t.cgroup for t in gone] == [7]
    books.orphaned, books.entries = {}, {(23, 1): SimpleNamespace(level=7)}
    gone.release_freed()
    assert books.removed == [], "a parked process of another cgroup reads this page"
    books.entries = {}
    gone.release_freed()
    assert (list(gone), books.removed) == ([], [7])


def test_memory_held_for_long_counts_against_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    books = Books()
    books.orphaned = {7: MIB}
    gone = GoneTenants(books)  # type: ignore[arg-type]
    gone.keep([tenant()])
    assert gone.held_bytes(0, NONE) == 0, "memory of a process that has just exited counts against the device"
    after_a_while(monkeypatch)
    assert (gone.held_bytes(0, NONE), gone.held_bytes(1, NONE)) == (MIB, 0)


def after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the time pass after which the memory of gone tenants counts against the device."""
    later = time.monotonic() + FRESH_SECONDS + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)


@pytest.fixture
def nested() -> Books:
    """Return a ledger with orphans of two containers, 7 and 8, in a pod, 6, in a group, 5."""
    books = Books()
    books.orphaned = {5: 7 * MIB, 6: 7 * MIB, 7: 3 * MIB, 8: 4 * MIB}
    books.of_processes = [orphan(11, 3 * MIB, levels=(7, 6, 5)), orphan(12, 4 * MIB, levels=(8, 6, 5))]
    return books


def test_held_memory_counts_once_for_all_its_levels(nested: Books, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = GoneTenants(nested)  # type: ignore[arg-type]
    gone.keep([tenant(7), left_behind(8)])
    gone.keep([tenant(5), tenant(6)])
    after_a_while(monkeypatch)
    assert gone.held_bytes(0, NONE) == 7 * MIB


def test_held_memory_inside_a_limit_that_counts_is_part_of_that_limit(
    nested: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = GoneTenants(nested)  # type: ignore[arg-type]
    gone.keep([tenant(7), left_behind(8)])
    after_a_while(monkeypatch)
    assert (gone.held_bytes(0, NONE), gone.held_bytes(0, {5}.__contains__)) == (7 * MIB, 0)


def test_held_memory_of_which_a_part_is_charged_to_an_outer_level_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    books = Books()
    books.orphaned = {7: 3 * MIB, 6: MIB}
    books.of_processes = [orphan(11, 2 * MIB, levels=(7,)), orphan(12, MIB, levels=(7, 6))]
    gone = GoneTenants(books)  # type: ignore[arg-type]
    gone.keep([tenant(7)])
    after_a_while(monkeypatch)
    assert gone.held_bytes(0, {6}.__contains__) == 3 * MIB


def test_a_level_of_an_earlier_agent_has_its_own_name() -> None:
    books = Books()
    books.orphaned = {9: MIB}
    gone = GoneTenants(books)  # type: ignore[arg-type]
    gone.keep([left_behind(9)])
    assert [(t.cgroup, t.name, t.path) for t in gone] == [(9, "gone-9", "")]
