"""The gatekeeper's slots for processes: unmanaged processes use none, and no tenant uses those of its neighbours."""

from __future__ import annotations

import selectors
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.gatekeeper.sessions import FEW_PROCESSES, PROCESSES_PER_OWNER, PageHeader, Session, Sessions
from fgpu_ebpf.ledger.ledger import Ledger
from tests.gatekeeper.conftest import Keeper
from tests.gatekeeper.hello_client import hello, in_cgroup, request, until

Make = Callable[..., Path]
CGROUPS = 8


class Crowd:
    """Registered processes of a cgroup, which continue to run."""

    def __init__(self, program: Path, run: Path, cgroup: Path, number: int = PROCESSES_PER_OWNER) -> None:
        enter = 'echo $$ >"$0/cgroup.procs" && exec "$@"'
        asked = [program, run / "shim/shim.sock", request().hex(), str(number)]
        command = ["sh", "-c", enter, cgroup, *asked]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def answered(self) -> int:
        assert self._process.stdout
        return int(self._process.stdout.readline())

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        assert self._process.wait(60) == 0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("crowd") / "crowd"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", built, Path(__file__).with_name("crowd.c")], check=True)
    return built


@pytest.fixture
def crowd(program: Path) -> Iterator[Callable[..., Crowd]]:
    made: list[Crowd] = []

    def make(run: Path, cgroup: Path, number: int = PROCESSES_PER_OWNER) -> Crowd:
        made.append(Crowd(program, run, cgroup, number))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.mark.timed
def test_many_unmanaged_processes_use_no_slot_of_a_tenant(
    start: Callable[..., Keeper], ledger: Ledger, cgroup: Make, tenant: Make, crowd: Callable[..., Crowd]
) -> None:
    keeper, places = start(), [cgroup() for _ in range(CGROUPS)]
    for place in places:
        ledger.resolve(place.stat().st_ino, managed=False)
    before = keeper.descriptors()
    for place in places:
        assert crowd(keeper.run, place).answered() == PROCESSES_PER_OWNER
    until(lambda: keeper.count("hello_unmanaged") == CGROUPS * PROCESSES_PER_OWNER)
    for _ in range(4):
        reply = in_cgroup(tenant(), lambda: (found := hello(keeper.run)) and found.answer.code)
        assert reply == abi.Code.MANAGED
    assert [keeper.count(name) for name in ("dropped_process", "dropped_total")] == [0, 0]
    assert keeper.descriptors() - before < 100, "pages or pidfds of these processes are kept"


def test_half_of_the_slots_are_reserved_for_tenants_with_few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    clients, most = Sessions(selectors.DefaultSelector(), bytes(16)), 4 * FEW_PROCESSES
    monkeypatch.setattr(clients, "_most", most)
    made: list[Session] = []

    def take(tenant: int) -> bool:
        pid = len(made) + 1
        if not clients._has_place(tenant):
            return False
        made.append(Session(pid, -1, tenant, tenant, 0, PageHeader(1), clients._control(PageHeader(1))))
        clients._sessions[pid] = made[-1]
        clients._members[tenant] += 1
        return True

    assert sum(take(7) for _ in range(most)) == most // 2
    assert sum(take(8) for _ in range(most)) == FEW_PROCESSES
    assert sum(take(9) for _ in range(most)) == FEW_PROCESSES
    assert not take(10)
    for client in made:
        client.control.close()


@pytest.mark.timed
def test_an_unmanaged_process_gets_the_heartbeat_and_uses_no_slot(
    start: Callable[..., Keeper], unmanaged: Path
) -> None:
    keeper = start()

    def watch() -> bool:
        reply = hello(keeper.run)
        assert reply
        page = reply.page(0)
        for _ in range(3):
            beat = page.heartbeat_ns
            until(lambda beat=beat: page.heartbeat_ns != beat, 1)
        return True

    assert in_cgroup(unmanaged, watch)
    assert keeper.count("processes") == 0
