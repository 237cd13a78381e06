"""Tests of agent.detach and driver.attach: for which probes `fgpu detach` waits, and how long."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from fgpu_ebpf import daemon
from fgpu_ebpf.agent import detach
from fgpu_ebpf.containers import engine_setup, injection, run
from fgpu_ebpf.driver import attach, cuda_mappings, probe_plan
from fgpu_ebpf.driver.library_class import Role
from fgpu_ebpf.linux import breakpoints, file_locks
from tests.unit import detach_kit

PLAN = probe_plan.Plan(Role.SHIM, (("admit", ((0x3A70, 0),), False), ("release", ((0x3A80, 0),), False)), 0x3A80)


def test_a_detach_waits_until_no_new_program_gets_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libfgpu.so").touch()
    answers, asked = [True, True, False, True, False, True], list[int]()
    monkeypatch.setattr(probe_plan, "plan", lambda *_: PLAN)
    monkeypatch.setattr(breakpoints, "is_set_in_new_mappings", lambda _, at: asked.append(at) or answers.pop(0))
    assert attach.wait_until_detached(tmp_path / "libfgpu.so", time.monotonic() + 60)
    assert asked == [0x3A70, 0x3A70, 0x3A70, 0x3A80, 0x3A80], "the kernel detaches the links in any order"


def test_a_detach_stops_waiting_after_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libfgpu.so").touch()
    monkeypatch.setattr(probe_plan, "plan", lambda *_: PLAN)
    monkeypatch.setattr(breakpoints, "is_set_in_new_mappings", lambda *_: True)
    assert not attach.wait_until_detached(tmp_path / "libfgpu.so", time.monotonic())


def test_a_detach_does_not_wait_for_a_missing_or_invalid_shim(tmp_path: Path) -> None:
    until = time.monotonic() + 60
    assert attach.wait_until_detached(tmp_path / "libfgpu.so", until)
    (tmp_path / "libfgpu.so").write_text("no library")
    assert attach.wait_until_detached(tmp_path / "libfgpu.so", until)
    assert attach.wait_until_detached(Path("/a\0"), until)


@pytest.fixture
def waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Restrict a detach to tmp_path. Return the list of shims for which it waits; the first one keeps its probes."""
    detach_kit.restrict(monkeypatch, tmp_path)
    monkeypatch.setattr(engine_setup, "STATE", tmp_path / "store/setup")
    monkeypatch.setattr(injection, "BIN", tmp_path / "store/bin")
    found = list[Path]()
    monkeypatch.setattr(attach, "wait_until_detached", lambda shim, _: found.append(shim) or len(found) > 1)
    (tmp_path / "store/shim/1").mkdir(parents=True)
    (tmp_path / "store/shim/1/libfgpu.so").touch()
    (tmp_path / "store/shim/current").symlink_to("1")
    (tmp_path / "run").mkdir()
    return found


def test_a_detach_waits_for_the_mounted_shim_and_removes_only_a_published_store(
    tmp_path: Path, waited: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """The last agent used an administrator's shim (`fgpu agent --shim`), which is in a folder with other files."""
    run_dir, own, store = tmp_path / "run", tmp_path / "opt/lib/libfgpu.so", tmp_path / "store/shim"
    own.parent.mkdir(parents=True)
    own.touch()
    (run_dir / "containers").write_text(f"shim {own}\nsocket /run/fgpu/shim\n")
    detach.take_away(run_dir, tmp_path / "pins")
    assert waited == [own]
    text = f"{own} still has probes: programs with this shim get no memory until the kernel has removed the probes"
    assert caplog.messages == [text]
    assert own.exists()
    run_dir.mkdir()
    (run_dir / "containers").write_text(f"shim {own}\nsocket /run/fgpu/shim\n")
    (run_dir / "published").write_text(f"{store}/current/libfgpu.so\n")
    detach.take_away(run_dir, tmp_path / "pins")
    assert set(waited[1:]) == {own, store / "current/libfgpu.so"}
    assert caplog.messages == [text]
    assert own.exists()
    assert not store.exists()
    assert not run_dir.exists()


def test_a_detach_keeps_the_helper_that_an_engine_may_still_use_until_a_boot(
    tmp_path: Path, waited: list[Path]
) -> None:
    run_dir, store, mark = tmp_path / "run", tmp_path / "store/shim", tmp_path / "run-undone"
    (tmp_path / "store/bin").mkdir()
    (tmp_path / "store/bin/fgpu-oci").touch()
    mark.touch()
    for is_kept in (True, False):
        run_dir.mkdir(exist_ok=True)
        (run_dir / "published").write_text(f"{store}/current/libfgpu.so\n")
        detach.take_away(run_dir, tmp_path / "pins")
        assert not store.exists()
        assert (tmp_path / "store/bin/fgpu-oci").exists() == is_kept
        mark.unlink(missing_ok=True)
    assert not (tmp_path / "store").exists()


def test_a_detach_keeps_files_that_a_process_may_use_whose_mappings_cannot_be_read(
    tmp_path: Path, waited: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on, store = threading.Event(), tmp_path / "store/shim"
    (tmp_path / "run/published").write_text(f"{store}/current/libfgpu.so\n")
    monkeypatch.setattr(cuda_mappings, "SEARCH_SECONDS", 0.2)
    monkeypatch.setattr(cuda_mappings, "fgpu_mappings", lambda pid: [] if pid != os.getpid() else goes_on.wait() and [])
    try:
        detach.take_away(tmp_path / "run", tmp_path / "pins")
    finally:
        goes_on.set()
    assert (store / "current/libfgpu.so").exists()
    assert caplog.messages[-1] == f"{store} stays: the mappings of 1 processes cannot be read"


def test_a_detach_that_failed_is_finished_by_the_next_one(
    tmp_path: Path, waited: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, store = tmp_path / "run", tmp_path / "store/shim"
    (run_dir / "published").write_text(f"{store}/current/libfgpu.so\n")
    with monkeypatch.context() as patch:
        patch.setattr(run, "remove_created_preloads", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            detach.take_away(run_dir, tmp_path / "pins")
    assert store.exists()
    detach.take_away(run_dir, tmp_path / "pins")
    assert waited == [store / "current/libfgpu.so"]
    assert not store.exists()
    assert not run_dir.exists()


@pytest.mark.parametrize(
    "text", [b"shim \xff\n", b"shim /a\0\n", b"shim\n", b"\n"], ids=["not UTF-8", "a NUL", "no path", "empty"]
)
def test_a_damaged_list_of_files_does_not_stop_a_detach(
    tmp_path: Path, waited: list[Path], text: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "wait_until_detached", lambda *_: True)  # pytest cannot print such a path
    run_dir = tmp_path / "run"
    for name in ("containers", "published"):
        (run_dir / name).write_bytes(text)
    detach.take_away(run_dir, tmp_path / "pins")
    assert not run_dir.exists()


def test_a_detach_without_an_agent_removes_a_folder_in_the_place_of_the_agent_s_lock(
    tmp_path: Path, waited: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run/agent.lock/inside").mkdir(parents=True)
    assert daemon.take_away(tmp_path / "run", hung=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("hung", [False, True])
def test_while_an_agent_holds_its_lock_a_detach_removes_something_only_if_the_agent_hangs(
    tmp_path: Path, waited: list[Path], monkeypatch: pytest.MonkeyPatch, hung: bool
) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "control.sock").touch()
    lock = file_locks.FileLock(run_dir / file_locks.AGENT)
    assert lock.take()
    assert daemon.take_away(run_dir, hung) == hung
    assert (run_dir / "control.sock").exists() == (not hung)
    assert (run_dir / file_locks.AGENT).exists(), "an agent that hangs still has its lock"
    lock.release()
