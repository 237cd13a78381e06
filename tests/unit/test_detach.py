"""Tests of driver.attach: what `fgpu detach` waits for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fgpu_ebpf.driver import attach, probe_plan
from fgpu_ebpf.linux import breakpoints


def test_it_waits_until_no_program_gets_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libfgpu.so").touch()
    answers, asked = [True, True, False, True], list[int]()
    monkeypatch.setattr(probe_plan, "plan", lambda *_: SimpleNamespace(check=0x3A70))
    monkeypatch.setattr(breakpoints, "is_set_in_new_mappings", lambda _, at: asked.append(at) or answers.pop(0))
    attach.wait_until_detached(tmp_path / "libfgpu.so")
    assert asked == 3 * [0x3A70]


def test_it_waits_for_some_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libfgpu.so").touch()
    monkeypatch.setattr(attach, "DETACHED_SECONDS", 0.0)
    monkeypatch.setattr(probe_plan, "plan", lambda *_: SimpleNamespace(check=0x3A70))
    monkeypatch.setattr(breakpoints, "is_set_in_new_mappings", lambda *_: True)
    attach.wait_until_detached(tmp_path / "libfgpu.so")


def test_a_shim_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    attach.wait_until_detached(tmp_path / "libfgpu.so")
    (tmp_path / "libfgpu.so").write_text("no library")
    attach.wait_until_detached(tmp_path / "libfgpu.so")
