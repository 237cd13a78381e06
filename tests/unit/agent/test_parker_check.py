"""`fgpu doctor` names each reason why the parker could not park or wake a tenant."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fgpu_ebpf.agent import parker_check, parker_client


@contextmanager
def answering(folder: Path, answer: bytes) -> Iterator[None]:
    """Answer one request about this process with a line."""

    def serve() -> None:
        sock, _ = listener.accept()
        with sock, sock.makefile("rb") as file:
            request = json.loads(file.readline())
            assert (request["op"], request["processes"][0]["pid"]) == ("state", os.getpid())
            sock.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / parker_client.SOCKET))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(10)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b'{"states": {"1": "unknown"}}\n', ""),
        (b'{"states": {"1": "unknown"}, "lacks": ["CAP_SYS_PTRACE"]}\n', "lacks CAP_SYS_PTRACE"),
        (b'{"result": "", "error": "parking needs NVIDIA driver 570 or later"}\n', "driver 570 or later"),
        (b"", "without an answer"),
        (b"[1]\n", "without an answer"),
        (b"no JSON\n", "does not answer"),
    ],
)
def test_the_answer_of_the_parker_decides(tmp_path: Path, answer: bytes, found: str) -> None:
    with answering(tmp_path, answer):
        check = parker_check.check(tmp_path)
    assert (check.name, check.ok) == ("parker", not found)
    assert found in check.found
    assert bool(check.fix) == bool(found)


def test_a_parker_that_does_not_listen_is_a_failed_check(tmp_path: Path) -> None:
    check = parker_check.check(tmp_path)
    assert (check.ok, check.fix) == (False, parker_client.fix())
    assert "parked tenants do not wake up" in check.found


def test_the_fix_names_a_parker_that_is_not_in_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parker_client, "PACKAGED", tmp_path / "fgpu-parker")
    assert parker_client.fix().endswith(" or run `fgpu-parker`")
    (tmp_path / "fgpu-parker").touch()
    assert parker_client.fix().endswith(f" or run `{tmp_path}/fgpu-parker`")
