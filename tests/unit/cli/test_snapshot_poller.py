"""Tests of the Snapshots that `fgpu top` requests: the agent's answers are complete, incomplete or missing."""

from __future__ import annotations

import queue
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fgpu_ebpf import control_client
from fgpu_ebpf.cli import top_input
from fgpu_ebpf.cli.top_input import LatestSnapshot, SnapshotPoller
from fgpu_ebpf.linux.wakeup import Wakeup


@pytest.fixture
def answers(tmp_path: Path) -> Iterator[queue.SimpleQueue[bytes]]:
    """Serve a control socket. Each connection gets the next answer of the queue, and waits while the queue is empty."""
    left: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.recv(1 << 16)
                peer.sendall(left.get())

    threading.Thread(target=serve, daemon=True).start()
    yield left
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_an_incomplete_answer_raises_a_connection_error(answers: queue.SimpleQueue[bytes], tmp_path: Path) -> None:
    for half in (b'{"ok": {"tena', b""):
        answers.put(half)
        with pytest.raises(ConnectionError, match="closed the connection without a complete answer"):
            control_client.call(tmp_path, {"verb": "snapshot"})


def test_a_failure_is_shown_until_the_next_reply(
    answers: queue.SimpleQueue[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top_input, "PERIOD_SECONDS", 0.01)
    answers.put(b'{"ok": {"number": 1}}\n')
    wakeup = Wakeup()
    found = SnapshotPoller(lambda: control_client.call(tmp_path, {"verb": "snapshot"}), wakeup)
    assert (found.latest.snapshot, found.latest.error) == ({"number": 1}, "")
    for answer, number, error in (
        (b'{"ok"', 1, "the agent closed the connection without a complete answer: read the agent's log"),
        (b'{"error": "busy", "code": 1}\n', 1, "busy"),
        (b'{"ok": {"number": 2}}\n', 2, ""),
    ):
        answers.put(answer)
        assert select.select([wakeup], [], [], 20)[0]
        wakeup.clear()
        assert (found.latest.snapshot, found.latest.error) == ({"number": number}, error)


def test_a_missing_answer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_input.time, "monotonic", lambda: 109.0)
    assert LatestSnapshot({}, "", 108.0).now().error == ""
    assert LatestSnapshot({}, "", 100.0).now().error == "no answer from the agent for 9 s"
