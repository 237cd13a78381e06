"""The server alone: one per directory, clean ends, bad settings, peers that send false data or do not read, no leak."""

from __future__ import annotations

import os
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sim.server_kit import ATTACH, BLOCK, CLOSE, CONTEXT, DEVICE, GIVE, HELLO, MEMORY, REQUEST, TAKE, request
from tests.support.wait import eventually

SHARE, OPEN, EXPORT, IMPORT, DROP, FAULT = range(10, 16)
RESIDENT = 22
RESET = 0  # a fault


class Server:
    def __init__(self, tools: Path, directory: Path, *prefix: str) -> None:
        self.program = tools / "fgpu-simd"
        self.directory = directory
        self.process = subprocess.Popen(
            [*prefix, str(self.program), "--dir", str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(self.directory / "driver"))
        sock.settimeout(5)
        return sock

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self, how: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(how)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def server(tools: Path, tmp_path: Path) -> Iterator[Server]:
    running = Server(tools, tmp_path)
    yield running
    if running.process.poll() is None:
        assert running.stop()[0] == 0


def ask(sock: socket.socket, message: bytes) -> tuple[int, int]:
    """Return status and count of the reply; (-1, 0): the server closed the connection."""
    sock.send(message)
    answer = sock.recv(1 << 18)
    if not answer:
        return (-1, 0)
    _, _, status, count = struct.unpack_from("<IIII", answer)
    return status, count


def used(server: Server) -> int:
    with server.connect() as sock:
        sock.send(request(MEMORY))
        return int(struct.unpack_from("<QQQQ", sock.recv(4096), 16)[2])


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_sigint_end_the_server_cleanly(server: Server, how: signal.Signals) -> None:
    with server.connect() as sock:
        assert ask(sock, request(HELLO)) == (0, 1)
        assert server.stop(how) == (0, "")
    assert not (server.directory / "driver").exists()


def test_the_socket_is_open_to_all_users(server: Server) -> None:
    assert (server.directory / "driver").stat().st_mode & 0o777 == 0o666


def test_a_second_server_in_one_directory_is_refused(server: Server) -> None:
    second = subprocess.run(
        [server.program, "--dir", server.directory], capture_output=True, text=True, timeout=10, check=False
    )
    assert second.returncode == 1
    assert second.stdout == ""
    assert second.stderr == f"fgpu-simd: {server.directory}: another server is running here\n"
    with server.connect() as sock:
        assert ask(sock, request(HELLO)) == (0, 1)


def test_a_stale_socket_is_replaced(tools: Path, tmp_path: Path) -> None:
    first = Server(tools, tmp_path)
    first.process.kill()
    first.process.wait()
    assert (tmp_path / "driver").exists()
    second = Server(tools, tmp_path)
    with second.connect() as sock:
        assert ask(sock, request(HELLO)) == (0, 1)
    assert second.stop() == (0, "")


@pytest.mark.parametrize(
    ("name", "value"),
    [("GPUS", "x"), ("GPUS", "17"), ("GPUS", "-1"), ("MEMORY", "16GB"), ("MEMORY", "1"), ("MEMORY", "-4GiB"),
     ("MEMORY", "99999999999GiB"), ("MODEL", "h100"), ("MEMORY_LIMITS", "yes")],
)  # fmt: skip
def test_invalid_settings_are_refused(tools: Path, tmp_path: Path, name: str, value: str) -> None:
    environment = {f"FGPU_SIM_{name}": value}
    words = [tools / "fgpu-simd", "--dir", tmp_path]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"fgpu-simd: FGPU_SIM_{name} is ")
    assert done.stderr.count("\n") == 1


def test_a_dump_without_a_server_is_an_error(tools: Path, tmp_path: Path) -> None:
    words = [tools / "fgpu-simd", "--dump", "--dir", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no server is running here" in done.stderr


MALFORMED = {
    "empty": b"\0",
    "short": request(HELLO)[:-1],
    "long": request(HELLO) + b"\0",
    "huge": b"\xff" * 100_000,
    "magic": b"\0" * REQUEST.size,
    "operation": request(99),
    "kind": request(TAKE, kind=99),
    "give": request(GIVE, kind=BLOCK, context=1, size=1),
    "give context": request(GIVE, kind=CONTEXT, context=1),
    "close": request(CLOSE, context=7),
}


@pytest.mark.parametrize("message", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_message_disconnects_only_its_sender(server: Server, message: bytes) -> None:
    with server.connect() as good, server.connect() as bad:
        assert ask(good, request(TAKE, kind=CONTEXT, context=1)) == (0, 0)
        before = used(server)
        assert ask(bad, message) == (-1, 0)
        assert ask(good, request(HELLO)) == (0, 1)
        assert used(server) == before


@pytest.mark.parametrize("excess", [(1, 0), (0, 1)], ids=["bytes", "requested"])
def test_a_client_that_frees_more_than_it_holds_is_disconnected(server: Server, excess: tuple[int, int]) -> None:
    with server.connect() as sock:
        assert ask(sock, request(TAKE, kind=CONTEXT, context=1)) == (0, 0)
        assert ask(sock, request(TAKE, kind=BLOCK, context=1, size=1009, asked=1009)) == (0, 0)
        assert ask(sock, request(GIVE, kind=BLOCK, context=1, size=1009 + excess[0], asked=1009 + excess[1])) == (-1, 0)
    eventually(lambda: used(server) == 0)


LIES = {
    "device past the last": (request(MEMORY, device=1), 2),
    "context twice": (request(TAKE, kind=CONTEXT, context=1), 3),
    "context 0": (request(TAKE, kind=CONTEXT, context=0), 3),
    "block of no context": (request(TAKE, kind=BLOCK, context=0, size=1), 3),
    "block of a foreign context": (request(TAKE, kind=BLOCK, context=2, size=1), 3),
    "more than there is": (request(TAKE, kind=BLOCK, context=1, size=1 << 60), 1),
    "more than can be counted": (request(TAKE, kind=BLOCK, context=1, size=(1 << 64) - 1), 1),
    "shared without a file": (request(SHARE, kind=BLOCK, context=1, size=0), 3),
    "opened without the key": (request(OPEN, context=1, asked=2), 3),
    "exported without the key": (request(EXPORT, context=1, asked=2), 3),
    "imported without a descriptor": (request(IMPORT), 3),
    "asked for more than can be added": (request(TAKE, kind=BLOCK, context=1, asked=(1 << 64) - 1), 3),
}


@pytest.mark.parametrize(("message", "status"), LIES.values(), ids=LIES)
def test_impossible_requests_are_refused(server: Server, message: bytes, status: int) -> None:
    with server.connect() as other, server.connect() as sock:
        assert ask(other, request(TAKE, kind=CONTEXT, context=2)) == (0, 0)
        assert ask(sock, request(TAKE, kind=CONTEXT, context=1)) == (0, 0)
        before = used(server)
        assert ask(sock, message)[0] == status
        assert used(server) == before


SHARE_REPLY = struct.Struct("<QQQII")


def share(sock: socket.socket, size: int, context: int = 1) -> tuple[int, tuple[int, ...]]:
    """Share memory of a context. Return the status, and the key or an empty tuple."""
    file = os.memfd_create("contents")
    socket.send_fds(sock, [request(SHARE, kind=BLOCK, context=context, size=size)], [file])
    os.close(file)
    answer = sock.recv(4096)
    status = struct.unpack_from("<IIII", answer)[2]
    return status, () if status else SHARE_REPLY.unpack_from(answer, 16)[:2]


def test_shared_memory_cannot_be_freed_as_private_memory(server: Server) -> None:
    """No byte can be shared twice, and a shared byte cannot be freed as a private one."""
    with server.connect() as sock:
        assert ask(sock, request(TAKE, kind=CONTEXT, context=1)) == (0, 0)
        assert ask(sock, request(TAKE, kind=BLOCK, context=1, size=1009)) == (0, 0)
        assert share(sock, 1010)[0] == 3
        assert share(sock, 1000)[0] == 0
        assert share(sock, 10)[0] == 3
        assert ask(sock, request(GIVE, kind=BLOCK, context=1, size=9)) == (0, 0)
        assert ask(sock, request(GIVE, kind=BLOCK, context=1, size=1)) == (-1, 0)
    eventually(lambda: used(server) == 0)


def test_only_its_holders_can_drop_a_share(server: Server) -> None:
    with server.connect() as sock, server.connect() as other, server.connect() as third:
        assert ask(sock, request(TAKE, kind=CONTEXT, context=1)) == (0, 0)
        assert ask(sock, request(TAKE, kind=BLOCK, context=1, size=1009)) == (0, 0)
        low, high = share(sock, 1009)[1]
        assert ask(third, request(DROP, context=low, asked=high)) == (-1, 0)
        before = used(server)
        assert ask(other, request(OPEN, context=low, asked=high))[0] == 0
        assert ask(sock, request(DROP, context=low, asked=high)) == (0, 0)
        assert ask(sock, request(DROP, context=low, asked=high)) == (-1, 0)
        eventually(lambda: used(server) < before)
        assert used(server) >= 1009
    eventually(lambda: used(server) == 0)


def test_the_number_of_shares_is_bounded(server: Server) -> None:
    with server.connect() as sock:
        assert ask(sock, request(TAKE, kind=CONTEXT, context=1)) == (0, 0)
        assert ask(sock, request(TAKE, kind=BLOCK, context=1, size=4096)) == (0, 0)
        assert [share(sock, 1)[0] for _ in range(1030)] == [0] * 1024 + [1] * 6
    eventually(lambda: used(server) == 0)
    eventually(lambda: server.descriptors() < 12)


@pytest.mark.parametrize("stall", ["400ms", "3600s"])
def test_an_nvml_stall_delays_every_nvml_request_and_no_cuda_request(tools: Path, tmp_path: Path, stall: str) -> None:
    """Further messages of the waiting peer wait too. No other peer waits, and no connection is closed.

    The short stall ends by itself, and the long one with the faults.
    """
    start = time.monotonic()
    server = Server(tools, tmp_path, "env", f"FGPU_SIM_FAULT=nvml-stall:{stall}")
    with server.connect() as nvml, server.connect() as cuda:
        for _ in range(3):
            nvml.send(request(MEMORY, flags=2))
        assert ask(cuda, request(MEMORY)) == (0, 0)
        if stall == "3600s":
            assert select.select([nvml], [], [], 0.2)[0] == []
            assert ask(cuda, request(FAULT, kind=RESET)) == (0, 0)
        assert [len(nvml.recv(4096)) for _ in range(3)] == [48] * 3
        assert stall == "3600s" or time.monotonic() - start >= 0.4
    assert server.stop() == (0, "")


def send_many(sock: socket.socket, message: bytes) -> None:
    for _ in range(100_000):
        sock.send(message)


def test_a_client_that_never_reads_is_disconnected(server: Server) -> None:
    with server.connect() as silent, server.connect() as good:
        silent.settimeout(0.2)
        with pytest.raises(OSError, match=r"timed out|Broken pipe|reset"):
            send_many(silent, request(DEVICE))
        assert ask(good, request(HELLO)) == (0, 1)


def test_contexts_of_one_client_are_bounded(tools: Path, tmp_path: Path) -> None:
    server = Server(tools, tmp_path, "env", "FGPU_SIM_MEMORY=1024GiB")
    with server.connect() as sock:
        answers = [ask(sock, request(TAKE, kind=CONTEXT, context=i + 1))[0] for i in range(520)]
    assert answers == [0] * 512 + [3] * 8
    assert server.stop()[0] == 0


def is_turned_away(sock: socket.socket) -> bool:
    try:
        return ask(sock, request(HELLO)) == (-1, 0)
    except (BrokenPipeError, ConnectionResetError):
        return True


def test_the_number_of_connections_is_bounded(server: Server) -> None:
    """Beyond 1,024 connections a new one is refused. When others close, there is room again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    socks = [server.connect() for _ in range(1030)]
    try:
        assert ask(socks[0], request(HELLO)) == (0, 1)
        assert ask(socks[1023], request(HELLO)) == (0, 1)
        assert is_turned_away(socks[1024])
    finally:
        for sock in socks:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    eventually(lambda: server.descriptors() < 12)
    with server.connect() as sock:
        assert ask(sock, request(HELLO)) == (0, 1)


def keep_dead(server: Server) -> socket.socket:
    """Return a connection whose process has exited."""
    here, there = socket.socketpair()
    child = os.fork()
    if not child:
        sock = server.connect()
        ask(sock, request(ATTACH))
        socket.send_fds(there, [b"x"], [sock.fileno()])
        os._exit(0)
    there.close()
    (fd,) = socket.recv_fds(here, 1, 1)[1]
    here.close()
    os.waitpid(child, 0)
    return socket.socket(fileno=fd)


def test_the_number_of_connections_of_ended_processes_is_bounded(server: Server) -> None:
    """A connection uses a slot of the server until it is closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    kept = [keep_dead(server) for _ in range(1024)]
    try:
        with server.connect() as sock:
            assert is_turned_away(sock)
        assert server.process.poll() is None
    finally:
        for sock in kept:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    eventually(lambda: server.descriptors() < 12)
    eventually(lambda: used(server) == 0)
    with server.connect() as sock:
        assert ask(sock, request(HELLO)) == (0, 1)


@pytest.mark.skipif(not shutil.which("valgrind"), reason="no valgrind here")
def test_the_server_leaks_nothing(tools: Path, tmp_path: Path) -> None:
    valgrind = ["valgrind", "-q", "--leak-check=full", "--show-leak-kinds=all", "--error-exitcode=9"]
    server = Server(tools, tmp_path, *valgrind)
    for turn in range(11):
        with server.connect() as sock:
            assert ask(sock, request(ATTACH))[0] == 0
            for context in range(1, 24):
                assert ask(sock, request(TAKE, kind=CONTEXT, context=context)) == (0, 0)
            assert ask(sock, request(TAKE, kind=BLOCK, context=3, size=1009, asked=1009)) == (0, 0)
            assert ask(sock, request(CLOSE, context=5)) == (0, 0)
            if turn % 2:
                ask(sock, b"rubbish")
    eventually(lambda: used(server) == 0)
    with server.connect() as sock:
        assert ask(sock, request(TAKE, kind=CONTEXT, context=1)) == (0, 0)
        code, errors = server.stop()
    assert code == 0, errors


def test_false_reports_of_managed_memory_are_refused(server: Server) -> None:
    """The server refuses more than the device has, even if sums overflow. The client leaves nothing behind."""
    mib, chunk = 1 << 20, 128 << 20
    with server.connect() as sock:
        assert ask(sock, request(RESIDENT, size=5 * mib)) == (0, 0)
        for size in (1 << 50, 2**64 - 1, 2**64 - 5 * mib, 2**63):
            assert ask(sock, request(RESIDENT, size=size)) == (1, 0)
        assert used(server) == chunk
        assert ask(sock, request(RESIDENT)) == (0, 0)
        assert used(server) == 0
        assert ask(sock, request(RESIDENT, size=200 * mib)) == (0, 0)
        assert ask(sock, request(RESIDENT, device=99, size=mib)) == (2, 0)
        assert used(server) == 2 * chunk
    eventually(lambda: used(server) == 0)
