"""Tests of signals: the agent acts on a signal at once, not in its next round."""

from __future__ import annotations

import os
import selectors
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf import daemon

LONG_SECONDS = 60.0


@pytest.fixture
def agent() -> Iterator[Any]:
    """Return the parts of an agent that signals need, with the number of calls of each."""
    asked = {"end": 0, "reload_soon": 0, "round_soon": 0}

    def count(name: str):
        def more(*_: object) -> None:
            asked[name] += 1

        return more

    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD
    before = {number: signal.getsignal(number) for number in numbers}
    with selectors.DefaultSelector() as selector:
        made = SimpleNamespace(selector=selector, asked=asked, **{name: count(name) for name in asked})
        daemon._handle_signals(made)
        yield made
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "asks"),
    [
        (signal.SIGHUP, "reload_soon"),
        (signal.SIGTERM, "end"),
        (signal.SIGINT, "end"),
        (signal.SIGCHLD, "round_soon"),
    ],
)
def test_a_signal_calls_its_handler_once_and_wakes_the_loop(agent, number: int, asks: str) -> None:
    later = threading.Timer(0.1, os.kill, (os.getpid(), number))
    later.start()
    (heard,) = agent.selector.select(LONG_SECONDS)
    later.join()
    assert agent.asked == {"end": 0, "reload_soon": 0, "round_soon": 0} | {asks: 1}
    heard[0].data()
    assert agent.selector.select(0) == [], "the loop would never sleep again"
