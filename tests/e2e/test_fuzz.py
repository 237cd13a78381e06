"""Ten thousand unexpected messages to the sockets of a real agent and a real gatekeeper.

The inputs are those of tests/fuzz, which tests the sockets' code in more detail. With any input, both processes
continue, a tenant's program gets its answers as before, and neither process grows by more than a mebibyte.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable

import pytest

from tests.fuzz import corpora
from tests.support.commands import ask
from tests.support.host import CONTEXT, MIB
from tests.support.service import Service
from tests.support.wait import eventually

COUNTS = 1_000, 10_000, 100_000
ENDS_IT = b"detach", b"reload", b"run", b"put", b"share"  # the agent would execute these verbs; not tested here


def grown(pid: int, send: Callable[[bytes], None], mutator: corpora.Mutator, runs: int) -> int:
    """Return the growth in bytes after the first fifth of the messages."""
    for _ in range(runs // corpora.WARM_PART):
        send(mutator())
    before = corpora.resident_bytes(pid)
    for _ in range(runs - runs // corpora.WARM_PART):
        send(mutator())
    return corpora.resident_bytes(pid) - before


def say(data: bytes) -> None:
    """Send one message to the gatekeeper, and ignore its answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        with contextlib.suppress(OSError):
            sock.connect("/run/fgpu/shim/shim.sock")
            sock.send(data[1:])


def request(data: bytes) -> None:
    """Send one message to the agent, as root. The answer must be JSON with `ok` or an error that is not internal."""
    if any(word in data for word in ENDS_IT):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        sock.connect("/run/fgpu/control.sock")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data[1:])
            sock.shutdown(socket.SHUT_WR)
        said = b"".join(iter(lambda: sock.recv(1 << 20), b""))
    answer = json.loads(said)
    assert ("ok" in answer) != ("error" in answer)
    assert "internal error" not in str(answer.get("error")), (data, answer)


@pytest.mark.places("host")
@pytest.mark.slow
def test_agent_and_gatekeeper_continue_after_thousands_of_mutated_messages(service: Service, tenant, scale) -> None:
    one = tenant(CONTEXT + 40 * MIB)
    client = one.client()
    client.ok("context")
    assert service.agent is not None
    (keeper,), runs = service.gatekeepers(), scale(*COUNTS)
    hellos = corpora.Mutator(23, corpora.corpus("hello"))
    lines = corpora.Mutator(101, corpora.corpus("control"))
    assert grown(keeper, say, hellos, runs) <= corpora.MIB
    assert grown(service.agent.pid, request, lines, runs) <= corpora.MIB
    service.check()
    assert service.gatekeepers() == {keeper}
    assert ask(verb="snapshot")["failures"] == 0
    eventually(lambda: len(os.listdir(f"/proc/{keeper}/fd")) < 60, 10, "the gatekeeper's descriptors")
    with one.growing(20 * MIB):
        client.ok(f"alloc {20 * MIB}")
