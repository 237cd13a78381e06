"""Tests of the size of a context, which a child process measures. The child may hang in the driver or fail."""

from __future__ import annotations

import logging
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf.driver import context_sizes
from fgpu_ebpf.driver.context_sizes import DEFAULT_CONTEXT_BYTES

MIB = 1 << 20
LIBRARY = """
#include <unistd.h>
int cuInit(unsigned flags) { (void)flags; %s; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGet(int *device, int n) { *device = n; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = 0; return device; }
"""


def library(folder: Path, init: str) -> Path:
    made = folder / "libcuda.so.1"
    (folder / "cuda.c").write_text(LIBRARY % init)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", made, folder / "cuda.c"], check=True, timeout=30)
    return made


def nvml(bytes_: int | None) -> Any:
    """Return a stand-in for NVML that reports this many bytes for every process."""
    held = SimpleNamespace(get=lambda _: bytes_)
    return SimpleNamespace(
        devices=[SimpleNamespace(index=0, name="NVIDIA X")], driver_version="1", process_bytes=lambda _: held
    )


def test_a_measured_context_size_is_stored_and_used_without_a_new_measurement(tmp_path: Path) -> None:
    state = tmp_path / "contexts.json"
    assert context_sizes.context_bytes(nvml(518 * MIB), library(tmp_path, "(void)0"), state) == {0: 518 * MIB}
    assert context_sizes.context_bytes(nvml(None), tmp_path / "nothing", state) == {0: 518 * MIB}


@pytest.mark.parametrize("value", ['"much"', "-1", "0", "1.5", "true", "null", str(1 << 41)])
def test_a_context_size_is_measured_again_if_the_stored_size_is_invalid(tmp_path: Path, value: str) -> None:
    state = tmp_path / "contexts.json"
    state.write_text(f'{{"NVIDIA X 1": {value}}}')
    assert context_sizes.context_bytes(nvml(518 * MIB), library(tmp_path, "(void)0"), state) == {0: 518 * MIB}


@pytest.mark.parametrize(
    ("init", "weighs"), [("sleep(99)", 518 * MIB), ("_exit(1)", None), ("(void)0", None)], ids=["hangs", "ends", "N/A"]
)
def test_a_context_size_that_cannot_be_measured_has_a_default_that_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, init: str, weighs: int | None
) -> None:
    monkeypatch.setattr(context_sizes, "MEASURE_SECONDS", 1.0)
    monkeypatch.setattr(context_sizes, "_END_SECONDS", 0.2)
    state, begun = tmp_path / "contexts.json", time.monotonic()
    with caplog.at_level(logging.WARNING):
        assert context_sizes.context_bytes(nvml(weighs), library(tmp_path, init), state) == {0: DEFAULT_CONTEXT_BYTES}
    assert time.monotonic() - begun < 10
    assert "512 MiB is assumed" in caplog.text
    assert "NVIDIA X 1" not in (state.read_text() if state.exists() else "")
