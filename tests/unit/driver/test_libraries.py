"""Tests of how files of libcuda are examined: workers run the jobs, and the agent's loop applies their results."""

from __future__ import annotations

import _thread
import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fgpu_ebpf.driver import (
    cuda_mappings,
    file_budget,
    libraries,
    library_class,
    library_files,
    probe_plan,
    shim_store,
)
from fgpu_ebpf.driver.discovery import Discovery
from fgpu_ebpf.driver.library_class import Role, Stamp, Trust
from fgpu_ebpf.driver.library_worker import Examiner
from fgpu_ebpf.linux import breakpoints, mapped_files, procfs, worker_threads
from tests.support.wait import eventually
from tests.unit.driver.discovery_kit import Stage, quiet, settled
from tests.unit.root_kit import needs_root

HOLD = """
import mmap, os, sys
held = []
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        held.append(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC))
print("mapped", flush=True)
sys.stdin.read()
"""
HOLD_AND_EXECUTE = HOLD.replace(
    "sys.stdin.read()", "sys.stdin.readline(); os.execlp('sh', 'sh', '-c', 'echo executed; exec cat')"
)
Holder = Callable[..., int]


def test_a_job_that_fails_loses_no_other_job_and_its_error_is_raised_in_the_main_thread() -> None:
    """Otherwise a file of the lost job would wait for its examination forever."""

    def fail() -> libraries.Taken:
        raise OSError(errno.EIO, "input/output error")

    done, errors = list[int](), list[str]()
    probes: Any = Stage()
    looks = libraries.Libraries(probes, {}, Trust())
    for job in (fail, lambda: lambda: done.append(1)):
        assert looks._workers.want("/a", job)
    looks._workers.go()

    def take() -> bool:
        try:
            looks.take()
        except OSError as error:
            errors.append(error.strerror)
        return bool(done)

    eventually(take, 10, "the result of the second job")
    assert errors == ["input/output error"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a library with every function that a driver must have."""
    folder = tmp_path_factory.mktemp("library")
    source, made = folder / "cuda.c", folder / "libcuda.so.1"
    source.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in probe_plan.REQUIRED))
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-s", "-fcf-protection=none", "-o", made, source], check=True, timeout=30
    )
    return made


@pytest.fixture
def holder() -> Iterator[Holder]:
    """Return a function that starts a process which maps these files, and returns its pid."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*paths: Path) -> int:
        command = [sys.executable, "-c", HOLD, *map(str, paths)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert started[-1].stdout
        assert started[-1].stdout.readline() == b"mapped\n"
        return started[-1].pid

    yield start
    for process in started:
        process.communicate()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, bool]:
    """Return a dictionary from pid to whether the process has breakpoints. Other processes have breakpoints."""
    found: dict[int, bool] = {}
    monkeypatch.setattr(breakpoints, "is_set", lambda pid, *_: found.get(pid, True))
    return found


@pytest.fixture
def cgroups(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Return a dictionary from pid to cgroup. No other processes exist."""
    found: dict[int, str] = {}
    monkeypatch.setattr(procfs, "cgroup_path", found.get)
    monkeypatch.setattr(procfs, "pids", lambda: list(found))
    return found


def copy(library: Path, to: Path, more: bytes = b"") -> Path:
    to.write_bytes(library.read_bytes() + more)
    return to


def sha256(path: Path) -> str:
    return f"sha256:{subprocess.run(['sha256sum', path], capture_output=True, text=True, check=True).stdout.split()[0]}"


def role(stage: Stage, path: Path) -> Role | None:
    found = stage.of(mapped_files.as_mapped(str(path)))
    return found.role if found else None


# -- classes


def test_a_file_is_unknown_until_its_digest_is_found_in_the_list(
    tmp_path: Path, library: Path, holder: Holder, seen: dict[int, bool], cgroups: dict[int, str]
) -> None:
    files = {name: copy(library, tmp_path / f"libcuda.so.{name}", name.encode()) for name in ("listed", "other")}
    stage, trust = Stage(), Trust(listed=[sha256(files["listed"])])
    looks = Discovery(stage, {}, trust)  # type: ignore[arg-type]
    pid = holder(*files.values())
    cgroups[pid] = "/a"
    looks.look_at(pid)
    settled(looks, lambda: len(stage.known) == 2)
    assert [role(stage, path) for path in files.values()] == [Role.UNKNOWN] * 2, "classified without a digest"
    settled(looks, lambda: role(stage, files["listed"]) is Role.LISTED)
    quiet(looks)
    assert role(stage, files["other"]) is Role.UNKNOWN
    views = {view.path: view for view in looks.libraries(lambda path: f"tenant of {path}")}
    assert {path: views[str(path)].role for path in files.values()} == dict(
        zip(files.values(), ("listed", "unknown"), strict=True)
    )
    one = views[str(files["other"])]
    assert (one.digest, one.tenant, one.pids) == (sha256(files["other"]), "tenant of /a", (pid,))


def test_a_copy_of_the_host_s_driver_is_listed_once_both_are_read(
    tmp_path: Path, library: Path, holder: Holder, seen: dict[int, bool], cgroups: dict[int, str]
) -> None:
    stage, there = Stage(), copy(library, tmp_path / "libcuda.so.1")
    looks = Discovery(stage, {library: Role.HOST})  # type: ignore[arg-type]
    pid = holder(there)
    cgroups[pid] = "/a"
    looks.look_at(pid)
    settled(looks, lambda: role(stage, there) is Role.UNKNOWN)
    quiet(looks)
    assert role(stage, there) is Role.UNKNOWN
    looks.start()
    settled(looks, lambda: role(stage, there) is Role.LISTED)
    assert role(stage, library) is Role.HOST


def test_a_file_trusted_by_its_contents_is_checked_in_every_round(
    tmp_path: Path, library: Path, holder: Holder, seen: dict[int, bool], cgroups: dict[int, str]
) -> None:
    there = copy(library, tmp_path / "libcuda.so.1")
    stage = Stage()
    looks = Discovery(stage, {}, Trust(listed=[sha256(there)]))  # type: ignore[arg-type]
    pid = holder(there)
    cgroups[pid] = "/a"
    looks.look_at(pid)
    settled(looks, lambda: role(stage, there) is Role.LISTED)
    with there.open("ab") as file:
        file.write(b"x")
    quiet(looks, 0.1)
    assert role(stage, there) is Role.LISTED
    looks.keep()
    settled(looks, lambda: role(stage, there) is Role.UNKNOWN)


def test_a_file_is_checked_through_any_process_that_still_maps_it(
    tmp_path: Path, library: Path, holder: Holder, seen: dict[int, bool], cgroups: dict[int, str]
) -> None:
    """A tenant could execute another program in the first process, and change the file without a check."""
    there = copy(library, tmp_path / "libcuda.so.1")
    file = mapped_files.as_mapped(str(there))
    stage = Stage()
    looks = Discovery(stage, {}, Trust(listed=[sha256(there)]))  # type: ignore[arg-type]
    other = holder(there)
    with subprocess.Popen([sys.executable, "-c", HOLD_AND_EXECUTE, there], stdin=-1, stdout=-1) as first:
        assert first.stdin
        assert first.stdout
        assert first.stdout.readline() == b"mapped\n"
        for pid in (first.pid, other):
            cgroups[pid] = "/a"
            looks.look_at(pid)
            settled(looks, lambda pid=pid: pid in looks._libraries._mappers.get(file, {}))
        settled(looks, lambda: role(stage, there) is Role.LISTED)
        quiet(looks)
        with there.open("ab") as opened:
            there.unlink()
            first.stdin.write(b"go on\n")
            first.stdin.flush()
            assert first.stdout.readline() == b"executed\n"
            opened.write(b"x")
        looks.keep()
        settled(looks, lambda: stage.files[file].role is Role.UNKNOWN)
        first.communicate(timeout=30)


def test_only_a_library_that_this_host_has_published_is_a_shim(
    tmp_path: Path, library: Path, holder: Holder, seen: dict[int, bool], cgroups: dict[int, str]
) -> None:
    """A file with the functions of a driver and of the shim is a driver.

    A file with libfgpu's name and functions, but other contents, is not a shim.
    """
    source = tmp_path / "both.c"
    names = [*probe_plan.REQUIRED, *probe_plan.SHIM]
    source.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in names))
    flags = ["gcc", "-shared", "-fPIC", "-fcf-protection=none", "-o"]
    files = {
        name: tmp_path / name for name in ("libcuda.so.1", "libfgpu.so.both", "libfgpu.so.none", "libfgpu.so.copy")
    }
    for name in ("libcuda.so.1", "libfgpu.so.both"):
        subprocess.run([*flags, files[name], source], check=True, timeout=30)
    empty = tmp_path / "none.c"
    empty.write_text("void fgpu_admit(void) {}\nvoid fgpu_release(void) {}\n")
    subprocess.run([*flags, files["libfgpu.so.none"], empty], check=True, timeout=30)
    shim = Path(__file__).parents[3] / "build/shim/libfgpu.so"
    shutil.copy(shim, files["libfgpu.so.copy"])
    stage = Stage()
    looks = Discovery(stage, {}, libraries.trusted(shim, None, ()))  # type: ignore[arg-type]
    pid = holder(*files.values())
    cgroups[pid] = "/a"
    looks.look_at(pid)
    settled(looks, lambda: len(stage.known) == 4)
    assert {name: role(stage, path) for name, path in files.items()} == {
        "libcuda.so.1": Role.UNKNOWN, "libfgpu.so.both": Role.UNKNOWN,
        "libfgpu.so.none": Role.NONE, "libfgpu.so.copy": Role.SHIM,
    }  # fmt: skip
    assert looks.is_shim(*mapped_files.as_mapped(str(files["libfgpu.so.copy"])))
    assert not looks.is_shim(*mapped_files.as_mapped(str(files["libfgpu.so.both"])))
    none = stage.of(mapped_files.as_mapped(str(files["libfgpu.so.none"])))
    assert none
    assert none.check == breakpoints.UNCHECKED


# -- processes that are not probed


def test_only_a_process_without_breakpoints_counts_as_unprobed(
    tmp_path: Path, library: Path, holder: Holder, seen: dict[int, bool], cgroups: dict[int, str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    there = copy(library, tmp_path / "libcuda.so.1")
    stage = Stage()
    looks = Discovery(stage, {})  # type: ignore[arg-type]
    good, bad = holder(there), holder(there)
    cgroups |= {good: "/a", bad: "/a"}
    seen[bad] = False
    looks.look_at(bad)
    settled(looks, lambda: looks.unprobed() == {bad})
    assert not stage.attached, "probes without effect in the process were kept"
    looks.look_at(good)
    settled(looks, lambda: stage.attached)
    looks.look_at(bad)
    quiet(looks)
    assert looks.unprobed() == {bad}
    assert "its layer was changed after the mapping" in looks.reasons()[bad]
    said = [record.getMessage() for record in caplog.records if "not probed" in record.getMessage()]
    assert len(said) == 1
    seen[bad] = True
    looks.look_at(bad)
    settled(looks, lambda: not looks.unprobed())


def test_a_file_that_fails_is_searched_once_while_it_is_unchanged(
    tmp_path: Path, holder: Holder, cgroups: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, plans = tmp_path / "libcuda.so.1", list[str]()
    broken.write_bytes(b"x" * 5000)
    real = probe_plan.plan
    monkeypatch.setattr(probe_plan, "plan", lambda fd, path, role: plans.append(path) or real(fd, path, role))
    looks = Discovery(Stage(), {})  # type: ignore[arg-type]
    pid = holder(broken)
    cgroups[pid] = "/a"
    for n in range(1, 4):
        looks.look_around()
        settled(looks, lambda n=n: looks.refusals == n)
    assert plans == [str(broken)]
    with broken.open("ab") as file:
        file.write(b"x")
    looks.look_around()
    settled(looks, lambda: looks.refusals == 4)
    assert len(plans) == 2


# -- files that hang or cost much time


def test_a_file_that_hangs_delays_only_its_cgroup(
    tmp_path: Path, library: Path, holder: Holder, seen: dict[int, bool], cgroups: dict[int, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The file is in a file system that never answers, for example."""
    let_go = threading.Event()
    real = Examiner.mapped

    def mapped(self, pid, one):  # type: ignore[no-untyped-def]
        if os.path.basename(one.path).startswith("libcuda.so.hangs"):
            let_go.wait(20)
        return real(self, pid, one)

    monkeypatch.setattr(Examiner, "mapped", mapped)
    stage = Stage()
    looks = Discovery(stage, {})  # type: ignore[arg-type]
    hanging = [holder(copy(library, tmp_path / f"libcuda.so.hangs{n}")) for n in range(5)]
    other = holder(copy(library, tmp_path / "libcuda.so.1"))
    cgroups |= {pid: f"/{pid}" for pid in hanging} | {other: "/other"}
    for pid in (*hanging, other):
        looks.look_at(pid)
    settled(looks, lambda: stage.attached == [str(tmp_path / "libcuda.so.1")], 2)
    let_go.set()
    settled(looks, lambda: len(stage.attached) == 6)


def test_long_jobs_in_all_threads_but_one_do_not_delay_the_next_job() -> None:
    """The next job runs although nothing happens in the loop at that time."""
    looks, let_go, done = Discovery(Stage(), {}), threading.Event(), threading.Event()  # type: ignore[arg-type]

    def long() -> libraries.Taken:
        let_go.wait(20)
        return lambda: None

    def short() -> libraries.Taken:
        done.set()
        return lambda: None

    for n in range(libraries.THREADS - 1):
        looks._libraries.work(f"/{n}", long)
    looks._libraries.work("/other", short)
    assert done.wait(10)
    let_go.set()


def test_a_cgroup_that_has_used_its_time_waits_until_the_used_time_is_reduced(
    tmp_path: Path, library: Path, holder: Holder, seen: dict[int, bool], cgroups: dict[int, str]
) -> None:
    stage = Stage()
    looks = Discovery(stage, {})  # type: ignore[arg-type]
    pids = [holder(copy(library, tmp_path / f"libcuda.so.{n}")) for n in range(2)]
    cgroups |= dict(zip(pids, ("/greedy", "/other"), strict=True))
    looks._libraries._budget.charge("/greedy", file_budget.BURST_NS + file_budget.REFILL_NS // 2)
    for pid in pids:
        looks.look_at(pid)
    settled(looks, lambda: stage.attached)
    quiet(looks)
    assert stage.attached == [str(tmp_path / "libcuda.so.1")]
    looks.keep()
    looks.look_at(pids[0])
    settled(looks, lambda: len(stage.attached) == 2)


def test_the_queue_of_a_cgroup_has_a_bound(cgroups: dict[int, str]) -> None:
    looks = Discovery(Stage(), {})  # type: ignore[arg-type]
    cgroups |= dict.fromkeys(range(1 << 22, (1 << 22) + 503), "/a")
    began, let_go = threading.Event(), threading.Event()

    def hang() -> libraries.Taken:
        began.set()
        let_go.wait(20)
        return lambda: None

    looks._libraries.work("/a", hang)
    assert began.wait(10)
    queued = sum(looks._ask(pid) for pid in cgroups)
    assert 0 < queued <= libraries.MOST_JOBS
    assert looks._ask(next(iter(cgroups))) is False
    let_go.set()


def test_a_result_that_fails_does_not_prevent_the_use_of_other_results() -> None:
    looks = Discovery(Stage(), {})  # type: ignore[arg-type]
    done: list[int] = []

    def fail() -> None:
        raise ZeroDivisionError

    for take in (fail, lambda: done.append(1)):
        looks._libraries.work("/a", lambda take=take: take)
    with pytest.raises(ZeroDivisionError):
        settled(looks, lambda: done)
    settled(looks, lambda: done == [1])


def test_jobs_and_results_stay_for_the_next_round_in_a_shortage_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main loop must still answer the request that needs the job, and apply the results of other jobs."""

    def fail(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    looks = Discovery(Stage(), {})  # type: ignore[arg-type]
    done: list[int] = []
    with monkeypatch.context() as short:
        short.setattr(_thread, "start_new_thread", fail)
        short.setattr(worker_threads, "STALLED_NS", 0)  # the pause between two attempts to start a thread
        assert looks._libraries.work("/a", lambda: lambda: done.append(1))
        looks._libraries._results.append(lambda: done.append(0))
        looks.take()
        assert done == [0]
        with pytest.raises(OSError, match="can't start new thread"):
            looks.keep()
    looks.keep()
    settled(looks, lambda: done == [0, 1])


def test_workers_have_a_lower_priority_than_the_loop(cgroups: dict[int, str]) -> None:
    looks, found = Discovery(Stage(), {}), list[int]()  # type: ignore[arg-type]

    def nice() -> libraries.Taken:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return lambda: None

    looks._libraries.work("/a", nice)
    settled(looks, lambda: found)
    assert found == [libraries.NICE]
    assert os.getpriority(os.PRIO_PROCESS, 0) < libraries.NICE


@needs_root("it opens files in /proc/PID/map_files")
def test_a_stamp_belongs_to_the_file_and_not_to_its_name(tmp_path: Path, library: Path, holder: Holder) -> None:
    there = copy(library, tmp_path / "libcuda.so.1")
    pid = holder(there)
    (one,) = [one for one in cuda_mappings.fgpu_mappings(pid) or () if one.path == str(there)]
    with there.open("rb") as file:
        stamp = Stamp.of(file.fileno())
    examiner = Examiner(Stage(), Trust())  # type: ignore[arg-type]
    assert examiner.stamp(pid, one) == stamp
    there.unlink()
    there.write_bytes(b"another")
    found = examiner.stamp(pid, one)
    assert found
    assert (found.size, found.mtime_ns) == (stamp.size, stamp.mtime_ns)
    assert examiner.read(pid, one) == found
    assert library_class.Trust().digest((one.dev, one.ino), found) is None


@needs_root("it opens files in /proc/PID/map_files")
def test_an_old_shim_in_the_store_keeps_its_probes_without_the_agent_whatever_its_path_in_a_container(
    tmp_path: Path, library: Path, holder: Holder
) -> None:
    """A container has the shim at STORE/current, which on the host is a link to a newer version by now."""
    store = tmp_path / "store"
    old = shim_store.stage(copy(library, tmp_path / "libfgpu.so"), store)
    (store / "current").symlink_to("another-version")
    pid = holder(old)
    (one,) = [one for one in cuda_mappings.fgpu_mappings(pid) or () if one.path == str(old)]
    in_container = replace(one, path=str(store / "current/libfgpu.so"))
    found = library_files.target_of(pid, in_container, libraries.trusted(old, store, ()).versions)
    assert (found.pinned, found.way) == (True, str(old.resolve()))
