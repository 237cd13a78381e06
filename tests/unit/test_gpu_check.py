"""Tests of the results of bench/gpu_check.sh and of the claims that it runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support import host

ROOT = Path(__file__).parents[2]
SKIPPED = 77


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return bench.gpu.check without a service. Its import sets up tests.support for a real driver."""
    monkeypatch.setenv("DRIVER_ROOT", str(host.DRIVER_ROOT))
    monkeypatch.setattr(host, "ENVIRONMENT", host.ENVIRONMENT)
    from bench.gpu import check

    @contextlib.contextmanager
    def no_host() -> Iterator[tuple[None, None]]:
        yield None, None

    monkeypatch.setattr(check, "host", no_host)
    monkeypatch.setattr(check.pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(sys, "argv", ["check", "torch"])
    return check


def raises(error: BaseException) -> object:
    """Return a claim that raises an error."""

    def claim(*_: object) -> None:
        raise error

    return claim


def run_script(tmp_path: Path, claims: dict[str, int]) -> subprocess.CompletedProcess[str]:
    """Run bench/gpu_check.sh, in which each claim only exits with the given status, and nothing is built."""
    for name in ("make", "gcc", "nvidia-smi"):
        (tmp_path / name).symlink_to("/bin/true")
    cases = "".join(f"*' {name}') exit {status};;" for name, status in claims.items())
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in {cases} esac\n')
    python.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python), "CLAIMS": " ".join(claims)}
    return subprocess.run(
        [ROOT / "bench/gpu_check.sh"], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_a_skipped_claim_is_not_reported_as_passed(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(check.CLAIMS, "torch", raises(check.Skip("torch is not installed")))
    assert check.main() == SKIPPED
    assert capsys.readouterr().out == "SKIP torch: torch is not installed\n"


def test_a_claim_that_does_not_hold_has_exit_status_1(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check.CLAIMS, "torch", raises(AssertionError("no")))
    assert check.main() == 1


def test_the_script_counts_skipped_and_failed_claims(tmp_path: Path) -> None:
    done = run_script(tmp_path, {"torch": SKIPPED, "fill": 1, "race": 0})
    assert done.returncode == 1
    assert "SKIP step torch (" in done.stdout
    assert "PASS step torch" not in done.stdout
    assert "FAIL step fill: exit status 1 (" in done.stdout
    assert "PASS step race (" in done.stdout
    assert done.stdout.splitlines()[-1] == "== end: 1 failed: fill; 1 skipped: torch"


def test_skipped_claims_are_named_if_nothing_failed(tmp_path: Path) -> None:
    done = run_script(tmp_path, {"torch": SKIPPED, "race": 0})
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "== end: 0 failed: none; 1 skipped: torch"
