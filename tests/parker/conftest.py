"""The parker, on a machine with the simulated driver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest

from tests.parker.parker_kit import HOLDS, Parker
from tests.sim.checkpoint_kit import serving
from tests.sim.conftest import Machine, machine, make_machine, tools

__all__ = ["machine", "make_machine", "tools"]


@pytest.fixture
def parker(machine: Machine, tmp_path: Path) -> Iterator[Parker]:
    parker = Parker(machine)
    yield parker
    parker.end()


@pytest.fixture
def target(machine: Machine) -> Iterator[Popen[str]]:
    with serving(machine, HOLDS) as program:
        yield program
