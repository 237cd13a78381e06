"""The gatekeeper's parts by themselves: parsing of /proc, decisions from the ledger's entries, selection of rows."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.driver.cuda_mappings import fgpu_mappings
from fgpu_ebpf.gatekeeper import sessions
from fgpu_ebpf.gatekeeper.connections import well_formed
from fgpu_ebpf.gatekeeper.ledger_cache import ManagedState, managed_state
from fgpu_ebpf.gatekeeper.memfd_pages import ControlMemory, StatusMemory
from fgpu_ebpf.gatekeeper.process_gates import ProcessGates, observe_processes
from fgpu_ebpf.gatekeeper.sessions import PageHeader, Session, Sessions, by_tenant
from fgpu_ebpf.ledger.ledger import Ledger, LedgerMissing
from fgpu_ebpf.linux import bpf, breakpoints, mapped_files, procfs, procmaps
from fgpu_ebpf.linux.breakpoints import UNCHECKED, of_process
from fgpu_ebpf.linux.procfs import cgroup_ids, cgroup_path, cgroups, pid_names
from tests.gatekeeper.hello_client import until


def ledger_that_says(in_force: tuple[int, ...] = (), **words: bool) -> Any:
    said = {int(cgroup[1:]): managed for cgroup, managed in words.items()}
    return SimpleNamespace(resolved=said.get, page_missing=lambda cgroup: cgroup not in in_force)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, ManagedState(None, 4)),
        ({"c4": False}, ManagedState(False, 4)),
        ({"c3": False}, ManagedState(None, 4)),  # a new cgroup in it may belong to a tenant
        ({"c4": True}, ManagedState(True, 4, (4,))),
        ({"c4": False, "c2": True}, ManagedState(True, 2, (2,))),
        ({"c2": True, "c3": True, "c1": False}, ManagedState(True, 3, (3, 2))),
        ({"c1": True, "c2": True, "c3": True, "c4": True, "c5": True}, ManagedState(True, 4, (4, 3, 2, 1))),
    ],
)
def test_the_managed_state_follows_from_the_decisions_of_all_cgroups(
    words: dict[str, bool], expected: ManagedState
) -> None:
    ids = [5, 4, 3, 2, 1] if "c5" in words else [4, 3, 2, 1]
    assert managed_state(ledger_that_says(**words), ids) == expected


@pytest.mark.parametrize("words", [{}, {"c2": True}, {"c2": False}])
def test_an_unused_limit_in_force_is_undecided(words: dict[str, bool]) -> None:
    for page in (4, 3):
        assert managed_state(ledger_that_says((page, 2), **words), [4, 3, 2, 1]) == ManagedState(None, 4)


@pytest.mark.parametrize("page", [4, 3, 2, 1])
def test_a_cgroup_with_a_page_on_any_level_is_never_unmanaged(page: int) -> None:
    """Earlier answers to its programs do not matter."""
    words = {"c4": False, f"c{page}": False}
    assert managed_state(ledger_that_says((page,), **words), [4, 3, 2, 1]) == ManagedState(None, 4)


def test_the_managed_state_without_a_ledger_is_undecided() -> None:
    assert managed_state(None, [4, 1]) == ManagedState(None, 4)
    assert managed_state(None, []) == ManagedState(None, 0)


def test_a_process_that_executes_another_program_is_another_client() -> None:
    """The kernel removes the process's entry, and its pidfd stays valid."""
    selector, parted = selectors.DefaultSelector(), []
    clients = Sessions(selector, bytes(16))
    clients.on_end = parted.append
    child = subprocess.Popen(["sleep", "100"])
    first = clients.add(child.pid, os.pidfd_open(child.pid), 4, 4, PageHeader(1, ((0, bytes(16)),)))
    assert first
    clients.update(first, 4, 4, (), first.header)
    page, lives = first.control.page, [process_of(n, 4, 5) for n in (23, 101)]
    page.gates[0], epoch = 6, page.epoch
    clients.show({})
    for _ in range(2):
        clients.show({child.pid: lives[0]})
    assert (parted, clients.get(child.pid), page.gates[0]) == ([], first, 6)
    clients.update(first, 4, 4, (), first.header)  # the process has registered since
    clients.show({child.pid: lives[1]})
    assert not parted
    clients.show({})
    assert (parted, clients.get(child.pid), len(clients)) == ([first], None, 0)
    assert (page.gates[0], page.epoch != epoch) == (abi.Gate.OPEN, True)
    child.kill()
    child.wait()


@pytest.mark.parametrize(
    ("known", "now", "is_ended"),
    [(23, 101, True), (23, None, True), (23, 23, False), (0, 101, False), (0, None, False)],
    ids=["new program", "no entry", "same program", "first entry", "never an entry"],
)
def test_a_process_that_registers_again_is_another_client_only_with_another_entry(
    known: int, now: int | None, is_ended: bool
) -> None:
    """The entry has another generation after an exec, and after the process has left its cgroups and returned."""
    with selectors.DefaultSelector() as selector, subprocess.Popen(["sleep", "100"]) as child:
        clients, parted = Sessions(selector, bytes(16)), list[Session]()
        clients.on_end = parted.append
        first = clients.add(child.pid, os.pidfd_open(child.pid), 4, 4, PageHeader(1, ((0, bytes(16)),)))
        assert first
        first.generation, page = known, first.control.page
        page.gates[0], epoch = 6, page.epoch
        entry = process_of(now, 4, 5) if now else None
        first.has_ended = True
        assert not clients.end_if_executed(first, entry)
        first.has_ended = False
        assert clients.end_if_executed(first, entry) == is_ended
        assert (clients.get(child.pid), len(parted)) == (None if is_ended else first, int(is_ended))
        assert (page.gates[0] == abi.Gate.OPEN, page.epoch != epoch) == (is_ended, is_ended)
        child.kill()


def test_unmanaged_processes_have_heartbeats_with_any_number_of_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of the least recently requested clock is released, and never the page of usual processes."""
    clients, most = Sessions(selectors.DefaultSelector(), bytes(16)), sessions.MOST_CLOCKS
    monkeypatch.setattr(sessions.procfs, "clock_ahead_ns", lambda pid: pid * 1_000_000_000)
    usual, *odd = [clients.page_of_unmanaged(pid) for pid in range(most + 1)]
    assert clients.page_of_unmanaged(1) is odd[0]
    for pid in range(most + 1, 3 * most):
        control = clients.page_of_unmanaged(pid)
        assert control.page.heartbeat_ns > pid * 1_000_000_000
        assert len(clients._shared) == most + 1
        assert (clients.page_of_unmanaged(0), clients.page_of_unmanaged(1)) == (usual, odd[0])
    assert not any(hasattr(control, "page") for control in odd[1:]), "a released page is still mapped"
    usual.page.heartbeat_ns = control.page.heartbeat_ns = 0
    clients.beat()
    assert usual.page.heartbeat_ns
    assert control.page.heartbeat_ns


def test_times_on_a_page_use_the_clock_of_its_process() -> None:
    control, status = ControlMemory(), StatusMemory()
    client = SimpleNamespace(control=control, status=status, ahead_ns=0)
    desk = ProcessGates(client)  # type: ignore[arg-type]
    flight, span = status.page.flights[0], status.page.spans[0]
    desk.set_shared([0])
    desk.use([0])
    seen = []
    for ahead in (0, 86_400_000_000_000, -1_000_000):
        flight.in_flight, flight.busy_until_ns, flight.wanted_ns = 1, 2_000_005 + ahead, 2_000_003 + ahead
        span.begun_ns, span.ended_ns = 2_000_001 + ahead, 2_000_002 + ahead
        client.ahead_ns = ahead
        seen.append(observe_processes([desk], frozenset({0}), 1, 2_000_000, 2_000_009))
    assert seen[0] == seen[1] == seen[2]
    ctypes.memset(ctypes.addressof(flight), 0, ctypes.sizeof(flight))
    ctypes.memset(ctypes.addressof(span), 0, ctypes.sizeof(span))
    assert observe_processes([desk], frozenset({0}), 1, 2_000_000, 2_000_009)[-4:] == (0, 0, 0, 0), (
        "a span of zeros is no time"
    )
    assert (seen[0].busy_until_ns, seen[0].wanted_ns) == (2_000_005, 2_000_003)


def test_the_cgroups_of_a_process_are_read_from_the_leaf_up(cgroup: Any, cgroup_base: Path) -> None:
    place = cgroup(cgroup())
    pid = os.fork()
    if pid == 0:
        signal.pause()
    (place / "cgroup.procs").write_text(str(pid))
    ids = cgroups(pid, cgroup_base.parent)
    assert ids == [p.stat().st_ino for p in (place, place.parent, cgroup_base, cgroup_base.parent)]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pytest.raises(OSError, match=str(pid)):
        cgroups(pid, cgroup_base.parent)


def test_a_too_deep_cgroup_is_treated_as_an_outer_cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parts = ["d"] * 100
    (tmp_path / "/".join(parts)).mkdir(parents=True)
    monkeypatch.setattr(procfs, "read", lambda _: b"1:cpu:/x\n0::/" + "/".join(parts).encode() + b"\n")
    assert len(cgroups(1, tmp_path)) == procfs.DEEPEST + 1
    monkeypatch.setattr(procfs, "read", lambda _: b"0::/../../elsewhere\n")
    assert cgroups(1, tmp_path) == []


def test_removed_cgroups_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    there = [p.stat().st_ino for p in (tmp_path / "a" / "b", tmp_path / "a", tmp_path)]
    assert list(cgroup_ids(tmp_path, "/a/b")) == there
    assert list(cgroup_ids(tmp_path, "/a/b/gone")) == there
    assert list(cgroup_ids(tmp_path, "/")) == there[2:]


def test_the_path_of_a_cgroup_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cgroup_path(2**22) is None
    for text, path in (
        (b"1:cpu:/x\n0::/a/b\n", "/a/b"),
        (b"0::/\n", "/"),
        (b"0::/a (deleted)\n", "/a"),
        (b"0::/\xff\n", "/\udcff"),
        (b"1:cpu:/x\n", None),
    ):
        monkeypatch.setattr(procfs, "read", lambda _, text=text: text)
        assert cgroup_path(1) == path


def test_only_files_mapped_as_executable_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["libcuda.so.1", "libfgpu.so", "libcudart.so", "libcuda.so.2", "not-libcuda.so"]
    before = of_process(os.getpid(), lambda *_: UNCHECKED)  # files that other tests have loaded into this process
    kept = []
    for name in names:
        (tmp_path / name).write_bytes(bytes(4096))
        with (tmp_path / name).open("rb") as file:
            executable = 0 if name == "libcuda.so.2" else mmap.PROT_EXEC
            kept.append(mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ | executable))
    (tmp_path / "libfgpu.so").unlink()
    status = (tmp_path / names[0]).stat()
    found = of_process(os.getpid(), lambda *_: UNCHECKED)
    assert found == dict.fromkeys(found, UNCHECKED)
    found = {file: said for file, said in found.items() if file not in before}
    assert (status.st_dev, status.st_ino) in found
    assert len(found) == 2
    mapped = fgpu_mappings(os.getpid())
    assert mapped is not None
    own = [m for m in mapped if (m.dev, m.ino) in found]
    assert {m.path for m in own} == {str(tmp_path / name) for name in names[:2]}
    assert {(m.dev, m.ino) for m in own} == set(found)
    unknown = {(0, 0): 0}
    assert of_process(2**22, lambda *_: UNCHECKED) == unknown
    monkeypatch.setattr(procmaps, "MOST", 3)
    assert of_process(os.getpid(), lambda *_: UNCHECKED) == unknown


def test_listed_mappings_equal_those_of_proc_self_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakpoints, "CUDA_NAMES", b"")  # matches every name
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    files = [(dev, int(ino), path) for _, mode, _, dev, ino, path in (f for f in lines if len(f) == 6) if "x" in mode]
    text = {(os.makedev(*(int(part, 16) for part in dev.split(":"))), ino, path) for dev, ino, path in files if ino}
    assert {(m.dev, m.ino, m.path) for m in fgpu_mappings(os.getpid()) or ()} == text
    for dev, ino, path in text:
        assert mapped_files.as_mapped(path) == (dev, ino)


def test_no_files_is_not_the_same_as_unknown_files(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        until(lambda: fgpu_mappings(sleeper.pid) == [])
        assert procfs.has_memory(sleeper.pid)
        monkeypatch.setattr(procmaps, "MOST", 1)
        until(lambda: fgpu_mappings(sleeper.pid) is None)
    finally:
        sleeper.kill()
        until(lambda: not procfs.has_memory(sleeper.pid))  # exited, and not yet reaped
        sleeper.wait()
    assert not procfs.has_memory(sleeper.pid)


def test_the_pids_of_a_process_in_each_namespace_are_parsed() -> None:
    space = os.stat("/proc/self/ns/pid").st_ino
    assert pid_names(os.getpid()) == {space: os.getpid()}
    assert pid_names(2**22) == {}


def test_a_process_s_own_name_forges_no_line() -> None:
    program = "import ctypes; ctypes.CDLL(None).prctl(15, b'x\\rNSpid: 7'); print(flush=True); input()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert set(pid_names(process.pid).values()) == {process.pid}
        process.kill()


def process_of(generation: int, leaf: int, *held: int) -> Any:
    return SimpleNamespace(generation=generation, levels=(leaf, 1), bytes=held, parked=(0,) * len(held))


def process(leaf: int, *held: int) -> Any:
    return process_of(9, leaf, *held)


def test_parked_bytes_are_in_the_row_of_their_process() -> None:
    away = SimpleNamespace(generation=9, levels=(5, 1), bytes=(2, 0), parked=(21, 0))
    assert by_tenant({7: away}) == {5: [(7, 9, 0, 23)]}


def test_rows_are_grouped_by_tenant() -> None:
    assert by_tenant({7: process(5, 0, 101), 3: process(5, 23, 0), 4: process(6, 1), 8: process(6, 0)}) == {
        5: [(3, 9, 0, 23), (7, 9, 1, 101)],
        6: [(4, 9, 0, 1)],
    }


def test_the_largest_rows_are_kept_in_order_of_pid() -> None:
    (rows,) = by_tenant({tgid: process(5, tgid) for tgid in range(1, 1010)}).values()
    assert [row[0] for row in rows] == list(range(1010 - abi.ROWS, 1010))


def test_a_reported_exit_before_the_hello_belongs_to_an_earlier_process() -> None:
    with selectors.DefaultSelector() as selector, subprocess.Popen(["sleep", "100"]) as process:
        clients, parted = Sessions(selector, bytes(16)), list[Session]()
        clients.on_end = parted.append
        before_ns = time.monotonic_ns()
        client = clients.add(process.pid, os.pidfd_open(process.pid), 7, 7, PageHeader())
        assert client
        clients.end(process.pid, before_ns)  # the exit of another process that had this pid
        clients.end(process.pid + 1, time.monotonic_ns())
        assert not parted
        assert not client.has_ended
        for times in (1, 2):
            clients.end(process.pid, time.monotonic_ns())
            assert parted == [client] * times
        assert client.has_ended
        assert clients.get(process.pid) is client  # it keeps its pages until its pidfd reports the exit
        process.kill()
        selector.select(30)[0][0].data()
        assert parted == [client] * 3
        assert not len(clients)


def test_only_a_hello_is_well_formed() -> None:
    good = bytes(abi.Hello(magic=abi.MAGIC, version=abi.LAYOUT, size=64))
    dice = random.Random(11)
    assert well_formed(good)
    assert well_formed(good[:8] + dice.randbytes(56))
    for place in range(8):
        assert not well_formed(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    assert not any(well_formed(dice.randbytes(dice.randrange(200))) for _ in range(10_000))


def test_a_missing_ledger_leaves_no_descriptor_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bpf, "pinned", lambda path: os.open(path, os.O_RDONLY))
    (tmp_path / "maps").mkdir()
    for name in ("pages", "limits", "host"):
        (tmp_path / "maps" / name).touch()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(LedgerMissing):
        Ledger(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "adjust").touch()
    ledger = Ledger(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before + 4
    ledger.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_gatekeeper_imports_no_large_module() -> None:
    code = "import sys, fgpu_ebpf.gatekeeper.main; print(*sys.modules)"
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert not {"asyncio", "logging", "bcc", "click", "pydantic", "psutil", "rich", "uuid"} & set(said.split())
