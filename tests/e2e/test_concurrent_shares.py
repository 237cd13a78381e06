"""Shares of a concurrent device: the work of tenants that run at the same time follows their weights.

The simulated device of this file runs kernels side by side, and each takes 1.4 times as long while another tenant has
work. Turns would give two tenants one device together.
"""

from __future__ import annotations

import pytest

from tests.e2e.concurrent_kit import shared
from tests.e2e.spin_kit import Spin
from tests.support.host import PARALLEL
from tests.support.service import Service, run_on_devices

pytestmark = pytest.mark.timed
SLOWER = "140"
WARM_SECONDS, SECONDS = 3, 6
KERNEL_US = 4000  # so long that a busy tenant keeps the device busy also while it waits for a processor
inside = pytest.mark.skipif(PARALLEL != SLOWER, reason="is run by test_the_file_s_tests_pass_on_a_parallel_device")


@pytest.mark.skipif(PARALLEL == SLOWER, reason="this run has this device already")
def test_the_file_s_tests_pass_on_a_parallel_device() -> None:
    run_on_devices(__file__, 1, parallel=SLOWER)


def work(*programs: Spin) -> list[float]:
    """Return the work of each program in SECONDS, as a part of the work of the last one alone."""
    programs[-1].begin(WARM_SECONDS)
    alone = programs[-1].kernels() * SECONDS / WARM_SECONDS
    for seconds in (WARM_SECONDS, SECONDS):  # after the first time, the costs of launches are known
        before = shared()
        for one in programs:
            one.begin(seconds)
        done = [one.kernels() / alone for one in programs]
    assert shared() - before > 0.8 * SECONDS
    return done


@inside
def test_work_follows_weights_and_is_more_than_a_device(concurrent: Service, start) -> None:
    first, second = (
        start("first", "--weight", "300", kernel_us=KERNEL_US),
        start("second", "--weight", "100", kernel_us=KERNEL_US),
    )
    done = work(first, second)
    assert done[0] / sum(done) == pytest.approx(0.75, abs=0.05), done
    assert sum(done) > 1.06, done


@inside
def test_a_ceiling_is_one_of_work(concurrent: Service, start) -> None:
    done = work(
        start("first", "--compute", "25%", kernel_us=KERNEL_US), start("second", "--weight", "100", kernel_us=KERNEL_US)
    )
    assert 0.12 < done[0] < 0.28, done  # less than a quarter if it waits for a processor after each hold
    assert done[1] > 0.7, done
