"""Tests of the library for the tests of the shim."""

from __future__ import annotations

import subprocess

import pytest

from fgpu_ebpf.linux import procfs
from tests.shim.shim_kit import Program

SLOW = ["sh", "-c", "echo said; exec sleep 1"]


def test_the_kit_waits_for_a_program_that_the_kernel_ends_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "exiting", lambda _: True)
    late = pytest.warns(UserWarning, match="has exited, and the kernel has not ended it")
    with Program(SLOW, stdout=subprocess.PIPE, text=True) as program, late:
        assert program.communicate(timeout=0.1)[0] == "said\n"


def test_the_kit_does_not_wait_for_a_program_that_does_not_exit() -> None:
    with Program(SLOW, stdout=subprocess.PIPE, text=True) as program, pytest.raises(subprocess.TimeoutExpired):
        program.communicate(timeout=0.1)
