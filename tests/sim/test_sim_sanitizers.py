"""The simulated driver under sanitizers: server, both libraries and nvidia-smi, with every conformance call.

shim/test_shim_sanitizers.py runs threads that use all of the driver at the same time, and fuzz/test_fuzz.py sends
arbitrary bytes to the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.sanitizers import ADDRESS, reported

from .conformance_kit import NO_DEVICE, REAL, WAITING
from .conftest import HERE, Machine

pytestmark = pytest.mark.slow
LISTINGS = (
    ["-L"],
    [],
    ["-q"],
    ["pmon", "-c", "1"],
    ["--query-gpu=name,memory.used,utilization.gpu", "--format=csv"],
    ["--query-compute-apps=pid,used_memory", "--format=csv,noheader"],
    ["--query-nothing"],
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the conformance program, with the sanitizer's library in front of the driver's. Return its path."""
    out = tmp_path_factory.mktemp("sanitized") / "conformance"
    return ADDRESS.compile(out, "-std=c11", *sorted(HERE.glob("conformance*.c")), "-ldl")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    settings = ADDRESS.environment(tmp_path)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    machine = Machine(ADDRESS.make("sim"), {"FGPU_SIM_GPUS": "2", **settings})
    yield machine
    code = machine.stop()
    assert not (text := reported(tmp_path)), text
    assert code == 0


@pytest.mark.parametrize("section", REAL | WAITING | NO_DEVICE)
def test_sanitizers_find_no_error_in_any_conformance_call(machine: Machine, program: Path, section: str) -> None:
    done = machine.run(program, section, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_sanitizers_find_no_error_in_any_listing_of_nvidia_smi(machine: Machine) -> None:
    preload = ("env", f"LD_PRELOAD={ADDRESS.runtime}")
    with machine.spawn("start(); alloc(100 << 20); say('holding'); wait()", preload) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "holding\n"
        for words in LISTINGS:
            done = machine.run(machine.tools / "nvidia-smi", *words, check=False)
            assert done.stdout + done.stderr, words
        holder.kill()
