"""Turns at the gates of two programs divide a simulated device between them."""

import os
import time
from collections.abc import Iterator

import pytest

from tests.shim.gate_kit import KIT, OPEN, SHUT, end, said, shut, tell
from tests.shim.shim_kit import Agent, Simulator
from tests.support.wait import Deadline, quiet_seconds

pytestmark = pytest.mark.timed

SPINNER = """
f, s, n, stop = kernel(%d), stream(), 0, []
out("ready"); line()
threading.Thread(target=lambda: stop.append(line())).start()
while not stop:
    for _ in range(%d): n += launch(f, s) == 0
    need("cuStreamSynchronize", s)
out(n * %d)"""


def take_turns(agent: Agent, first: int, weights: list[int], seconds: float) -> tuple[list[float], list[float]]:
    """Give turns of 20 ms, each to the program that has had the least time for its weight, until `seconds` have passed.

    A turn lasts until its program has drained. Return for each program the time of its turns, and the part of that time
    in which its gate was certainly open and no program waited for a processor.
    """
    given, quiet, turn = [0.0] * len(weights), [0.0] * len(weights), 1
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        turn += 1
        index = min(range(len(weights)), key=lambda i: given[i] / weights[i])
        began, drained = time.monotonic(), Deadline(5)
        agent.do("gate", word=turn << 2 | OPEN, page=first + index)
        opened = quiet_seconds()
        time.sleep(0.02)
        quiet[index] += quiet_seconds() - opened
        agent.do("gate", word=turn << 2 | SHUT, page=first + index)
        while True:
            now = agent.do("status")["pages"][first + index]
            if now["drained"] == turn or not now["in_flight"]:
                break
            assert not drained.is_over(), now
        given[index] += time.monotonic() - began
    return given, quiet


@pytest.fixture
def one_processor() -> Iterator[None]:
    """Run all programs of the test on one processor: in a virtual machine, waking another processor may take 0.1 ms."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("us", "deep"), [(20, 50), (200, 20), (4_000, 3)])
def test_each_program_s_work_fills_at_least_half_of_its_turns_and_hardly_exceeds_them(
    one_processor: None, simulator: Simulator, us: int, deep: int
) -> None:
    """Turns are given 3:1. By its own count, each program works 50% to 102% of the time of its turns.

    The least part is that of the time in which no program waited for a processor.
    """
    agent = simulator.agent
    shut(agent, 1)
    first = len(agent.do("status")["pages"])
    processes = []
    for _ in range(2):  # in the order of their pages
        processes.append(simulator.start(KIT + SPINNER % (us, deep, us)))
        assert said(processes[-1]) == ["ready"]
    for process in processes:
        tell(process)
    for page_of in (first, first + 1):
        while agent.do("status")["pages"][page_of]["waiting"] == 0:
            time.sleep(0.01)
    given, quiet = take_turns(agent, first, [3, 1], 4)
    for number, process in enumerate(processes):
        tell(process)
        agent.do("gate", word=1 << 20 | OPEN, page=first + number)
    done = [said(process)[0] / 1e6 for process in processes]
    for process in processes:
        end(process)
    print(f"{us} us: {done[0]:.3f} s of {given[0]:.3f} s and {done[1]:.3f} s of {given[1]:.3f} s; {quiet}")
    for its, turns, least in zip(done, given, quiet, strict=True):
        assert 0.5 * least < its < 1.02 * turns, (done, given, quiet)
