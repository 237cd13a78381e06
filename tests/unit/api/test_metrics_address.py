"""Tests of the address of the web page and the metrics: the agent listens at it as soon as that is possible."""

from __future__ import annotations

import errno
import gc
import os
import selectors
import socket
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from fgpu_ebpf.api.control_server import MetricsAddress
from fgpu_ebpf.snapshot import Snapshot

TRIES = 10


def test_an_address_that_the_kernel_refuses_to_watch_is_a_failed_check_and_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = "127.0.0.1:{1}".format(*free.getsockname())
    agent: Any = SimpleNamespace(
        settings=SimpleNamespace(listen=listen, listen_names=()), selector=selectors.DefaultSelector(), chores=[],
        failed_checks={}, snapshot=Snapshot(1.0), fresh=lambda: None,
    )  # fmt: skip

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOMEM, "no memory for epoll")

    with monkeypatch.context() as short:
        short.setattr(agent.selector, "register", refuse)
        address = MetricsAddress(agent)
        (keep,) = agent.chores
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(TRIES):
            keep()
        gc.collect()
        kept = len(os.listdir("/proc/self/fd")) - before
        assert kept < TRIES, "each try leaves a descriptor"  # a thread of an earlier test may have opened some
    assert "no memory for epoll" in agent.failed_checks["metrics"].found
    keep()
    assert not agent.failed_checks
    with socket.create_connection(("127.0.0.1", int(listen.partition(":")[2])), timeout=10) as client:
        client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
        for key, _ in agent.selector.select(10):
            key.data()
        assert client.recv(12) == b"HTTP/1.0 200"
    address.close()
    agent.selector.close()
