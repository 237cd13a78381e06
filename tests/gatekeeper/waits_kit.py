"""Latency of hellos while other clients load the gatekeeper."""

from __future__ import annotations

import time

from tests.gatekeeper.conftest import Keeper
from tests.gatekeeper.hello_client import hello
from tests.support.wait import waited_here, waiting_of


def waits(keeper: Keeper, number: int) -> tuple[list[float], float]:
    """Return the seconds of each hello, and the lateness of plain sleeps in between, which is the machine's noise.

    The time in which this process or the gatekeeper waited for a processor does not count. A hello that queues behind
    other clients waits for the gatekeeper while that runs.
    """
    took, noise = [], 0.0
    for _ in range(number):
        waiting, waited, began = waiting_of(keeper.process.pid), waited_here(), time.monotonic()
        assert hello(keeper.run)
        seconds = time.monotonic() - began
        took.append(seconds - waiting() - (waited_here() - waited))
        began = time.monotonic()
        time.sleep(0.02)
        noise = max(noise, time.monotonic() - began - 0.02)
    return took, noise


def prompt(measured: tuple[list[float], float]) -> bool:
    """Return whether all hellos but one took less than 50 ms, and that one less than 500 ms.

    Four times the noise is added to both, because a hello needs a processor four times, and waits for it as long as the
    end of a sleep may be late.
    """
    took, noise = measured
    return sorted(took)[-2] < 0.05 + 4 * noise and max(took) < 0.5 + 4 * noise
