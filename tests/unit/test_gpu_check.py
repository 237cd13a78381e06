"""Tests of the results of bench/gpu_check.sh and of the claims that it runs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.unit.benchmark_kit import benchmarks

ROOT = Path(__file__).parents[2]
SKIPPED = 77


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Return bench.gpu.check, in which host() has no service and only prints `stopped` at its end."""

    @contextlib.contextmanager
    def no_host() -> Iterator[tuple[None, None]]:
        try:
            yield None, None
        finally:
            print("stopped")

    with benchmarks(monkeypatch):
        from bench.gpu import check

        monkeypatch.setattr(check, "host", no_host)
        monkeypatch.setattr(check.pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(sys, "argv", ["check", "torch"])
        yield check


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
    assert capsys.readouterr().out == "stopped\nSKIP torch: torch is not installed\n"


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


def test_a_claim_that_gets_sigterm_stops_its_service(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(check.CLAIMS, "torch", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        check.main()
    assert capsys.readouterr().out == "stopped\n"


def test_a_program_that_does_not_exit_is_killed_if_the_driver_alone_fails(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from bench.gpu import parking

    program = "import pathlib, sys, time; print('ready', flush=True); time.sleep(20); pathlib.Path('exited').touch()"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parking, "SCRIPT", program)
    monkeypatch.setattr(parking, "PYTHON", sys.executable)
    monkeypatch.setenv("PYTHON", "/bin/false")
    with pytest.raises(subprocess.CalledProcessError):
        parking._bare(tmp_path, 1)
    assert not (tmp_path / "exited").exists()
