"""Threads that may be in a call of the driver which they began before the lock."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from typing import NoReturn

import pytest

from fgpu_ebpf.parker import threads
from fgpu_ebpf.parker.protocol import RequestError
from fgpu_ebpf.parker.threads import ENOUGH_NS, Look


def wait(monkeypatch: pytest.MonkeyPatch, *looks: Look, most: int = 10) -> tuple[bool, int]:
    """Return the result for these looks, of which the last one is repeated, and the number of sleeps."""
    made = iter(looks)
    last = looks[-1]
    monkeypatch.setattr(threads, "look", lambda _: next(made, last))
    slept: list[float] = []
    return threads.are_past(1, most, lambda: len(slept), slept.append), len(slept)


def one(state: str, ns: int) -> Look:
    return {"1": (state.encode(), ns)}


@pytest.mark.parametrize(
    ("looks", "is_past", "sleeps"),
    [
        ([one("S", 5)], True, 1),  # asleep, and it has not run meanwhile
        ([one("R", 5)], False, 10),  # ready, and no processor runs it
        ([one("R", 5), one("R", 5 + ENOUGH_NS - 1)], False, 10),
        ([one("R", 5), one("R", 5 + ENOUGH_NS)], True, 1),
        ([one("S", 5), one("S", 6)], True, 2),  # it has run between two looks, and then not
        ([one("R", 5), one("S", 6)], True, 2),
        ([one("R", 5), {}], True, 1),  # it has ended
        ([{"1": (b"S", 5), "2": (b"R", 5)}], False, 10),
        ([one("S", 5), {"1": (b"S", 5), "2": (b"R", 0)}], True, 1),  # a new thread finds the lock
    ],
)
def test_a_thread_is_past_its_call(monkeypatch: pytest.MonkeyPatch, looks, is_past: bool, sleeps: int) -> None:
    assert wait(monkeypatch, *looks) == (is_past, sleeps)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)", "input()"])
def test_threads_of_a_program_are_past_in_short_time(program: str) -> None:
    lines = f"print(flush=True)\n{program}"
    with subprocess.Popen([sys.executable, "-c", lines], stdin=-1, stdout=-1) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            assert threads.look(process.pid)
            assert threads.are_past(process.pid, time.monotonic() + 30, time.monotonic, time.sleep)
        finally:
            process.kill()
    assert threads.look(process.pid) == {}


@pytest.mark.parametrize("call", ["listdir", "open"])
def test_threads_that_cannot_be_read_in_a_shortage_have_not_ended(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(RequestError, match="cannot be read"):
        threads.are_past(os.getpid(), 0, lambda: 0, lambda _: None)
