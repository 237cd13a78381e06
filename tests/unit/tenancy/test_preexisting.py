"""Tests of processes older than fgpu, which are found once."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fgpu_ebpf.driver import cuda_mappings
from fgpu_ebpf.linux import mapped_files, procfs
from fgpu_ebpf.tenancy.preexisting import PreexistingProcesses

ME = os.getpid()


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def maps(monkeypatch: pytest.MonkeyPatch, files: dict[int, list[str]]) -> None:
    """Make procfs show these processes with these mapped files."""
    monkeypatch.setattr(procfs, "pids", lambda: list(files))
    mapped = {pid: [mapped_files.MappedFile(name, 1, 2) for name in names] for pid, names in files.items()}
    monkeypatch.setattr(cuda_mappings, "fgpu_mappings", mapped.get)


def test_preexisting_processes_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other) -> None:
    maps(monkeypatch, {ME: ["/usr/lib/libcuda.so.1"], other.pid: []})
    assert list(PreexistingProcesses.found(tmp_path)) == [ME]
    maps(monkeypatch, {ME: ["/usr/lib/libcuda.so.1"], other.pid: ["/usr/lib/libcuda.so.1"]})
    assert list(PreexistingProcesses.found(tmp_path)) == [ME], "a later process counts as preexisting"


def test_a_process_that_blocks_the_search_delays_the_start_for_a_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that is in mmap() of a file of its own file system holds the lock of its mappings."""
    goes_on = threading.Event()
    maps(monkeypatch, {other.pid: ["/usr/lib/libcuda.so.1"], ME: ["/usr/lib/libcuda.so.1"]})
    read = cuda_mappings.fgpu_mappings
    monkeypatch.setattr(cuda_mappings, "fgpu_mappings", lambda pid: read(pid) if pid == ME or goes_on.wait() else None)
    monkeypatch.setattr(cuda_mappings, "SEARCH_SECONDS", 0.2)
    try:
        assert list(PreexistingProcesses.found(tmp_path)) == [ME]
    finally:
        goes_on.set()
    assert list(PreexistingProcesses.found(tmp_path)) == [ME]
    assert caplog.messages == ["the mappings of 1 processes cannot be read: they do not count as preexisting"]


def test_a_list_that_could_not_be_written_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise the next agent would count a process that has started in the meantime as preexisting."""
    run_dir = tmp_path / "run"
    maps(monkeypatch, {ME: ["/usr/lib/libcuda.so.1"]})
    known = PreexistingProcesses.found(run_dir)
    known.look()
    assert len(caplog.messages) == 1, "not exactly one warning for several attempts"
    maps(monkeypatch, {ME: ["/usr/lib/libcuda.so.1"], other.pid: ["/usr/lib/libcuda.so.1"]})
    run_dir.mkdir()
    known.look()
    assert list(PreexistingProcesses.found(run_dir)) == [ME]


def test_a_process_with_the_shim_is_not_preexisting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps(monkeypatch, {ME: ["/usr/lib/libcuda.so.1", "/var/lib/fgpu/shim/libfgpu.so.0"]})
    assert list(PreexistingProcesses.found(tmp_path)) == []


@pytest.mark.parametrize("said", ["", "[1]", '{"a": 1}', '{"1": null}'])
def test_an_invalid_file_of_preexisting_processes_makes_no_process_preexisting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said
) -> None:
    maps(monkeypatch, {ME: ["libcuda.so"]})
    (tmp_path / PreexistingProcesses.FILE).write_text(said)
    assert list(PreexistingProcesses.found(tmp_path)) == []


def test_another_process_of_the_same_pid_is_not_preexisting(tmp_path: Path) -> None:
    start = procfs.started(ME)
    assert start
    (tmp_path / PreexistingProcesses.FILE).write_text(json.dumps({ME: start + 1}))
    known = PreexistingProcesses.found(tmp_path)
    known.look()
    assert ME not in known
    (tmp_path / PreexistingProcesses.FILE).write_text(json.dumps({ME: start}))
    known = PreexistingProcesses.found(tmp_path)
    known.look()
    assert ME in known


def test_an_ended_process_is_not_preexisting_even_before_its_parent_waits_for_it(other) -> None:
    known = PreexistingProcesses({other.pid: procfs.started(other.pid) or 0})
    assert known.places()
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert not known.places()


def test_cgroups_of_preexisting_processes_include_all_outer_cgroups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "cgroup_path", lambda _: "/a/b/c")
    assert PreexistingProcesses({ME: procfs.started(ME) or 0}).places() == {"/a/b/c", "/a/b", "/a", "/"}
    assert PreexistingProcesses().places() == set()
