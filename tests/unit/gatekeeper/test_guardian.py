"""Tests of the copies of MPS clients' descriptors."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fgpu_ebpf.gatekeeper import guardian
from fgpu_ebpf.gatekeeper.guardian import Guardian
from fgpu_ebpf.linux import procfs
from tests.support.wait import eventually

KEY, OWNER, BLOCKING = 1, 7, 99


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file that stands for a node of the driver."""
    monkeypatch.setattr(guardian, "NODES", f"{tmp_path}/nvidia")
    monkeypatch.setattr(guardian.statx, "is_character_device", lambda path: not path.endswith("/dev/zero"))
    path = tmp_path / "nvidia0"
    path.touch()
    return path


@pytest.fixture
def client(node: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Return a process that opens the node twice, and another file, after it has read a line."""
    code = f"import sys; sys.stdin.readline(); kept = [open({str(node)!r}) for _ in range(2)] + [open('/dev/zero')]"
    command = [sys.executable, "-c", f"{code}; print('open', flush=True); sys.stdin.readline()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


def opened(client: subprocess.Popen[bytes]) -> None:
    assert client.stdin
    assert client.stdout
    client.stdin.write(b"\n")
    client.stdin.flush()
    assert client.stdout.readline() == b"open\n"


def copies(node: Path) -> int:
    """Return the number of descriptors of the node in this process."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}") == str(node)
        except OSError:
            continue
    return found


@pytest.fixture
def watched(client: subprocess.Popen[bytes]) -> Guardian:
    guard, pidfd = Guardian(), os.pidfd_open(client.pid)
    guard.watch(KEY, client.pid, pidfd, OWNER)
    os.close(pidfd)  # the session's own
    return guard


def test_descriptors_that_a_client_opens_later_are_copied(watched, client, node):
    opened(client)
    eventually(lambda: copies(node) == 2)
    assert len(watched) == 2  # and no other file


def test_copies_outlive_a_killed_client_until_its_kernels_should_have_ended(watched, client, node):
    opened(client)
    eventually(lambda: copies(node) == 2)
    client.kill()
    client.wait()
    begun_ns = time.monotonic_ns()
    watched.end(KEY, begun_ns + 500_000_000)
    watched.end(KEY, 0)  # the session's end is reported twice
    eventually(lambda: copies(node) == 0)
    assert time.monotonic_ns() - begun_ns >= 500_000_000 + guardian.KEEPS_NS
    assert len(watched) == 0


def test_a_client_that_reports_endless_work_keeps_its_memory_for_a_bounded_time(watched, client, node, monkeypatch):
    monkeypatch.setattr(guardian, "MOST_KEEPS_NS", 700_000_000)
    opened(client)
    eventually(lambda: copies(node) == 2)
    watched.end(KEY, 2**63)
    eventually(lambda: copies(node) == 0, 5)


def test_a_client_with_many_descriptors_has_a_bounded_number_of_copies(watched, client, node, monkeypatch):
    monkeypatch.setattr(guardian, "MOST_OF_CLIENT", 1)
    opened(client)
    eventually(lambda: copies(node) == 1)
    time.sleep(4 * guardian.LOOK_SECONDS)
    assert copies(node) == 1


@pytest.mark.parametrize(("bound", "owner", "more"), [("MOST_OF_OWNER", OWNER, 0), ("MOST_OF_OWNER", 8, 2),
                                                      ("MOST", 8, 0)])  # fmt: skip
def test_a_workload_and_the_host_have_a_bounded_number_of_copies(
    watched, client, node, monkeypatch, bound, owner, more
):
    """`more`: the copies of a second client, of this owner."""
    monkeypatch.setattr(guardian, bound, 2)
    opened(client)
    eventually(lambda: copies(node) == 2)
    code = f"import sys; kept = [open({str(node)!r}) for _ in range(3)]; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        pidfd = os.pidfd_open(process.pid)
        watched.watch(2, process.pid, pidfd, owner)
        os.close(pidfd)
        eventually(lambda: watched._clients[2].looked_ns)
        eventually(lambda: copies(node) == 2 + more)
        watched.end(KEY, 0)  # makes room after KEEPS_NS
        eventually(lambda: len(watched._clients[2].copies) == 2, 5)
        process.kill()


def test_a_file_that_is_no_device_is_not_copied(watched, client, node, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(guardian, "NODES", str(node.parent))
    opened(client)
    time.sleep(4 * guardian.LOOK_SECONDS)
    assert copies(node) == len(watched) == 0
    monkeypatch.setattr(guardian, "NODES", "/dev/zero")
    eventually(lambda: len(watched) == 1)


@contextmanager
def program(code: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run a program that prints a line and reads a line. Yield the program after its line, and its pidfd."""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        pidfd = os.pidfd_open(process.pid)
        try:
            yield process, pidfd
        finally:
            os.close(pidfd)
            process.kill()


def go_on(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin
    process.stdin.write(b"\n")
    process.stdin.flush()


def test_the_copy_of_a_descriptor_that_the_client_closes_is_closed(watched, node):
    code = f"import sys; kept = open({str(node)!r}); print(flush=True)"
    code += "; sys.stdin.readline(); kept.close(); sys.stdin.read()"
    with program(code) as (process, pidfd):
        watched.watch(2, process.pid, pidfd, OWNER)
        eventually(lambda: copies(node) == 1)
        go_on(process)
        eventually(lambda: copies(node) == 0, 5)


def test_copies_stay_while_only_the_first_thread_of_a_client_has_exited(watched, node):
    """/proc then lists no descriptor of the client, although another thread may have kernels that run."""
    number = 93 if platform.machine() == "aarch64" else 60  # exit(2), which ends one thread
    code = f"import ctypes, sys, threading, time; kept = [open({str(node)!r}) for _ in range(2)]"
    code += "; threading.Thread(target=time.sleep, args=(60,)).start(); print(flush=True); sys.stdin.readline()"
    code += f"; ctypes.CDLL(None).syscall({number}, 0)"
    with program(code) as (process, pidfd):
        watched.watch(2, process.pid, pidfd, OWNER)
        eventually(lambda: copies(node) == 2)
        go_on(process)
        eventually(lambda: not os.listdir(f"/proc/{process.pid}/fd"))
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert (copies(node), procfs.alive(pidfd)) == (2, True)
            time.sleep(0.01)


def test_a_client_that_ends_during_a_search_is_not_searched(watched, client, monkeypatch):
    pidfd = os.pidfd_open(client.pid)
    watched.watch(2, client.pid, pidfd, OWNER)
    os.close(pidfd)
    searched = []

    def search(found):
        if found.pid == client.pid:  # the guardians of other tests may still search
            searched.append(found)
            watched.end(KEY, 0)
            watched.end(2, 0)

    monkeypatch.setattr(guardian, "_copy", search)
    eventually(lambda: not watched._runs, 5)
    assert len(searched) == 1


def test_a_client_that_blocks_a_search_delays_only_the_searches_of_its_owner(client, node, monkeypatch):
    """The kernel copies no descriptor of a process that is in execve() and waits for a file system of its own."""
    guard, goes_on, copy, blocked = Guardian(), threading.Event(), guardian._copy, []

    def search(found):
        if found.owner == BLOCKING:  # the guardians of other tests may still search
            blocked.append(found)
            goes_on.wait()
        copy(found)

    monkeypatch.setattr(guardian, "_copy", search)
    pidfd = os.pidfd_open(client.pid)
    guard.watch(2, client.pid, pidfd, BLOCKING)
    eventually(lambda: blocked)
    guard.watch(KEY, client.pid, pidfd, OWNER)
    os.close(pidfd)
    opened(client)
    eventually(lambda: copies(node) == 2)
    guard.end(KEY, 0)
    guard.end(2, 0)
    eventually(lambda: copies(node) == 0)
    assert guard._ended == blocked, "the blocked thread may still use the pidfd"
    goes_on.set()
    eventually(lambda: not guard._runs)


def test_a_thread_that_could_not_be_started_is_started_when_the_client_registers_again(client, node, no_thread_once):
    guard, pidfd = Guardian(), os.pidfd_open(client.pid)
    with pytest.raises(OSError, match="can't start new thread"):
        guard.watch(KEY, client.pid, pidfd, OWNER)
    guard.watch(KEY, client.pid, pidfd, OWNER)
    os.close(pidfd)
    opened(client)
    eventually(lambda: copies(node) == 2)
    guard.end(KEY, 0)


def test_the_thread_ends_with_the_last_client_and_starts_again(watched, client, node):
    watched.end(KEY, 0)
    eventually(lambda: not watched._runs)
    pidfd = os.pidfd_open(client.pid)
    watched.watch(KEY, client.pid, pidfd, OWNER)
    os.close(pidfd)
    opened(client)
    eventually(lambda: copies(node) == 2)
