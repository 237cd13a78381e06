"""Tests of the capabilities that a process keeps after it has dropped the rest, each in a new process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fgpu_ebpf.linux.capabilities import AGENT, GATEKEEPER, Capability
from tests.unit.root_kit import needs_root

ROOT = Path(__file__).parents[3]
SHOW = "print(open('/proc/self/status').read())"

pytestmark = needs_root("it drops capabilities, which other users do not have")


def status(code: str, *before: str) -> dict[str, str]:
    words = [*before, sys.executable, "-c", f"from fgpu_ebpf.linux import capabilities as p\n{code}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^(\w+):\s*(.*)$", done.stdout, re.MULTILINE))


def mask(kept: frozenset[Capability]) -> str:
    return f"{sum(1 << capability for capability in kept):016x}"


@pytest.mark.parametrize("kept", [AGENT, GATEKEEPER, frozenset()], ids=["agent", "gatekeeper", "none"])
def test_every_other_capability_is_removed_from_every_set(kept: frozenset[Capability]) -> None:
    is_kept = f"frozenset(map(p.Capability, {sorted(map(int, kept))}))"
    found = status(f"p.keep_only({is_kept}); {SHOW}")
    assert {found[name] for name in ("CapPrm", "CapEff", "CapBnd")} == {mask(kept)}
    assert (found["CapInh"], found["CapAmb"], found["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")


def test_a_program_started_by_a_new_thread_has_no_more_capabilities() -> None:
    start = f"import subprocess, sys, threading\nsubprocess.run([sys.executable, '-c', {SHOW!r}])"
    thread = f"import threading\nt = threading.Thread(target=lambda: exec({start!r})); t.start(); t.join()"
    found = status(f"p.keep_only(p.GATEKEEPER)\n{thread}")
    assert found["CapEff"] == found["CapPrm"] == mask(GATEKEEPER)


def test_a_dropped_capability_cannot_be_regained() -> None:
    found = status(f"p.keep_only(p.GATEKEEPER); p.keep_only(p.AGENT | set(p.Capability)); {SHOW}")
    assert found["CapEff"] == found["CapBnd"] == mask(GATEKEEPER)


def test_a_process_that_may_not_lower_the_bounding_set_drops_its_own_capabilities() -> None:
    """A process without SETPCAP, as under a systemd unit, keeps its bounding set."""
    found = status(f"p.keep_only(p.GATEKEEPER); {SHOW}", "setpriv", "--bounding-set=-setpcap")
    assert found["CapEff"] == found["CapPrm"] == mask(GATEKEEPER)
    assert found["CapBnd"] != mask(GATEKEEPER)
