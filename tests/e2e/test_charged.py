"""`./dev bench charged` on the simulated driver: in every scenario, all memory that the device holds is charged."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import zlib
from collections.abc import Callable

import pytest

from tests.support.host import ROOT
from tests.support.service import IN_A_WORLD

PARTS = 2  # a quick run runs only one of them
REFUSED = {"exp_fd": "cuMemCreate returns 2", "stack": "cuCtxSetLimit returns 2"}  # so do later calls of the scenario
MARK = re.compile(r"^ {3}\S.* +-?\d+ +-?\d+  lower +\d+ ms, higher +\d+ ms", re.MULTILINE)
MARKS = 134  # of all scenarios


def scenarios() -> list[str]:
    """Return the names of all scenarios in bench/charged.py."""
    text = (ROOT / "bench/charged.py").read_text(encoding="utf-8")
    (table,) = [node.value for node in ast.parse(text).body if _is_named(node, "SCENARIOS")]
    return [name for names in ast.literal_eval(table).values() for name in names]


def _is_named(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name


def bench(*names: str) -> str:
    """Run the command as a user types it, with a separate driver and agent. Return its output."""
    command = [*IN_A_WORLD, "./dev", "bench", "charged", *names]
    environment = {**os.environ, "FGPU_DEV_ALONE": "1"}  # the suite's own driver and agent occupy what a host has once
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timed
@pytest.mark.timeout(300)
def test_all_memory_that_the_device_holds_is_charged(scale: Callable[[int, int, int], int]) -> None:
    every = scenarios()
    part = scale(1, 1, PARTS)
    chosen = [name for name in every if name in REFUSED or zlib.crc32(name.encode()) % PARTS < part]
    said = bench(*chosen)
    figures = json.loads((ROOT / "build/bench/charged.json").read_text())
    assert figures["charged_scenarios"]["value"] == len(chosen)
    assert figures["charged_wrong"]["value"] == 0
    assert len(MARK.findall(said)) == figures["charged_rows"]["value"] >= 2 * len(chosen)
    assert chosen != every or figures["charged_rows"]["value"] == MARKS
    for name, refusal in REFUSED.items():
        part_of_it = said.partition(f"== {name}\n")[2].partition("\n== ")[0]
        assert f". {refusal}" in part_of_it, part_of_it
