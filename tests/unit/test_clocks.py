"""F8: decisions by time use the monotonic clock. The wall clock serves only output and comparisons with time stamps."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OF_THE_WALL = {"time", "time_ns", "now", "utcnow", "today", "CLOCK_REALTIME", "CLOCK_REALTIME_COARSE", "CLOCK_TAI"}
PACKAGE = ROOT / "fgpu_ebpf"
SHOWN = {
    # where, how often and for what purpose the wall clock is read
    "agent/agent.py": 1,  # when the first Snapshot was taken
    "tenancy/event_log.py": 1,  # when an event happened
    "agent/policy_reload.py": 1,  # when policies were read last
    "policy/folder.py": 1,  # whether a file was written within the last half second, by its time stamp
    "agent/nvml_reconcile.py": 1,  # NVML's samples have time stamps of this clock
    "agent/snapshot_builder.py": 1,  # when a Snapshot was taken
    "agent/device_release.py": 2,  # since and until when devices are released
    "agent/usage_meter.py": 1,  # the ten minutes of the calendar in which a device was used
    "kubernetes/dra_driver.py": 1,  # when a claim was prepared, in its status
    "cli/usage.py": 1,  # `fgpu usage --since`
    "cli/views.py": 1,  # `fgpu events --since`: events have times of this clock
}
C_OF_THE_WALL = re.compile(r"CLOCK_REALTIME|CLOCK_TAI|gettimeofday|\btime\(|ktime_get_(real|tai)|FUTEX_CLOCK_REALTIME")
SOURCES = [
    path
    for folder in ("shim", "bpf", "oci")
    for path in (ROOT / folder).rglob("*.[chS]")
    if "include" not in path.parts
]


def wall_clocks(path: Path) -> int:
    """Return the number of reads of the wall clock in a module."""
    names = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
    holders = {"time", "datetime", "date"}
    return sum(n.attr in OF_THE_WALL and isinstance(n.value, ast.Name) and n.value.id in holders for n in names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_module_reads_the_wall_clock_only_as_often_as_this_test_lists(path: Path) -> None:
    assert wall_clocks(path) == SHOWN.get(str(path.relative_to(PACKAGE)), 0)
    assert not re.search(r"from (time|datetime) import .*\b(time|time_ns|datetime)\b", path.read_text())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_c_code_never_uses_the_wall_clock(path: Path) -> None:
    assert not C_OF_THE_WALL.search(path.read_text())
