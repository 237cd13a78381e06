"""Tests of one hello: which pages a process gets, and which processes are held or not answered."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.level_limits import LevelLimits
from fgpu_ebpf.linux import bpf
from fgpu_ebpf.scheduling.fair_queue import Share
from tests.gatekeeper.conftest import GIB, PATIENT, ROOT, UUIDS, Keeper
from tests.gatekeeper.hello_client import Child, connect, hello, in_cgroup, receive, request, until
from tests.support.wait import Deadline

Make = Callable[..., Path]
CLONE_NEWTIME = 0x80


def facts_of_a_hello(run: Path) -> dict[str, object]:
    reply = hello(run)
    assert reply
    control = reply.page(0)
    usage = [reply.page(2 + n, abi.UsagePage) for n in range(reply.answer.levels)]
    return {
        "answer": {n: getattr(reply.answer, n) for n in ("magic", "version", "size", "code", "levels", "devices")},
        "flags": (reply.answer.flags, control.flags, control.version),
        "fds": len(reply.fds),
        "devices": [(control.devices[n].index, bytes(control.devices[n].uuid)) for n in range(control.device_count)],
        "gates": list(control.gates),
        "boot": bytes(control.boot).hex(),
        "late_ns": time.monotonic_ns() - control.heartbeat_ns,
        "epochs": (reply.answer.epoch, control.epoch),
        "inodes": [os.fstat(fd).st_ino for fd in reply.fds[:2]],
        "cgroups": [page.cgroup for page in usage],
        "limits": [page.devices[0].limit for page in usage],
    }


def test_a_managed_process_gets_all_its_pages(keeper: Keeper, ledger: Ledger, tenant: Make) -> None:
    outer = tenant(limits={0: 4 * GIB})
    inner = tenant(outer)
    facts = in_cgroup(inner, facts_of_a_hello, keeper.run)
    fixed = {"magic": abi.MAGIC, "version": abi.LAYOUT, "size": 128}
    assert facts["answer"] == fixed | {"code": abi.Code.MANAGED, "levels": 2, "devices": 1}
    assert facts["flags"] == (1, 1, abi.LAYOUT)
    assert facts["fds"] == 4
    assert facts["devices"] == [(0, UUIDS[0])]
    assert facts["gates"] == [1] * abi.DEVICES
    assert facts["boot"] == keeper.counts()["boot"]
    assert facts["late_ns"] < 1e9
    assert facts["epochs"] == (ledger.epoch(), ledger.epoch())
    assert facts["cgroups"] == [inner.stat().st_ino, outer.stat().st_ino]
    assert facts["limits"] == [GIB, 4 * GIB]


@pytest.mark.parametrize("ahead", [86_400, -100], ids=["ahead", "behind"])
def test_the_heartbeat_of_a_page_uses_the_clock_of_its_process(keeper: Keeper, tenant: Make, ahead: int) -> None:
    """A heartbeat by another clock, in a time namespace, would open every gate or keep all of them closed."""

    def late() -> list[int]:
        reply = hello(keeper.run)
        assert reply
        control = reply.page(0)
        first, said = control.heartbeat_ns, [time.monotonic_ns() - control.heartbeat_ns]
        until(lambda: control.heartbeat_ns != first)
        return [*said, time.monotonic_ns() - control.heartbeat_ns]

    def within() -> list[int]:
        ours = time.monotonic()
        assert ctypes.CDLL(None).unshare(CLONE_NEWTIME) == 0
        Path("/proc/self/timens_offsets").write_text(f"monotonic {ahead} 5")

        def child() -> list[int]:
            assert abs(time.monotonic() - ours - ahead) < 20
            return late()

        return Child(place, child).result()

    place = tenant()
    assert all(-1e9 < ns < 1e9 for ns in in_cgroup(place, within))


def test_a_cgroup_below_a_managed_cgroup_belongs_to_that_tenant(keeper: Keeper, tenant: Make, cgroup: Make) -> None:
    outer = tenant()
    facts = in_cgroup(cgroup(cgroup(outer)), facts_of_a_hello, keeper.run)
    assert facts["cgroups"] == [outer.stat().st_ino]


def test_a_second_hello_gets_the_same_pages(keeper: Keeper, tenant: Make) -> None:
    def twice() -> tuple[object, object, object]:
        first, second = facts_of_a_hello(keeper.run), facts_of_a_hello(keeper.run)
        child = os.fork()
        if child == 0:
            other = facts_of_a_hello(keeper.run)
            os._exit(0 if other["inodes"] != first["inodes"] else 1)
        return first["inodes"], second["inodes"], os.waitpid(child, 0)[1]

    first, second, forked = in_cgroup(tenant(), twice)
    assert first == second
    assert forked == 0, "a forked child got its parent's pages"


def test_an_unmanaged_process_gets_a_control_page_and_reads_epoch_changes(
    keeper: Keeper, ledger: Ledger, unmanaged: Path
) -> None:
    def live() -> tuple[int, int, int]:
        reply = hello(keeper.run)
        assert reply
        page = reply.page(0)
        before = page.epoch
        ledger.resolve(unmanaged.stat().st_ino, managed=True)
        until(lambda: page.epoch != before, 1)
        return reply.answer.code, len(reply.fds), page.flags

    assert in_cgroup(unmanaged, live) == (abi.Code.UNMANAGED, 1, 0)
    ledger.resolve(unmanaged.stat().st_ino, managed=False)


def test_an_unmanaged_process_that_becomes_managed_gets_the_other_pages(
    keeper: Keeper, ledger: Ledger, cgroup: Make
) -> None:
    place = cgroup()
    ledger.resolve(place.stat().st_ino, managed=False)

    def live() -> list[tuple[int, int]]:
        said = []
        for managed in (False, True, False):
            if managed:
                ledger.set_limits([LevelLimits(place.stat().st_ino, {1: GIB})])
            else:
                ledger.remove([place.stat().st_ino])
            ledger.resolve(place.stat().st_ino, managed=managed)
            reply = hello(keeper.run)
            assert reply
            said.append((reply.answer.code, len(reply.fds)))
        return said

    assert in_cgroup(place, live) == [(abi.Code.UNMANAGED, 1), (abi.Code.MANAGED, 3), (abi.Code.UNMANAGED, 1)]


def test_a_page_is_never_older_than_its_answer(keeper: Keeper, ledger: Ledger, tenant: Make, unmanaged: Path) -> None:
    def live() -> list[tuple[int, int]]:
        seen = []
        for turn in range(6):
            ledger.resolve(unmanaged.stat().st_ino, managed=turn % 2 == 0)  # for another process: the epoch changes
            reply = hello(keeper.run)
            assert reply
            seen.append((reply.answer.epoch, reply.page(0).epoch))
        return seen

    seen = in_cgroup(tenant(), live)
    assert all(answered <= shown for answered, shown in seen), seen
    assert len({answered for answered, _ in seen}) == 6


def code_of_hello(run: Path) -> int:
    reply = hello(run, patience=60)
    return reply.answer.code if reply else -1


def test_undecided_processes_are_held_and_the_agent_is_notified(patient: Keeper, ledger: Ledger, cgroup: Make) -> None:
    place = cgroup()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as agent:
        agent.bind(str(patient.run / "discover.sock"))
        agent.settimeout(20)
        child = Child(place, code_of_hello, patient.run)
        assert json.loads(agent.recv(100)) == {"tgid": child.pid, "others": []}
        time.sleep(0.2)
        assert not child.has_said()
        ledger.set_limits([LevelLimits(place.stat().st_ino, {0: GIB})])
        ledger.resolve(place.stat().st_ino, managed=True)
        until(child.has_said, 0.6)  # at the next heartbeat, or at the one after it
        code = child.result()
        agent.setblocking(False)
        with pytest.raises(BlockingIOError):  # sent once, however often the gatekeeper checked the process
            agent.recv(100)
    (patient.run / "discover.sock").unlink()
    assert code == abi.Code.MANAGED


def test_a_process_of_a_managed_cgroup_waits_until_the_cgroup_s_page_exists(
    patient: Keeper, ledger: Ledger, cgroup: Make
) -> None:
    place = cgroup()
    ledger.resolve(place.stat().st_ino, managed=True)
    child = Child(place, code_of_hello, patient.run)
    time.sleep(0.4)
    assert not child.has_said()
    ledger.set_limits([LevelLimits(place.stat().st_ino, {0: GIB})])
    assert child.result() == abi.Code.MANAGED


def test_an_undecided_process_is_disconnected_without_an_answer_after_a_second(keeper: Keeper, cgroup: Make) -> None:
    def ask() -> tuple[int, float, bool]:
        began, deadline = time.monotonic(), Deadline(1.5)
        code = code_of_hello(keeper.run)
        return code, time.monotonic() - began, deadline.is_over()

    grown = keeper.grows("hello_unanswered")
    code, seconds, is_late = in_cgroup(cgroup(), ask)
    assert (code, is_late) == (-1, False)
    assert seconds > 0.9
    grown()


@pytest.mark.parametrize("name", ["libcuda.so.1", "libfgpu.so", "libcuda.so.580.1"])
def test_a_managed_process_waits_until_its_files_are_probed(
    patient: Keeper, ledger: Ledger, tenant: Make, unmanaged: Path, tmp_path: Path, name: str
) -> None:
    library = tmp_path / name
    library.write_bytes(bytes(4096))
    status = library.stat()

    def with_library() -> int:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC):
            return code_of_hello(patient.run)

    assert in_cgroup(unmanaged, with_library) == abi.Code.UNMANAGED
    held = patient.grows("hello_held")
    child = Child(tenant(), with_library)
    held()
    time.sleep(0.15)
    assert not child.has_said()
    ledger.enter_file(status.st_dev, status.st_ino)
    assert child.result() == abi.Code.MANAGED
    ledger.forget_files()


def test_hellos_wait_for_a_ledger_that_is_pinned_later(
    start: Callable[..., Keeper], pins: Path, tenant: Make, tmp_path: Path
) -> None:
    later = tmp_path / "later"
    keeper = start(pins=later, code=PATIENT)
    assert keeper.ready
    child = Child(tenant(), code_of_hello, keeper.run)
    time.sleep(0.3)
    assert not child.has_said()
    later.symlink_to(pins)
    until(child.has_said, 0.75)
    assert child.result() == abi.Code.MANAGED


def rows_seen(run: Path, names: tuple[int, ...]) -> list[tuple[int, int, int]]:
    reply = hello(run)
    assert reply
    page = reply.page(0)
    until(lambda: page.row_count >= len(names) and page.sequence % 2 == 0)
    return [(row.pid, row.device, row.bytes) for row in page.rows[: page.row_count]]


def charge(ledger: Ledger, tgid: int, levels: tuple[int, ...], device: int, bytes_: int) -> None:
    if ledger.process(tgid) is None:
        assert ledger.move(tgid, 0, levels)
    entry = ledger.process(tgid)
    assert entry
    assert ledger.overhead(tgid, entry.generation, device, bytes_, entry.changes)


def test_rows_contain_only_processes_of_the_tenant(keeper: Keeper, ledger: Ledger, tenant: Make) -> None:
    mine, other = tenant(), tenant()
    sleepers = [Child(mine, signal.pause), Child(other, signal.pause)]
    try:
        for child, place in zip(sleepers, (mine, other), strict=True):
            charge(ledger, child.pid, (place.stat().st_ino,), 0, 7 * 1009)
        charge(ledger, sleepers[0].pid, (mine.stat().st_ino,), 1, 101)
        seen = in_cgroup(mine, rows_seen, keeper.run, (1, 2))
        assert seen == [(sleepers[0].pid, 0, 7 * 1009), (sleepers[0].pid, 1, 101)]
    finally:
        for child in sleepers:
            ledger.reap(child.pid, ledger.process(child.pid).generation)  # type: ignore[union-attr]
            child.kill()


def test_rows_contain_the_pids_of_the_reader_s_namespace(keeper: Keeper, ledger: Ledger, tenant: Make) -> None:
    """A process in the reader's pid namespace is shown with its pid there. A process outside of it is not shown."""
    place = tenant()
    level = place.stat().st_ino
    libc = ctypes.CDLL(None, use_errno=True)

    def outer() -> tuple[list[tuple[int, int, int]], int, int]:
        assert libc.unshare(0x20000000) == 0  # CLONE_NEWPID: for the children
        read, write = os.pipe()
        pid_in_outer = os.fork()
        if pid_in_outer == 0:
            sleeper = os.fork()
            if sleeper == 0:
                signal.pause()
            seen = (os.getpid(), sleeper, rows_seen(keeper.run, (1, 2)))
            os.write(write, repr(seen).encode())
            os._exit(0)  # pid 1 of the namespace: its child is killed when it exits
        own = until(lambda: children(pid_in_outer))[0]
        for tgid, held in ((os.getpid(), 11), (pid_in_outer, 13), (own, 17)):
            charge(ledger, tgid, (level,), 0, held)
        one, sleeper, rows = eval(os.read(read, 4096))
        os.waitpid(pid_in_outer, 0)
        for tgid in (os.getpid(), pid_in_outer, own):
            ledger.reap(tgid, ledger.process(tgid).generation)  # type: ignore[union-attr]
        return rows, one, sleeper

    rows, one, sleeper = in_cgroup(place, outer)
    assert one == 1
    assert rows == [(1, 0, 13), (sleeper, 0, 17)]


def test_a_process_that_left_its_cgroups_and_returned_keeps_its_new_pages(
    keeper: Keeper, ledger: Ledger, tenant: Make
) -> None:
    """The process still maps the old page, which no longer limits it and makes it register again."""
    place = tenant()

    def leave_and_return() -> None:
        pid, replies = os.getpid(), list[Any]()
        replies.append(hello(keeper.run))
        entry: Any = ledger.process(pid)
        assert ledger.reap(pid, entry.generation)
        entry = ledger.enter(pid, (place.stat().st_ino,))
        replies += [hello(keeper.run), hello(keeper.run)]
        inodes = [[os.fstat(fd).st_ino for fd in reply.fds[:2]] for reply in replies]
        assert inodes[0] != inodes[1] == inodes[2]
        old, control, _ = (reply.page(0) for reply in replies)
        assert (old.gates[0], old.epoch != control.epoch, control.tag) == (abi.Gate.OPEN, True, entry.tag)

    in_cgroup(place, leave_and_return)


PROGRAMS = """
import os, sys
from pathlib import Path
from tests.gatekeeper.hello_client import hello
reply = hello(Path(sys.argv[1]))
inodes = [*sys.argv[2:], str(os.fstat(reply.fds[1]).st_ino)]
if len(inodes) < 5:
    os.execv(sys.executable, [sys.executable, "-S", "-c", sys.orig_argv[3], sys.argv[1], *inodes])
print(*inodes)
"""


@pytest.fixture
def reported_execs(pins: Path) -> Iterator[None]:
    """Let the kernel remove the entry of a process that executes another program, as under an agent."""
    program = bpf.pinned(pins / "programs" / "process_exec")
    link = bpf.attach_raw_tracepoint(program, "sched_process_exec")
    yield
    os.close(link)
    os.close(program)


@pytest.mark.usefixtures("reported_execs")
def test_each_program_that_a_process_executes_gets_a_status_page(keeper: Keeper, tenant: Make) -> None:
    """Otherwise a program that registers soon after its exec has the previous program's counts on its page."""

    def execute() -> list[str]:
        command = [sys.executable, "-S", "-c", PROGRAMS, str(keeper.run)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout.split()

    inodes = in_cgroup(tenant(), execute)
    assert len(set(inodes)) == len(inodes) == 5


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_exit_of_a_process_releases_its_descriptors_and_pages(keeper: Keeper, tenant: Make) -> None:
    places = [tenant() for _ in range(10)]
    until(lambda: keeper.count("processes") == 0)
    before = keeper.descriptors()
    for turn in range(20):
        crowd = [Child(place, lambda: bool(hello(keeper.run)) and signal.pause()) for place in places]
        if turn == 0:
            until(lambda: keeper.count("processes") == len(places), 2)
            assert keeper.descriptors() > before
        else:
            time.sleep(0.01)
        for child in crowd:
            child.kill()
    until(lambda: keeper.descriptors() <= before, 1)  # the file of counts may have been older than the last process
    until(lambda: keeper.count("processes") == 0)


def test_the_connecting_process_is_answered_and_not_the_process_that_uses_its_socket(
    keeper: Keeper, tenant: Make
) -> None:
    """T4: a process uses the socket of another process. It gets that process's pages instead of its own."""
    mine, other = tenant(), tenant()

    def hand_off() -> int:
        sock = connect(keeper.run)
        user = os.fork()
        if user == 0:
            (other / "cgroup.procs").write_text("0")
            sock.send(request())
            reply = receive(sock)
            good = reply and reply.page(2, abi.UsagePage).cgroup == mine.stat().st_ino
            os._exit(0 if good else 1)
        return os.waitpid(user, 0)[1]

    assert in_cgroup(mine, hand_off) == 0


def test_a_socket_whose_process_has_exited_gets_no_answer(keeper: Keeper, tenant: Make) -> None:
    place = tenant()

    def orphaned() -> bool:
        read, write = os.pipe()
        if os.fork() == 0:
            sock, connected = connect(keeper.run), Path(f"/proc/{os.getpid()}")
            if os.fork() == 0:
                until(lambda: not connected.exists())  # until the process that connected has been reaped
                try:
                    sock.send(request())
                    reply = receive(sock)
                except BrokenPipeError:
                    reply = None
                os.write(write, b"answered" if reply else b"nothing")
                os._exit(0)
            os._exit(0)
        os.wait()
        return os.read(read, 10) == b"nothing"

    assert in_cgroup(place, orphaned)


def test_a_share_closes_the_gate_of_a_running_process_until_the_share_is_removed(
    start: Callable[..., Keeper], ledger: Ledger, tenant: Make
) -> None:
    keeper, place = start(), tenant()

    def threads() -> int:
        return len(os.listdir(f"/proc/{keeper.process.pid}/task"))

    def watch() -> list[int]:
        reply = hello(keeper.run)
        assert reply
        page, seen = reply.page(0), []
        until(lambda: threads() == 1)  # no tenant has a share, so no thread runs for shares
        for shares in ({0: Share(limit_millionths=500_000)}, {}):
            wanted = abi.Gate.GATED if shares else abi.Gate.OPEN
            ledger.times.set_shares({place.stat().st_ino: shares})
            until(lambda wanted=wanted: page.gates[0] == wanted)
            seen.append(threads())
        return seen

    assert in_cgroup(place, watch) == [2, 2]


def test_a_refusal_leaves_the_gates_of_a_process_with_pages_closed(
    start: Callable[..., Keeper], ledger: Ledger, tenant: Make, cgroup: Make
) -> None:
    """A limit of an inner cgroup finds no room, and a process with compute time moves there."""
    keeper, place = start(), tenant()
    inner = cgroup(place)
    ledger.times.set_shares({place.stat().st_ino: {0: Share(limit_millionths=500_000)}})
    ledger.refuse(inner.stat().st_ino)

    def move() -> list[Any]:
        first = hello(keeper.run)
        assert first
        page = first.page(0)
        before = page.gates[0] & abi.Gate.GATED
        (inner / "cgroup.procs").write_text(str(os.getpid()))
        again = hello(keeper.run)
        assert again
        beat = page.heartbeat_ns
        until(lambda: page.heartbeat_ns > beat)
        return [before, again.answer.code, page.gates[0] & abi.Gate.GATED]

    gated = int(abi.Gate.GATED)
    assert in_cgroup(place, move) == [gated, int(abi.Code.REFUSED), gated]
