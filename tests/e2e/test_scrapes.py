"""The metrics address and its clients: many clients at once, silent clients, and contents that metrics never have."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.commands import ask, metrics_page
from tests.support.host import BUILD, LISTEN, MIB
from tests.support.service import Service
from tests.support.wait import eventually

MOST = 8
LATE_SECONDS = 0.5  # half of the time that the server waits for a request
HOST, PORT = LISTEN.split(":")
SECRET = "a-secret-of-its-own"


def scrape(_: int) -> bytes:
    """Return the whole response, or nothing if the server closed the connection.

    The server may close a connection if the request comes late. If this process was late, it connects again.
    """
    while True:
        begun = time.monotonic()
        with socket.create_connection((HOST, int(PORT)), timeout=20) as sock:
            try:
                sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                is_late = time.monotonic() - begun > LATE_SECONDS
                answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
            except (BrokenPipeError, ConnectionResetError):
                answer, is_late = b"", time.monotonic() - begun > LATE_SECONDS
        if answer or not is_late:
            return answer


def threads(service: Service) -> int:
    assert service.agent
    return len(os.listdir(f"/proc/{service.agent.pid}/task"))


def lasting(service: Service) -> int:
    """Return the number of threads, except short-lived ones, which serve an earlier client or a new limit."""
    found = []
    for _ in range(20):
        found.append(threads(service))
        time.sleep(0.02)
    return min(found)


def test_many_scrapes_at_once_are_complete_or_disconnected(service: Service, scale) -> None:
    """Eight scrapes are served at a time, each by a thread.

    A silent connection has no thread, and the agent still works.
    """
    before, number = lasting(service), scale(50, 200, 1000)
    socks = [socket.create_connection((HOST, int(PORT)), timeout=20) for _ in range(number)]
    assert ask(verb="ping")["pid"] == service.agent.pid  # type: ignore[union-attr]
    assert lasting(service) <= before
    for sock in socks:
        sock.close()
    eventually(lambda: threads(service) <= before, 15, "the exit of the threads")
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        said = [answer for answer in pool.map(scrape, range(number)) if answer]
    assert len(said) >= MOST
    assert all(answer.startswith(b"HTTP/1.0 200 ") and answer.endswith(b"\n") for answer in said)
    assert all(b"fgpu_build_info" in answer for answer in said)
    eventually(lambda: threads(service) <= before, 5, "the exit of the threads")


def test_clients_of_the_metrics_address_cannot_fail_the_probe_of_kubernetes(service: Service) -> None:
    """The probe uses the control socket, and fails while the agent hangs or does not run."""
    probe = [BUILD / "oci/fgpu-oci", "ping"]
    with contextlib.ExitStack() as clients:
        for _ in range(200):
            clients.enter_context(socket.create_connection((HOST, int(PORT)), timeout=20))
        assert subprocess.run(probe, check=False).returncode == 0
    assert service.agent
    os.kill(service.agent.pid, signal.SIGSTOP)
    try:
        assert subprocess.run(probe, check=False, stderr=subprocess.DEVNULL).returncode == 1
    finally:
        os.kill(service.agent.pid, signal.SIGCONT)
    assert subprocess.run([probe[0], "--run-dir", "/nonexistent", "ping"], check=False).returncode == 1


def test_slow_connections_prevent_no_scrape(service: Service) -> None:
    """Twelve connections send a byte now and then, and reconnect as soon as the server closes them."""
    with contextlib.ExitStack() as stack:

        def connected() -> socket.socket:
            return stack.enter_context(socket.create_connection((HOST, int(PORT)), timeout=20))

        drippers = [connected() for _ in range(12)]
        answers = []
        for number in range(40):
            for place, sock in enumerate(drippers):
                try:
                    sock.sendall(b"G")
                except OSError:
                    sock.close()
                    drippers[place] = connected()
            answers.append(scrape(number))
            time.sleep(0.05)
    assert [answer[:13] for answer in answers] == [b"HTTP/1.0 200 "] * 40


@pytest.mark.places("host")
def test_no_client_receives_command_lines_or_environments(service: Service, tenant, tmp_path: Path) -> None:
    assert HOST == "127.0.0.1", "the default address is not the loopback address"
    one = tenant(600 * MIB)
    client = one.client(before=f"env SECRET={SECRET}", via=SECRET)
    client.ok("context")
    assert SECRET in Path(f"/proc/{client.pid}/environ").read_text()
    assert SECRET in Path(f"/proc/{client.pid}/cmdline").read_text()

    def pages() -> list[str]:
        with socket.create_connection((HOST, int(PORT)), timeout=20) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            page = b"".join(iter(lambda: sock.recv(1 << 16), b"")).decode()
        return [metrics_page(), str(ask(verb="metrics")), page]

    eventually(lambda: all(one.name in shown for shown in pages()), 10, "the tenant on every page")
    assert not [shown for shown in pages() if SECRET in shown]
