"""Tests of messages to the service manager: their contents, and that a manager that does not read delays nothing."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from fgpu_ebpf.linux import sd_notify
from tests.support.wait import Deadline


@pytest.fixture(params=["file", "abstract"])
def manager(request, tmp_path, monkeypatch) -> Iterator[socket.socket]:
    """Return the service manager's end of NOTIFY_SOCKET."""
    name = str(tmp_path / "notify") if request.param == "file" else f"\0fgpu-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind(name)
        monkeypatch.setenv("NOTIFY_SOCKET", name.replace("\0", "@"))
        yield sock


def test_the_manager_receives_ready_reloading_and_stopping(manager) -> None:
    begun = time.monotonic_ns() // 1000
    assert sd_notify.ready("two devices")
    assert sd_notify.reloading()
    assert sd_notify.ready()
    assert sd_notify.stopping()
    assert manager.recv(4096) == b"READY=1\nSTATUS=two devices"
    state, when = manager.recv(4096).decode().split("\n")
    assert state == "RELOADING=1"
    assert begun <= int(when.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert [manager.recv(4096) for _ in range(2)] == [b"READY=1", b"STOPPING=1"]


def test_nothing_is_sent_without_a_usable_socket(monkeypatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not sd_notify.ready()
    for address in ("", "vsock:2:23", "/nowhere/at/all"):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert not sd_notify.ready()


def test_a_manager_that_does_not_read_delays_nothing(manager) -> None:
    deadline = Deadline(2)
    assert sum(sd_notify.ready() for _ in range(1009)) < 1009
    assert not deadline.is_over()


def test_the_watchdog_is_notified_at_half_its_time(manager) -> None:
    clock = [100.0]
    environment = {**os.environ, "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())}
    watchdog = sd_notify.Watchdog(environment, lambda: clock[0])
    sent = []
    for _ in range(101):
        sent.append(watchdog.ping())
        clock[0] += 0.25
    assert [i for i, was in enumerate(sent) if was] == [0, 20, 40, 60, 80, 100]
    assert manager.recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "much"}, {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}],
)
def test_no_watchdog_message_is_sent_without_a_watchdog_of_this_process(manager, environment) -> None:
    assert not sd_notify.Watchdog({**os.environ, **environment}).ping()
