"""Many simultaneous hellos: all are answered at the first attempt, others do not wait, and tenants take turns."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.gatekeeper import connections
from fgpu_ebpf.gatekeeper.connections import Connection, Connections
from fgpu_ebpf.gatekeeper.ledger_cache import Lineages, ManagedState
from fgpu_ebpf.gatekeeper.mapping_scanner import MappingScanner
from fgpu_ebpf.linux import breakpoints, procfs
from fgpu_ebpf.linux.worker_threads import MOST_WANTED
from tests.gatekeeper.conftest import PATIENT, Keeper
from tests.gatekeeper.hello_client import Child, hello, in_cgroup, request, until
from tests.gatekeeper.storm import STORM
from tests.gatekeeper.waits_kit import prompt, waits
from tests.support.wait import Deadline, running_of

pytestmark = pytest.mark.timed

Make = Callable[..., Path]
SLOW = """
import sys, time
from fgpu_ebpf.gatekeeper import sessions as clients, main as gatekeeper
real = clients.ControlMemory
def slow():
    end = time.thread_time() + 0.005
    while time.thread_time() < end:
        pass
    return real()
clients.ControlMemory = slow
sys.exit(gatekeeper.main())
"""

CLONE_NEWNET, CROWD = 0x40000000, 150
SHIM_SECONDS = 2.0  # for which a shim waits for its answer


class Storm:
    """The 300 processes of one cgroup that send a hello at the same time (storm.py). They have started to send."""

    def __init__(self, run: Path, cgroup: Path, niceness: int = 0, patience: float = SHIM_SECONDS) -> None:
        enter = f'echo $$ >"$0/cgroup.procs" && exec nice -n {niceness} "$@"'
        program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("storm.py"))]
        asked = [str(run / "shim/shim.sock"), request().hex(), str(ctypes.sizeof(abi.Answer)), str(patience)]
        command = ["sh", "-c", enter, str(cgroup), *program, *asked]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        assert self._process.stdout.readline() == "started\n"

    def met(self) -> list[tuple[float, int, int]]:
        """Return for each process: seconds until its answer, or -1; attempts; attempts without a processor to send."""
        said, _ = self._process.communicate(timeout=120)
        assert self._process.returncode == 0
        return [(seconds, attempts, mute) for seconds, attempts, mute in json.loads(said)]


def test_a_storm_of_300_hellos_of_one_tenant_is_answered_at_the_first_attempt(
    start: Callable[..., Keeper], tenant: Make
) -> None:
    """Shims wait for 2 s. The gatekeeper may not need more processor time than that for all answers."""
    keeper = start(code=PATIENT)
    running = running_of(keeper.process.pid)
    met = Storm(keeper.run, tenant(), patience=50).met()
    needed = running()
    print(f"{needed:.2f} s of a processor; the last answer after {max(met)[0]:.2f} s")
    assert len([seconds for seconds, *_ in met if seconds >= 0]) == STORM
    assert needed < SHIM_SECONDS
    until(lambda: keeper.count("hello_managed") == STORM)
    assert [keeper.count(name) for name in ("dropped_total", "hello_unanswered")] == [0, 0]
    assert keeper.count("dropped_tenant") <= sum(mute for *_, mute in met)
    assert [attempts for _, attempts, mute in met if attempts > 1 + mute] == []


def test_a_storm_of_one_tenant_does_not_delay_another_tenant(start: Callable[..., Keeper], tenant: Make) -> None:
    """Each hello is delayed, so that the storm lasts for more than a second."""
    keeper = start(code=SLOW)

    crowd = Storm(keeper.run, tenant(), niceness=5)  # the test measures the queue, not the lack of processors
    assert prompt(in_cgroup(tenant(), waits, keeper, 10))
    assert len(crowd.met()) == STORM


@contextlib.contextmanager
def listening(keeper: Keeper, agent: socket.socket) -> Iterator[socket.socket]:
    """Open a socket at the path at which the agent listens."""
    place = keeper.run / "discover.sock"
    with agent:
        agent.bind(str(place))
        try:
            yield agent
        finally:
            place.unlink()


def test_the_agent_receives_one_process_of_an_undecided_storm_at_a_time(keeper: Keeper, cgroup: Make) -> None:
    """A message about a tenant is sent 50 ms after the previous one, or at a heartbeat, which is every 250 ms."""

    def crowd() -> int:
        for _ in range(CROWD):
            if os.fork() == 0:
                hello(keeper.run)
                os._exit(0)
        return sum(os.wait()[1] == 0 for _ in range(CROWD))

    held, told = keeper.grows("hello_held", CROWD), []
    with listening(keeper, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as agent:
        agent.settimeout(20)
        begun = time.monotonic()
        child = Child(cgroup(), crowd)
        told += [told_of(agent) for _ in range(4)]
        assert child.result() == CROWD
        agent.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while len(told) < CROWD:
                told.append(told_of(agent))
        assert len(told) < 2 + (time.monotonic() - begun) * (1 / 0.05 + 1 / 0.25)
    held()
    assert {len(pids) for pids in told} == {1}
    assert len({pid for pids in told for pid in pids}) == len(told)


def told_of(agent: socket.socket) -> list[int]:
    """Return the processes that the gatekeeper's next message contains."""
    said = json.loads(agent.recv(4096))
    return [said["tgid"], *said["others"]]


def socket_of_few_messages() -> tuple[socket.socket, int]:
    """Return a socket, and how many messages it queues without a reader: 11, the default of a network namespace.

    The host may queue many more. The namespace is that of a thread.
    """

    def make() -> tuple[socket.socket, int]:
        assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) == 0
        most = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
        return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), most + 1

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def test_an_agent_that_reads_late_receives_all_processes_in_fewer_messages(
    start: Callable[..., Keeper], cgroup: Make
) -> None:
    """The kernel queues few messages for a socket without a reader.

    No process closes its connection during the test, because such a process would not be reported afterwards.
    """
    keeper, patience = start(code=PATIENT), 20.0
    agent, room = socket_of_few_messages()
    failed, held = keeper.grows("discover_failed", 1, patience), keeper.grows("hello_held", room + 20, patience)
    with listening(keeper, agent):
        agent.settimeout(patience)
        children = [Child(cgroup(), hello, keeper.run, None, patience) for _ in range(room + 20)]
        held()
        failed()
        told = [told_of(agent)]
        while sum(map(len, told)) < len(children):
            told.append(told_of(agent))
        assert sorted(pid for some in told for pid in some) == sorted(child.pid for child in children)
        assert len(told) < len(children)
        for child in children:
            child.kill()


# -- the fair order by itself


class Peers:
    """Connections at a real socket. This process acts as all tenants, in the order of `tenants`."""

    def __init__(self, folder: Path, tenants: list[int]) -> None:
        self.tenants = tenants
        self.looked: list[int] = []
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.listener.bind(str(folder / "sock"))
        self.listener.listen(64)
        self.counts: Counter[str] = Counter()
        self.callers = Connections(selectors.DefaultSelector(), self.counts, self._stand, self._look, lambda _: 0)
        self.socks = [self._say_hello(folder) for _ in tenants]
        self.callers.accept(self.listener)

    def _say_hello(self, folder: Path) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(folder / "sock"))
        sock.send(request())
        return sock

    def _stand(self, pid: int, cgroup: int) -> tuple[int, ManagedState]:
        assert (pid, cgroup > 0) == (os.getpid(), True)
        return 1, ManagedState(True, self.tenants[len(self.callers)])

    def _look(self, caller: Connection) -> None:
        self.looked.append(caller.tenant)

    def close(self) -> None:
        for sock in (*self.socks, self.listener):
            sock.close()


@pytest.fixture
def peers(tmp_path: Path) -> Iterator[Callable[[list[int]], Peers]]:
    made: list[Peers] = []

    def make(tenants: list[int]) -> Peers:
        made.append(Peers(tmp_path, tenants))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_hellos_are_served_in_turns_by_tenant(
    peers: Callable[[list[int]], Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "TURN_NS", 1_000_000_000)
    some = peers([7, 7, 7, 7, 8, 9, 9])
    some.callers.serve()
    assert some.looked == [7, 8, 9, 7, 9, 7, 7]
    assert not some.callers.pending()
    some.callers.turn()
    assert some.callers.pending()


def test_a_tenant_without_time_is_skipped_unless_the_process_is_new(
    peers: Callable[[list[int]], Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "TURN_NS", 1_000_000_000)
    some = peers([7, 7, 8])  # the first is new, and all that follow are the same process
    some.callers.charge(7, 2 * connections.WAIT_NS)
    some.callers.serve()
    assert some.looked == [7, 8]
    some.callers.charge(7, connections.STORM_NS)
    some.callers.turn()
    some.callers.serve()
    assert some.looked == [7, 8, 8]


# -- the readers by themselves


def wanting(tenant: int, number: int) -> list[Any]:
    return [SimpleNamespace(tenant=tenant, pid=pid, here=True) for pid in range(number)]


def test_readers_that_block_delay_only_their_own_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, rung = threading.Event(), threading.Event()

    def files(pid: int, _: object) -> dict[tuple[int, int], int]:
        if pid == 0:
            let_go.wait(60)
        return {(pid, pid): 23}

    def found(number: int) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        deadline = Deadline(3)
        while len(seen) < number and not deadline.is_over():
            readers.go()
            rung.wait(0.002)
            rung.clear()
            for caller, _ in readers.take():
                assert (caller.files, caller.reading) == ({(caller.pid, caller.pid): 23}, False)
                seen.append((caller.tenant, caller.pid))
        return sorted(seen)

    monkeypatch.setattr(breakpoints, "of_process", files)
    readers = MappingScanner(rung.set)
    for tenant in range(20):
        for caller in wanting(tenant, 3):
            readers.want(caller)
    for caller in wanting(20, 40)[1:]:
        readers.want(caller)
    assert found(39) == [(20, pid) for pid in range(1, 40)]
    let_go.set()
    assert len(found(60)) == 60
    until(lambda: readers.take() == [] and readers.due_ns() is None)


def test_the_queue_of_a_tenant_whose_reads_block_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    readers = MappingScanner(lambda: None)
    for caller in wanting(7, 10 * MOST_WANTED):
        readers.want(caller)
        assert caller.reading
        caller.here = False
    staying = wanting(8, 2 * MOST_WANTED)
    for caller in staying:
        readers.want(caller)
    assert not staying[-1].reading, "the connection is queued again only at its next turn"
    assert max(map(len, readers._workers._wanted.values())) <= MOST_WANTED


def test_the_outer_cgroups_of_a_cgroup_are_read_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []

    def cgroups(pid: int, root: Path) -> list[int]:
        asked.append(pid)
        return [pid // 10, 1]

    monkeypatch.setattr(procfs, "cgroups", cgroups)
    lineages = Lineages(tmp_path)
    assert [lineages.of(pid, 7) for pid in (71, 72)] == [(7, 1)] * 2
    assert [lineages.of(pid, 8) for pid in (91, 92)] == [(9, 1)] * 2, "the lineage of a moved process was kept"
    assert asked == [71, 91, 92]
    lineages.forget()
    assert lineages.of(73, 7) == (7, 1)
    assert asked == [71, 91, 92, 73]
