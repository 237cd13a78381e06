"""Tests of agent.detach: what `fgpu detach` waits for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgpu_ebpf.agent import detach
from fgpu_ebpf.linux import breakpoints, elf


def test_it_waits_until_no_program_gets_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libfgpu.so").touch()
    answers, asked = [True, True, False, True], list[int]()
    monkeypatch.setattr(elf, "function_offsets", lambda _, names: dict.fromkeys(names, 0x3A70))
    monkeypatch.setattr(breakpoints, "is_set_in_new_mappings", lambda _, at: asked.append(at) or answers.pop(0))
    detach._wait_for_the_kernel(tmp_path / "libfgpu.so")
    assert asked == 3 * [0x3A70]


def test_it_waits_for_some_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libfgpu.so").touch()
    monkeypatch.setattr(detach, "DETACHED_SECONDS", 0.0)
    monkeypatch.setattr(elf, "function_offsets", lambda _, names: dict.fromkeys(names, 1))
    monkeypatch.setattr(breakpoints, "is_set_in_new_mappings", lambda *_: True)
    detach._wait_for_the_kernel(tmp_path / "libfgpu.so")


def test_a_shim_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    detach._wait_for_the_kernel(tmp_path / "libfgpu.so")
    (tmp_path / "libfgpu.so").write_text("no library")
    detach._wait_for_the_kernel(tmp_path / "libfgpu.so")
