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
MARKS = 139  # of all scenarios
AS_ON_A_CARD = ("former", "formats", "sparse")  # scenarios of the third table in docs/charged-memory.md
FIGURES = re.compile(r"^ {3}(\S.*?) +(\d+) +(-?\d+)  lower .* ms  (\S.*)$", re.MULTILINE)
CARD_FIGURES = re.compile(r"^\| `(\w+)`: (.+?) \| (\d+) \| (\S.*?) \| (\d+) \|", re.MULTILINE)
LEDGER_MIB = 2  # by which the ledger may differ from the device


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


def output_of(said: str, name: str) -> str:
    return said.partition(f"== {name}\n")[2].partition("\n== ")[0]


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
        assert f". {refusal}" in output_of(said, name), output_of(said, name)


@pytest.mark.timed
@pytest.mark.timeout(300)
def test_contexts_and_arrays_take_as_much_as_on_a_card() -> None:
    said = bench(*AS_ON_A_CARD)
    table = (ROOT / "docs/charged-memory.md").read_text(encoding="utf-8").partition("\nThe third table ")[2]
    rows = [row for row in CARD_FIGURES.findall(table.partition("\n## ")[0]) if row[0] in AS_ON_A_CARD]
    assert {row[0] for row in rows} == set(AS_ON_A_CARD)
    for name, mark, device, nvml, ledger in rows:
        found = [row[1:] for row in FIGURES.findall(output_of(said, name)) if row[0] == mark]
        assert found, (name, mark)
        for device_here, ledger_here, nvml_here in found:
            assert (device_here, nvml_here) == (device, nvml), (name, mark)
            assert abs(int(ledger_here) - int(ledger)) <= LEDGER_MIB, (name, mark)
