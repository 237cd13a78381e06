"""Tests of tests/hang.py: a run that does not end exits with 1 and prints the stacks of its processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests import hang, schedule
from tests.support.wait import eventually
from tests.unit.pytest_kit import asked_of_copy
from tests.unit.root_kit import needs_root

# pytest-timeout does not end code that runs outside a test.
HANGS = """
import time

def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        so_it_hangs()

def so_it_hangs():
    time.sleep(1000)
"""
SOON = """
from tests import hang
hang.LAST_SECONDS = 30
"""
VFORKS = """
import ctypes
open("/proc/self/comm", "wb").write(b"\\xff) R")
ctypes.CDLL(None).vfork() or __import__("time").sleep(1000)
"""
PASSES = """
import time
def test_passes():
    time.sleep(1.1)
"""


@needs_root("it reads the stack of another process")
def test_a_test_run_that_hangs_is_ended_and_its_stack_is_printed(tmp_path: Path) -> None:
    suite = SOON + HANGS
    done = asked_of_copy(tmp_path, PASSES, suite, "--numprocesses=1", "-p", "tests.sim.conftest")
    assert done.returncode == 1
    assert "has not ended within 30 s" in done.stderr
    assert "so_it_hangs (" in done.stderr


@needs_root("it reads the stack of another process")
def test_the_kernel_stack_of_a_program_without_python_is_printed() -> None:
    with subprocess.Popen(["sleep", "1000"]) as program:
        try:
            eventually(lambda: "nanosleep" in hang.stack(program.pid), 10, "a program that has begun to sleep")
        finally:
            program.kill()


@needs_root("it reads the stacks of other processes")
def test_the_stack_of_a_process_that_blocks_in_the_kernel_is_printed() -> None:
    """A parent of vfork() sleeps uninterruptibly until its child has ended. The parent's name is not in UTF-8."""
    with subprocess.Popen([sys.executable, "-c", VFORKS], start_new_session=True) as program:
        try:
            eventually(lambda: any(f"/proc/{program.pid}/" in text for text in hang.uninterruptible()), 10, "a stack")
        finally:
            os.killpg(program.pid, signal.SIGKILL)  # and the child


def test_the_stack_of_an_ended_process_contains_its_pid() -> None:
    with subprocess.Popen(["true"]) as program:
        pass
    assert str(program.pid) in hang.stack(program.pid)


def test_a_run_with_renew_durations_writes_only_the_durations_of_its_tests(tmp_path: Path) -> None:
    done = asked_of_copy(tmp_path, PASSES, "", "--numprocesses=1", "--renew-durations")
    assert done.returncode == 0, done.stdout
    durations = json.loads((tmp_path / "tests" / schedule.DURATIONS.name).read_text())
    assert list(durations) == ["tests/sim/test_some.py"], "durations of removed files were kept"
    assert durations["tests/sim/test_some.py"] >= 1.1
