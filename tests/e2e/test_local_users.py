"""Local users outside every tenant cannot prevent the agent from serving its tenants."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ask
from tests.support.host import BUILD, CONTEXT, MIB
from tests.support.service import Service
from tests.support.wait import quiet_seconds

PROCESSES, MAPPINGS = 100, 30_000  # reading all mappings takes one processor 10 s
ROOM = 40 * MIB
# Without these processes a start takes 0.6 s and a reply 0.01 s.
START_SECONDS, PING_SECONDS = 7.0, 1.0


@pytest.fixture
def agent(service: Service, unharmed: None) -> Iterator[Service]:
    """Return the service, and start it again if a test has ended it."""
    yield service
    service.stand()


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[None]:
    """Start processes of user 65534 with so many mappings that reading them takes long."""
    file = tmp_path / "mapped"
    file.write_bytes(bytes(3 * 4096))
    file.chmod(0o644)
    command = [f"{BUILD}/e2e/crowd_of_maps", str(PROCESSES), str(MAPPINGS), file]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


@pytest.mark.timed
@pytest.mark.places("host")
def test_processes_with_many_mappings_delay_no_tenant(agent: Service, tenant, crowd: None, scale) -> None:
    """T46: the agent examines all processes of the host at its start and every half minute."""
    agent.kill_agent()
    begun = quiet_seconds()
    agent.start_agent()
    seconds = quiet_seconds() - begun
    worst, end = 0.0, time.monotonic() + scale(4, 33, 66)
    while time.monotonic() < end:
        one = tenant(CONTEXT + ROOM)
        one.assert_enforced()
        with one.growing(ROOM):
            one.client().ok(f"alloc {ROOM}")
        one.end()
        for _ in range(10):
            begun = quiet_seconds()
            ask(verb="ping")
            worst = max(worst, quiet_seconds() - begun)
            time.sleep(0.05)
    print(f"start {seconds:.1f} s, slowest reply {worst:.3f} s")
    assert worst < PING_SECONDS
    assert seconds < START_SECONDS
