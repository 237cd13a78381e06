"""F17: nothing important blocks on an unread log or a full disk, and a change that cannot be saved is refused."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import world
from tests.support.commands import fgpu, metrics_page
from tests.support.host import CONTEXT, GIB, MIB, RUN_DIR, fill
from tests.support.service import Service
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

LIMIT = 3 * CONTEXT + 40 * MIB
STEP = 2 * MIB
QUICK_SECONDS = 20.0  # for actions that take a hundredth of that; a program that waits for a reader waits for ever


def brimful() -> tuple[int, int]:
    """Return both ends of a pipe that is full, so that writers block."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    return reader, writer


@pytest.fixture
def dead(service: Service, unharmed: None) -> Iterator[Service]:
    """Return the service without agent and gatekeeper. Restart both afterwards."""
    service.kill_agent()
    service.kill_gatekeeper()
    yield service
    if service.agent is not None and service.agent.poll() is None:
        service.kill_agent()
    for pid in service.gatekeepers():
        os.kill(pid, 9)
    eventually(lambda: not service.gatekeepers(), 5, "the gatekeeper's end")
    service.start_agent()


def timed(what: str, longest: float, begun: float) -> float:
    """Return the longest time of this action so far, in seconds."""
    took = time.monotonic() - begun
    assert took < QUICK_SECONDS, f"{what} took {took:.2f} s"
    return max(longest, took)


def busy(one: Tenant, command: str) -> Client:
    """Start a program that repeats a request until it receives a line."""
    client = one.client()
    client.ok("context")
    client.send(command)
    return client


def answered(client: Client) -> list[int]:
    """Stop the client. Return how often its request was granted, was refused, and had another result."""
    client.send("context")
    numbers = client.numbers(client.receive())
    assert client.receive() == "ok"
    return numbers


def live_for(seconds: float, tenants: list[Tenant]) -> dict[str, float]:
    """Run all actions of a host for this long, each within QUICK_SECONDS. Return the longest time of each action."""
    longest = {"set": 0.0, "start": 0.0, "scrape": 0.0}
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number += 1
        begun = time.monotonic()
        fgpu("set", tenants[0].path, "--memory", f"{LIMIT + number % 2 * STEP}B")
        longest["set"] = timed("fgpu set", longest["set"], begun)
        begun = time.monotonic()
        client = tenants[0].client()
        client.ok(f"alloc {STEP}")
        longest["start"] = timed("a program's start", longest["start"], begun)
        client.close()
        eventually(lambda gone=client: gone.pid not in tenants[0].pids(), 5, "the exit of the program")  # type: ignore[misc]
        begun = time.monotonic()
        assert "fgpu_memory_used_bytes" in metrics_page()
        longest["scrape"] = timed("a scrape", longest["scrape"], begun)
    return longest


@pytest.mark.slow
@pytest.mark.places("host")
def test_no_request_waits_for_a_log_without_a_reader(dead: Service, tenant, scale) -> None:
    reader, writer = brimful()
    try:
        dead.start_agent(writer)
        tenants = [tenant(LIMIT), tenant(LIMIT)]
        for one in tenants:
            one.assert_enforced()
        fits, hopeless = busy(tenants[0], f"ask {STEP} 0"), busy(tenants[1], f"ask {GIB * 8} 0")
        print(live_for(scale(2, 20, 60), tenants))
        got, *others = answered(fits)
        assert got
        assert others == [0, 0], "a request that fits was not admitted"
        none, refused, other = answered(hopeless)
        assert (none, other) == (0, 0)
        assert refused
        assert [one.assert_exact() for one in tenants] == [CONTEXT, CONTEXT]
        assert set(os.read(reader, 4096)) == set(b"."), "the agent has written into the full pipe"
        os.set_blocking(reader, False)
        fgpu("set", tenants[1].path, "--memory", f"{LIMIT + 7 * STEP}B")  # the first tenant's lines are dropped by now

        def told() -> bytes:
            with contextlib.suppress(BlockingIOError):
                return os.read(reader, 4096)
            return b""

        eventually(lambda: b"lines were dropped: the reader of this log was too slow" in told(), 5, "the report")
    finally:
        os.close(reader)
        os.close(writer)


@pytest.fixture
def full(dead: Service) -> Iterator[Path]:
    """Yield the path of a file on the file system of /run/fgpu, which has little space left."""
    if not os.path.ismount(RUN_DIR):
        pytest.skip(f"{RUN_DIR} is no file system of its own: ./dev test gives it one")
    state = os.statvfs(RUN_DIR)
    page = state.f_frsize
    used = (state.f_blocks - state.f_bfree) * page
    filler = RUN_DIR / "filler"
    remount = ["mount", "-o", f"remount,size={used + 8 * page}", RUN_DIR]
    subprocess.run(remount, check=True)
    try:
        yield filler
    finally:
        filler.unlink(missing_ok=True)
        subprocess.run(["mount", "-o", f"remount,{world.SIZE}", RUN_DIR], check=True)


@pytest.mark.slow
@pytest.mark.places("host")
def test_a_full_disk_stops_no_tenant_and_a_change_that_cannot_be_saved_is_refused(
    dead: Service, full: Path, tenant
) -> None:
    dead.start_agent()
    one = tenant(LIMIT)
    one.assert_enforced()
    fits = busy(one, f"ask {STEP} 0")
    fill(full)
    done = fgpu("set", one.path, "--memory", f"{2 * LIMIT}B", check=False)
    assert (done.returncode, "No space left" in done.stderr) == (1, True), done
    assert one.memory()["limit_bytes"] == LIMIT, "a limit that was not saved is in force"
    done = fgpu("run", "--name", f"e2e-full-{os.getpid()}", "--memory", "1GiB", "--", "true", check=False)
    assert (done.returncode, "No space left" in done.stderr) == (125, True), done
    assert not (one.cgroup.parent / f"e2e-full-{os.getpid()}").exists()
    dead.kill_agent()
    dead.kill_gatekeeper()
    dead.start_agent()
    one.assert_enforced()
    assert one.memory()["limit_bytes"] == LIMIT
    client = one.client()
    with open(full, "rb"):
        client.ok(f"alloc {STEP}")
    client.close()
    eventually(lambda: client.pid not in one.pids(), 20, "the exit of the program")
    got, *others = answered(fits)
    assert got
    assert others == [0, 0]
    assert one.assert_exact() == CONTEXT
    full.unlink()
    fgpu("set", one.path, "--memory", f"{2 * LIMIT}B")
    assert one.memory()["limit_bytes"] == 2 * LIMIT
