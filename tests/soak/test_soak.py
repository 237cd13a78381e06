"""All kinds of load at once: for 40 s in the usual run, for ten minutes in a full run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "build/bench/soak.json"
DONE = ("refused", "leave", "work", "contained", "check")  # actions of which each must have happened


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_soak_reports_no_error(scale) -> None:
    """The soak also checks, after some minutes, that nothing has grown."""
    seconds = scale(20, 40, 600)
    command = [sys.executable, "-m", "bench.soak", str(seconds / 60), "--restart-every", str(seconds / 3)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: line["value"] for name, line in json.loads(FIGURES.read_text()).items()}
    assert all(found[f"soak_{name}"] for name in DONE), found
    assert any(name.startswith("soak_restart_engine") for name in found), found
    assert any(f"soak_restart_{which}" in found for which in ("agent", "gatekeeper", "both")), found
    assert not any(value for name, value in found.items() if name.startswith("soak_wrong_")), found
    assert found["soak_most_above"] == 0
