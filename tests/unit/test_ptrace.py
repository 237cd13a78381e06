"""Tests of the check of `fgpu doctor` for a kernel on which no process may read another's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from fgpu_ebpf import doctor


@pytest.mark.parametrize(("scope", "ok"), [("0\n", True), ("1\n", True), ("2\n", True), ("3\n", False), (None, True)])
def test_the_ptrace_check_fails_only_at_scope_3_and_names_the_kernel_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str | None, ok: bool
) -> None:
    path = tmp_path / "ptrace_scope"
    if scope:
        path.write_text(scope)
    monkeypatch.setattr(doctor, "PTRACE_SCOPE", path)
    (found,) = [check for check in doctor.host_checks() if check.name == "ptrace"]
    assert found.ok is ok
    assert ok or ("kernel.yama.ptrace_scope=3" in found.found and "kernel.yama.ptrace_scope to 2" in found.fix)
