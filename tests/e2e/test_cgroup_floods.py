"""T46: a workload makes and removes very many cgroups, and the agent still serves the others."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.folder_kit import CgroupFolder
from tests.e2e.pings import Pings
from tests.e2e.policies_kit import Write
from tests.support.commands import ask
from tests.support.commands import metrics as all_metrics
from tests.support.host import BUILD, CONTEXT, GIB, MIB, REFUSED
from tests.support.wait import eventually, waited_here, waiting_of

GROUP = "fgpu-floods"
PROCESSES, MAPPINGS = 150, 30_000
AT_ONCE, PAUSE_US = 40, 5000  # more than 8,000 events a second; the kernel reports at most 4,000 of the host
NEIGHBOURS = 8
LIMIT, ROOM = GIB, 40 * MIB
PING_SECONDS, MANAGED_SECONDS = 0.1, 2.0
USER = 65534


class Folder(CgroupFolder):
    """The folder of these tests."""

    def delegated(self, name: str) -> Path:
        """Create a cgroup of user 65534, which may create cgroups in it."""
        cgroup = self.root / name
        cgroup.mkdir()
        for path in (cgroup, cgroup / "cgroup.procs", cgroup / "cgroup.subtree_control"):
            os.chown(path, USER, USER)
        return cgroup


@pytest.fixture
def folder(unharmed: None, tmp_path: Path) -> Iterator[Folder]:
    found = Folder(tmp_path, GROUP)
    yield found
    found.close()


@contextlib.contextmanager
def ready(*command: object) -> Iterator[subprocess.Popen[str]]:
    """Start a program that prints "ready" and is killed at the end.

    It has a session of its own, as a container has: the kernel's scheduler does not count it as a part of the agent.
    """
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def crowd(tmp_path: Path) -> Iterator[None]:
    """Start processes of user 65534 with so many mappings that reading them takes long."""
    file = tmp_path / "mapped"
    file.write_bytes(bytes(3 * 4096))
    file.chmod(0o644)
    with ready(BUILD / "e2e/crowd_of_maps", PROCESSES, MAPPINGS, file):
        yield


def lost() -> float:
    return all_metrics().get(("fgpu_events_lost_total", frozenset({("reason", "rate")})), 0.0)


def is_managed(path: str) -> bool:
    return any(tenant["path"] == path for tenant in ask(verb="snapshot")["tenants"])


def serve(folder: Folder, name: str) -> float:
    """Check that a new container is managed before it has a process, and that its first program gets exactly its limit.

    Return the seconds until the container was managed, without the time in which the agent or this thread waited for a
    processor.
    """
    waiting, waited, begun = waiting_of(ask(verb="ping")["pid"]), waited_here(), time.monotonic()
    (folder.root / name).mkdir()
    eventually(lambda: is_managed(f"/{GROUP}/{name}"), 20, f"{name} is managed")
    seconds = time.monotonic() - begun - waiting() - (waited_here() - waited)
    one = folder.start(name)
    client = one.client()
    client.ok(f"alloc {ROOM}")
    assert client.ok("info")[1] == LIMIT
    assert client.do(f"alloc {LIMIT - CONTEXT - ROOM + MIB}") == REFUSED
    return seconds


@pytest.mark.timed
@pytest.mark.timeout(120)
def test_a_flood_of_cgroups_beside_many_mappings_delays_no_other_workload(
    write: Write,
    folder: Folder,
    crowd: None,
    scale: Callable[..., int],
) -> None:
    """The kernel reports a limited number of events of one workload, and the agent scans its cgroups in slices."""
    write(f"memory: {{limit: {LIMIT // GIB}GiB}}", selector=f'{{cgroup: ["{GROUP}/neighbour-*"]}}')
    (folder.root / "neighbour-live").mkdir()
    live = folder.start("neighbour-live")
    live.client().ok(f"alloc {ROOM}")
    live.assert_enforced()
    before = lost()
    with ready(BUILD / "e2e/flood", folder.delegated("flood"), AT_ONCE, PAUSE_US) as flood:
        eventually(lambda: lost() - before > 4000, 20, "lost events of the flood")
        with Pings() as pings:
            managed = [serve(folder, f"neighbour-{n}") for n in range(NEIGHBOURS)]
            time.sleep(scale(1, 3, 20))
        assert flood.poll() is None, "the flood ended during the measurement"
    print(f"managed after {max(managed):.2f} s at most; {pings}; {lost() - before:.0f} events were not reported")
    assert max(managed) < MANAGED_SECONDS
    assert pings.p99() <= PING_SECONDS
    (folder.root / "neighbour-late").mkdir()
    eventually(lambda: is_managed(f"/{GROUP}/neighbour-late"), 3, "a container that starts after the flood is managed")
