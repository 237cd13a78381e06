"""Threads that wait in a call of the driver are found, and threads of the driver itself are not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from fgpu_ebpf.agent import blocked_calls
from fgpu_ebpf.linux import call_stacks
from fgpu_ebpf.linux.call_stacks import Sleep, Where
from tests.support.wait import eventually

SOURCE = Path(__file__).with_name("stacks_library.c")
PROGRAM = """
import ctypes, sys, threading, time
driver, other, shim = map(ctypes.CDLL, sys.argv[1:])
print("ready", flush=True)
for line in sys.stdin:
    way = line.strip()
    if way == "own": driver.begin()
    else: threading.Thread(target={
        "driver": lambda: driver.wait_here(),
        "shim": lambda: shim.wait_here(),
        "other": lambda: other.wait_here(),
        "back": lambda: driver.wait_there(other.wait_here),
        "sleep": lambda: time.sleep(1000),
    }[way], daemon=True).start()
    print("done", flush=True)
"""


class Program:
    """A process that runs functions of a library with the driver's name, and of another library."""

    def __init__(self, folder: Path) -> None:
        pipe = subprocess.PIPE
        libraries = folder / "libcuda.so.1", folder / "libother.so", folder / "libfgpu.so"
        for library in libraries:
            subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-pthread", "-o", library, SOURCE], check=True)
        command = [sys.executable, "-c", PROGRAM, *map(str, libraries)]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"
        self.pid = self.process.pid

    def do(self, way: str) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(way + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"
        eventually(self._is_asleep, 10, "a thread that has begun its call")

    def _is_asleep(self) -> bool:
        """Return whether all threads sleep. The first waits for a line then, so no other waits for the interpreter."""
        tasks = sorted(Path(f"/proc/{self.pid}/task").iterdir(), key=lambda task: int(task.name))
        return all(task.joinpath("stat").read_text().rpartition(") ")[2].startswith("S") for task in tasks)

    def found(self) -> list[Where]:
        """Return where the threads sleep that are, or may be, in the driver."""
        return sorted(where for _, _, where in blocked_calls.find(self.pid, blocked_calls.Known()))


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    made.process.kill()
    made.process.wait()


@pytest.mark.parametrize("way", ["driver", "shim"])
def test_a_call_that_waits_in_the_driver_or_in_the_shim_is_found(program: Program, way: str) -> None:
    program.do(way)
    assert program.found() == [Where.IN_DRIVER]


@pytest.mark.parametrize("way", ["own", "other", "sleep"])
def test_a_thread_of_the_driver_or_outside_the_driver_is_not_found(program: Program, way: str) -> None:
    program.do(way)
    assert program.found() == []


def test_a_call_of_another_library_below_the_driver_may_be_in_the_driver(program: Program) -> None:
    program.do("back")
    assert program.found() == [Where.PERHAPS_IN_DRIVER]


def test_a_call_from_before_is_known_and_a_new_one_is_found(program: Program, tmp_path: Path) -> None:
    program.do("own")
    program.do("back")
    why, quiet = blocked_calls.before_parking([program.pid])
    assert (why, len(quiet)) == ("", 1)
    found: list[int] = []
    calls = blocked_calls.BlockedCalls(lambda: [program.pid], quiet, tmp_path, found.append)
    assert calls.look() == 0
    calls.start()
    program.do("driver")
    deadline = time.monotonic() + 10
    while not found and time.monotonic() < deadline:
        time.sleep(0.01)
    assert found == [program.pid]
    why, _ = blocked_calls.before_parking([program.pid])
    assert "is in a call of the driver" in why


@pytest.mark.parametrize("part", ["pids", "stacks"])
def test_a_search_continues_after_a_shortage_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """A search that ended would leave the tenant's calls waiting."""
    found, fails = list[int](), [True, True, False]

    def fail_first() -> None:
        if fails.pop(0):
            raise OSError(errno.EMFILE, "too many open files")

    def pids() -> list[int]:
        if part == "pids":
            fail_first()
        return [7]

    def find(pid: int, _: object) -> list[tuple[int, Sleep, Where]]:
        if part == "stacks":
            fail_first()
        return [(pid, Sleep(0, 0, b""), Where.IN_DRIVER)]

    monkeypatch.setattr(blocked_calls, "find", find)
    calls = blocked_calls.BlockedCalls(pids, {}, tmp_path, found.append)
    monkeypatch.setattr(calls._stopping, "wait", lambda _: None)
    calls._run()
    assert (found, fails) == ([7], [])


@pytest.mark.parametrize("error", [ProcessLookupError, FileNotFoundError, PermissionError, ValueError])
def test_a_process_that_cannot_be_read_is_woken_unless_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The first thread may have exited: then /proc shows no mappings of the process, and other threads may call."""

    def find(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(blocked_calls, "find", find)
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    for pid, found in ((os.getpid(), os.getpid()), (ended.pid, 0)):
        assert blocked_calls.BlockedCalls(lambda: [pid], {}, tmp_path, lambda _: None).look() == found  # noqa: B023


def test_a_call_is_found_although_the_code_around_it_cannot_be_read(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mapped file may be on a file system that returns errors."""
    program.do("driver")
    pread = os.pread

    def fail_for_code(fd: int, length: int, offset: int) -> bytes:
        if length == call_stacks._LONGEST_CALL:
            raise OSError(errno.EIO, "input/output error")
        return pread(fd, length, offset)

    monkeypatch.setattr(os, "pread", fail_for_code)
    assert program.found()


def test_a_process_whose_environment_cannot_be_read_is_refused_at_once(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> NoReturn:
        raise PermissionError(errno.EACCES, "permission denied")

    monkeypatch.setattr(blocked_calls, "_is_of_mps", fail)
    why, _ = blocked_calls.before_parking([program.pid])
    assert "cannot be read (permission denied)" in why


def test_a_process_without_the_driver_is_refused(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        why, _ = blocked_calls.before_parking([process.pid])
        process.kill()
    assert "no libcuda" in why


@pytest.mark.parametrize(
    ("code", "is_call"),
    [
        ("90 90 e8 01 02 03 04", True),  # call rel32
        ("90 90 90 90 90 ff d0", True),  # call *%rax
        ("90 90 90 90 41 ff d4", True),  # call *%r12
        ("90 ff 15 01 02 03 04", True),  # call *rel32(%rip)
        ("90 90 90 90 ff 50 18", True),  # call *0x18(%rax)
        ("90 90 90 90 90 ff e0", False),  # jmp *%rax
        ("48 8b 05 01 02 03 04", False),  # mov
    ],
)
def test_call_instructions_of_x86_are_known(monkeypatch: pytest.MonkeyPatch, code: str, is_call: bool) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert call_stacks.is_call(bytes.fromhex(code)) is is_call


def test_call_instructions_of_arm_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    for word, is_call in ((0x94000001, True), (0xD63F0100, True), (0xD61F0100, False), (0x14000001, False)):
        assert call_stacks.is_call(bytes(3) + word.to_bytes(4, "little")) is is_call


def test_a_tenant_that_always_runs_costs_a_tenth_of_a_processor_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its looks take 2 s each, because it has many threads."""
    clock, pauses = [0.0], list[float]()

    class Stopping:
        def is_set(self) -> bool:
            return len(pauses) >= 5

        def wait(self, seconds: float) -> None:
            pauses.append(seconds)

    def look() -> int:
        clock[0] += 2.0
        return 0

    calls = blocked_calls.BlockedCalls(list, {}, tmp_path, lambda _: None)
    monkeypatch.setattr(blocked_calls, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(calls, "_stopping", Stopping())
    monkeypatch.setattr(calls, "look", look)
    calls._run()
    assert clock[0] == 10.0, "it looked five times"
    assert clock[0] / (clock[0] + sum(pauses)) <= 0.1
