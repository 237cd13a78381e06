"""Tests of `fgpu doctor` on a host with a driver that hangs."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from fgpu_ebpf import doctor
from fgpu_ebpf.agent.settings import Options


def test_a_driver_that_hangs_is_a_failed_check_among_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()

    def hang(_: Path) -> list[doctor.Check]:
        assert threading.current_thread() is not threading.main_thread(), "the command would never end"
        goes_on.wait()
        return []

    monkeypatch.setattr(doctor.nvml, "checks", hang)
    monkeypatch.setattr(doctor, "NVML_SECONDS", 0.01, raising=False)
    try:
        found = {check.name: check for check in doctor.checks(Options(tmp_path / "run"))}
    finally:
        goes_on.set()
    assert not found["driver"].ok
    assert "NVML does not answer" in found["driver"].found
    assert "nvidia-smi" in found["driver"].fix
    assert "agent" in found
