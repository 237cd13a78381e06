"""Tests of `fgpu doctor` on a host with a driver that hangs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from fgpu_ebpf import doctor
from fgpu_ebpf.agent.settings import Options


def hang(_: Path) -> list[doctor.Check]:
    signal.pause()
    return []


def fail(_: Path) -> list[doctor.Check]:
    raise ValueError("an unknown answer")


def crash(_: Path) -> list[doctor.Check]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def found(tmp_path: Path) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.checks(Options(tmp_path / "run"))}


def test_a_driver_that_hangs_is_a_failed_check_among_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = list[int]()
    fork = os.fork

    def forked() -> int:
        children.append(fork())
        return children[-1]

    monkeypatch.setattr(os, "fork", forked)
    monkeypatch.setattr(doctor.nvml, "checks", hang)
    monkeypatch.setattr(doctor, "NVML_SECONDS", 0.01)
    checks = found(tmp_path)
    assert os.waitpid(children[0], os.WNOHANG) == (0, 0), "the child still hangs"
    held = {os.readlink(f"/proc/{children[0]}/fd/{file}") for file in range(3)}
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)
    assert held == {"/dev/null"}, "a reader of the command's output would wait for the child"
    assert not checks["driver"].ok
    assert "NVML does not answer" in checks["driver"].found
    assert "nvidia-smi" in checks["driver"].fix
    assert "agent" in checks


def test_an_error_of_the_driver_s_check_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.nvml, "checks", fail)
    driver = found(tmp_path)["driver"]
    assert (driver.ok, "ValueError" in driver.found) == (False, True)


def test_a_crash_in_the_driver_s_library_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.nvml, "checks", crash)
    driver = found(tmp_path)["driver"]
    assert (driver.ok, "status -9" in driver.found) == (False, True)
