"""All kinds of load at once: for 40 s in the usual run, for ten minutes in a full run. And all attacks at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "build/bench/soak.json"
HOSTILE = ROOT / "build/bench/hostile.json"
NONE = ("honest_refused", "honest_wrong", "accepted_tried", "restarts", "left_of_tenants", "left_on_host")
DONE = ("refused", "leave", "work", "contained", "check")  # actions of which each must have happened


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_soak_reports_no_error(scale) -> None:
    """The soak also checks, after some minutes, that nothing has grown."""
    seconds = scale(20, 40, 600)
    command = [sys.executable, "-m", "bench.soak", str(seconds / 60), "--restart-every", str(seconds / 2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: line["value"] for name, line in json.loads(FIGURES.read_text()).items()}
    assert all(found[f"soak_{name}"] for name in DONE), found
    assert any(name.startswith("soak_restart_engine") for name in found), found
    assert any(f"soak_restart_{which}" in found for which in ("agent", "gatekeeper", "both")), found
    assert not any(value for name, value in found.items() if name.startswith("soak_wrong_")), found
    assert found["soak_most_above"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_attacks_at_once_harm_no_neighbour_and_leave_nothing(scale) -> None:
    """The command has bars of time too, which hold on a machine without other work: `./dev soak hostile`."""
    seconds = scale(20, 30, 600)
    HOSTILE.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench.hostile", str(seconds / 60), "--seed", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300, check=False, cwd=ROOT)
    said = done.stdout + done.stderr
    assert HOSTILE.exists(), said
    found = {name: line["value"] for name, line in json.loads(HOSTILE.read_text()).items()}
    assert {name: found[f"hostile_{name}"] for name in NONE} == dict.fromkeys(NONE, 0), said
    assert all(found[f"hostile_{name}"] for name in ("honest_steps", "control_refused", "killed_under_kill")), said
