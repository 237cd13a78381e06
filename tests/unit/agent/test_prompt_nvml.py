"""A call of NVML that hangs does not stop the agent's main loop."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf.agent import parkable
from fgpu_ebpf.agent.parkable import Parkable, PromptNvml
from tests.support.wait import eventually


class Hanging:
    """An NVML with calls that end when the test ends them."""

    driver_version = "580.1"

    def __init__(self) -> None:
        self.end, self.calls = threading.Event(), 0

    def free_bytes(self, _: int) -> int:
        self.calls += 1
        assert self.end.wait(60)
        return 7

    def in_mig_mode(self, _: int) -> bool:
        return self.free_bytes(0) != 7


def test_a_call_that_hangs_has_no_answer_and_blocks_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parkable, "PATIENCE_SECONDS", 0.01)
    hanging: Any = Hanging()
    nvml = PromptNvml(hanging)
    assert [nvml.free_bytes(0), nvml.in_mig_mode(0), nvml.free_bytes(1)] == [None, None, None]
    assert hanging.calls == 1
    hanging.end.set()
    eventually(lambda: nvml.free_bytes(0) == 7, 10, "an answer")
    assert nvml.in_mig_mode(0) is False


def test_a_tenant_is_neither_parked_nor_woken_while_nvml_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parkable, "PATIENCE_SECONDS", 0.01)
    hanging: Any = Hanging()
    unused: Any = SimpleNamespace()
    tenants = Parkable(True, Path("/"), unused, PromptNvml(hanging), unused, dict)
    assert tenants.full_device({0: 1 << 30}) == "gpu 0 has an unknown number of bytes free, and 1GiB are needed"
    assert tenants.split_device([0, 1]) == "NVML does not report whether gpu 0 is in MIG mode"
    hanging.end.set()
    eventually(lambda: tenants.split_device([0, 1]) == "", 10, "an answer")
