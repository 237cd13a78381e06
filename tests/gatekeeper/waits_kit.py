"""Latency of hellos while other clients load the gatekeeper."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

from tests.gatekeeper.conftest import Keeper
from tests.gatekeeper.hello_client import hello
from tests.support.wait import running_of, waited_here, waiting_of


@dataclass
class Waits:
    """The waits of a number of hellos.

    Attributes:
        worked: the processor seconds that the gatekeeper used between each hello and its answer. A hello that queues
            behind other clients waits for the gatekeeper while it serves them, however few processors there are.
        took: seconds until each answer, without those in which this process or the gatekeeper waited for a processor.
        noise: the longest lateness of plain sleeps in between, in seconds.
    """

    worked: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    noise: float = 0.0


def waits(keeper: Keeper, number: int) -> Waits:
    """Measure a number of hellos, which must be answered."""
    measured = Waits()
    for _ in range(number):
        running, waiting = running_of(keeper.process.pid), waiting_of(keeper.process.pid)
        waited, began = waited_here(), time.monotonic()
        assert hello(keeper.run)
        seconds = time.monotonic() - began
        measured.worked.append(running())
        measured.took.append(seconds - waiting() - (waited_here() - waited))
        began = time.monotonic()
        time.sleep(0.02)
        measured.noise = max(measured.noise, time.monotonic() - began - 0.02)
    return measured


def prompt(measured: Waits) -> bool:
    """Return whether the median hello is answered within 50 ms, and every hello within 500 ms.

    Both limits hold for the gatekeeper's work before the answer, and for the time until the answer. Four times the
    noise is added to the time, because a hello needs a processor four times, and waits for it as long as the end of a
    sleep may be late. A single hello may take longer: the kernel queues connections in the order of their arrival,
    and a flood fills this queue while the gatekeeper waits for a processor.
    """
    return all(
        statistics.median(seconds) < 0.05 + noise and max(seconds) < 0.5 + noise
        for seconds, noise in ((measured.worked, 0.0), (measured.took, 4 * measured.noise))
    )
