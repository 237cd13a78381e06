"""Tenants that leave the device idle in their own turns run at the same time, and take turns again if they do not."""

from __future__ import annotations

import time

import pytest

from tests.e2e.spin_kit import Spin
from tests.support.commands import metrics
from tests.support.service import Service
from tests.support.wait import eventually

pytestmark = pytest.mark.timed
PERIOD_MS, LIGHT_US = 0.8, 200
BUSY_US = 4000  # so long that a busy tenant keeps the device busy also while it waits for a processor
LIGHT_SECONDS, BUSY_SECONDS = 9, 4


def lent() -> float:
    """Return the seconds for which all tenants of the device could launch at the same time."""
    return metrics().get(("fgpu_slice_lent_seconds_total", frozenset({("gpu", "0")})), 0.0)


def begin(one: Spin, seconds: float, how: str, period_ms: float) -> None:
    assert one.process.stdin
    kernel_us = LIGHT_US if period_ms else BUSY_US
    one.process.stdin.write(f"{seconds} {period_ms} {time.monotonic_ns() + 20_000_000} {kernel_us} {how}\n")


def assert_turns(first: Spin, second: Spin) -> None:
    """Check that two busy tenants with the weights 3:1 take turns."""
    for one in (first, second):
        one.kernels()
        begin(one, BUSY_SECONDS, "burst", 0)
    waits = first.compute()["waits"]
    eventually(lambda: first.compute()["waits"] > waits + 10, BUSY_SECONDS, "turns")
    before = lent()
    done = [one.kernels() for one in (first, second)]
    figures = done, lent() - before, first.compute(), second.compute()
    assert done[0] / sum(done) == pytest.approx(0.75, abs=0.06), figures
    assert lent() - before < BUSY_SECONDS / 8, figures


def test_light_tenants_run_at_the_same_time_and_busy_ones_take_turns(start) -> None:
    first, second = start("first", "--weight", "300"), start("second", "--weight", "100")
    for one in (first, second):
        begin(one, LIGHT_SECONDS, "one", PERIOD_MS)
    eventually(lambda: lent() > 1, LIGHT_SECONDS, "lending")
    assert_turns(first, second)


def test_tenants_take_turns_after_a_gatekeeper_died_while_the_device_was_lent(start, service: Service) -> None:
    first, second = start("first", "--weight", "300"), start("second", "--weight", "100")
    for one in (first, second):
        begin(one, LIGHT_SECONDS, "one", PERIOD_MS)
    eventually(lambda: lent() > 1, LIGHT_SECONDS, "lending")
    service.kill_gatekeeper()
    eventually(service.gatekeepers, 3, "another gatekeeper")
    assert_turns(first, second)
