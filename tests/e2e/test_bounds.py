"""T41 to T43: workloads with very many cgroups, processes and hellos do not reduce what their neighbours have."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.folder_kit import CgroupFolder
from tests.e2e.policies_kit import Write
from tests.support.commands import ask, fgpu, metrics
from tests.support.host import BUILD, CONTEXT, GIB, MIB, REFUSED, SHIM
from tests.support.wait import eventually

GROUP = "fgpu-bounds"
LEVELS = 512  # of one workload, by default
IS_SPARSE = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 1)  # otherwise the map of allocations is smaller
ALLOCATIONS, SMALL = (262_144, 70_000) if IS_SPARSE else (65_536, 60_000)
NAMES = f'{{cgroup: ["{GROUP}/greedy/**", "{GROUP}/greedy", "{GROUP}/modest"]}}'


class Folder(CgroupFolder):
    """The folder of these tests."""

    def make(self, number: int) -> None:
        """Make this many cgroups of one workload: greedy/0, greedy/1, …"""
        for n in range(number):
            (self.root / f"greedy/{n}").mkdir(parents=True)


@pytest.fixture
def folder(unharmed: None, tmp_path: Path) -> Iterator[Folder]:
    found = Folder(tmp_path, GROUP)
    yield found
    found.close()


def levels_of_greedy() -> set[str]:
    """Return the names below greedy of the cgroups that have a page; "" is greedy itself."""
    paths = [t["path"] for t in ask(verb="snapshot")["tenants"] if t["path"].startswith(f"/{GROUP}/greedy")]
    return {path.removeprefix(f"/{GROUP}/greedy").lstrip("/") for path in paths}


def table(name: str) -> float:
    return metrics()["fgpu_map_entries", frozenset({("map", name)})]


@pytest.mark.timeout(180)
def test_many_cgroups_of_a_workload_leave_the_neighbour_its_limit(
    write: Write,
    folder: Folder,
) -> None:
    """Cgroups of one workload beyond its bound get no memory, and other workloads keep their limits."""
    write("memory: {limit: 1GiB}", selector=NAMES)
    eventually(lambda: table("levels") == 0, 10, "no level of an earlier test")
    folder.make(4200)
    eventually(lambda: table("levels") >= LEVELS, 30, "the largest number of levels of a workload")
    time.sleep(1)
    assert table("levels") == LEVELS
    modest = folder.start("modest").client()
    assert modest.ok("info")[1] == GIB
    assert modest.do(f"alloc {GIB}") == REFUSED
    beyond = folder.start("greedy/4199").client()
    assert beyond.do(f"alloc {MIB}") == REFUSED
    inside = folder.start("greedy/4198/more").client()
    assert inside.do(f"alloc {MIB}") == REFUSED
    for said in (fgpu("explain", f"/{GROUP}/greedy/4199").stdout, fgpu("events").stdout):
        assert re.search(rf"/{GROUP}/greedy \(.*has {LEVELS} of {LEVELS} levels .*bounds.levels in agent.yaml", said)


@pytest.mark.timeout(180)
def test_a_refused_cgroup_gets_its_limit_after_other_cgroups_of_its_workload_are_removed(
    write: Write,
    folder: Folder,
) -> None:
    write("memory: {limit: 1GiB}", selector=NAMES)
    folder.make(LEVELS + 10)
    eventually(lambda: len(levels_of_greedy()) == LEVELS, 30, "the largest number of levels of a workload")
    served = levels_of_greedy() - {""}  # not always the oldest: if events are lost, the agent scans in its own order
    refused = next(name for n in range(LEVELS + 10) if (name := str(n)) not in served)
    client = folder.start(f"greedy/{refused}").client()
    assert client.do(f"alloc {MIB}") == REFUSED
    for name in sorted(served)[:20]:
        (folder.root / "greedy" / name).rmdir()
    eventually(lambda: client.do(f"alloc {MIB}").startswith("ok"), 20, "the limit of the refused cgroup")
    assert client.ok("info")[1] == GIB


def test_processes_of_four_cgroups_leave_the_neighbour_an_entry(
    write: Write,
    folder: Folder,
    crowd: Callable[[Path, int], int],
) -> None:
    """The processes of all cgroups of a workload share one bound, even if each cgroup is below a level's bound."""
    write("memory: {limit: 1GiB}", selector=NAMES)
    folder.make(4)
    # The workload of an earlier test had the same path. After its flood of events, scans of its cgroups are rare.
    eventually(lambda: levels_of_greedy() == {"", "0", "1", "2", "3"}, 60, "the levels of the workload")
    for n in range(4):
        crowd(folder.root / f"greedy/{n}", 2000)
    modest = folder.start("modest").client()
    # While the agent reads of the crowd, a registration may last longer than the 2 s for which one call waits.
    eventually(lambda: modest.do("info") == f"ok {GIB - CONTEXT} {GIB}", 20, "the registration")
    modest.ok(f"alloc {MIB}")
    late = folder.start("greedy/3").client()
    assert late.do(f"alloc {MIB}") == REFUSED
    words = rf"/{GROUP}/greedy \(.*has 4096 of 4096 processes .*bounds.processes in agent.yaml"
    assert re.search(words, fgpu("explain", f"/{GROUP}/greedy/3").stdout)


def test_at_least_60000_small_allocations_within_the_limit_succeed(write: Write, folder: Folder) -> None:
    write("memory: {limit: 2GiB}", selector=NAMES)
    assert folder.start("modest").client().ok(f"fill 4096 0 {SMALL}") == [SMALL]


@pytest.mark.timeout(180)
def test_explain_and_the_program_report_a_refusal_for_too_many_allocations(write: Write, folder: Folder) -> None:
    write("memory: {limit: 2GiB}", selector=NAMES)
    greedy = folder.start("greedy").client()
    assert ALLOCATIONS - 8 <= greedy.ok("fill 4096 0", 120)[0] < ALLOCATIONS, "the bound less a context's entry"
    assert greedy.do(f"alloc {MIB}") == REFUSED
    assert greedy.complaints() == "fgpu: device memory is refused: too many allocations, threads or processes\n"
    said = fgpu("explain", f"/{GROUP}/greedy").stdout
    assert re.search(rf"has {ALLOCATIONS} of {ALLOCATIONS} allocations .*bounds.allocations in agent.yaml", said)
    assert ", refused 2 times (2 because of too many allocations, threads or processes)" in said
    folder.start("modest").client().ok(f"alloc {MIB}")


@pytest.fixture
def crowd() -> Iterator[Callable[[Path, int], int]]:
    """Return crowd(cgroup, number).

    It starts processes that only make the shim's request, and kills them after the test.
    """
    made: list[tuple[subprocess.Popen[str], Path]] = []

    def make(cgroup: Path, number: int) -> int:
        process = subprocess.Popen([BUILD / "e2e/throng", SHIM, cgroup, str(number)], stdout=subprocess.PIPE, text=True)
        made.append((process, cgroup))
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return process.pid

    yield make
    for process, cgroup in made:
        (cgroup / "cgroup.kill").write_text("1")
        eventually(lambda process=process: process.poll() is not None, 30, "the exit of the crowd")  # type: ignore[misc]
    for _, cgroup in made:
        eventually(lambda cgroup=cgroup: not (cgroup / "cgroup.procs").read_text(), 30, "the exit of the crowd")  # type: ignore[misc]


# -- a workload without a limit


STRANGER = """
import os, socket, struct, sys, time
folder, number = sys.argv[1], int(sys.argv[2])
hello = struct.pack("<IHH56x", 0x75706766, 3, 64)
codes = []
def answer():
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(5)
        try:
            sock.connect("/run/fgpu/shim/shim.sock")
            sock.send(hello)
            return sock.recv(4096)
        except OSError:
            return b""
for n in range(number):
    os.mkdir(f"{folder}/{n}")
    with open(f"{folder}/{n}/cgroup.procs", "w") as file:
        file.write("0")
    while not (said := answer()):  # its user has used its processor time up: a shim sends its hello again, too
        time.sleep(0.02)
    codes.append(struct.unpack_from("<IHHI", said)[3])
print(*sorted(set(codes)), flush=True)
"""
UNMANAGED = 1024  # cgroups without a limit, of one workload, that the map `resolved` keeps by default


@pytest.mark.timeout(180)
def test_requests_from_many_cgroups_without_a_limit_do_not_fill_the_table(
    write: Write,
    folder: Folder,
) -> None:
    """The oldest cgroups of one user are forgotten, so the table keeps room for cgroups with limits."""
    write("memory: {limit: 1GiB}", selector=NAMES)
    number = UNMANAGED + 300
    stranger = folder.root / "stranger"
    stranger.mkdir()
    os.chown(stranger, 65534, 65534)
    before = table("resolved")
    done = subprocess.run(
        ["python3", "-c", STRANGER, stranger, str(number)], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.stdout.split() == ["2"], done.stdout + done.stderr  # each request is answered as unmanaged
    assert UNMANAGED <= table("resolved") <= before + UNMANAGED + 8  # some earlier entries may have been removed since
    modest = folder.start("modest").client()
    assert modest.ok("info")[1] == GIB
    modest.ok(f"alloc {MIB}")
