"""Twenty tenants with equal shares run at the same time, and each gets an equal part of the device's time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.spin_kit import Spin

pytestmark = [pytest.mark.timed, pytest.mark.slow]

TENANTS, SECONDS = 20, 12


@pytest.fixture
def twenty(spin: Path, unharmed: None) -> Iterator[list[Spin]]:
    """Start one program in each tenant."""
    started: list[Spin] = []
    try:
        for number in range(TENANTS):
            started.append(Spin(spin, f"many-{number}", "--weight", "100"))
        yield started
    finally:
        for one in started:
            one.close()


def test_twenty_tenants_with_equal_shares_get_equal_parts_of_the_time(twenty: list[Spin]) -> None:
    for program in twenty:
        program.begin(SECONDS)
    done = [program.kernels() for program in twenty]
    assert all(program.compute()["waits"] > 3 for program in twenty), "a program did not wait for turns"
    for kernels in done:
        assert kernels / sum(done) == pytest.approx(1 / TENANTS, rel=0.3)
