"""Memory that no probe has recorded: how much a process has, and the effect of `onBypass: kill`."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from fgpu_ebpf import daemon
from fgpu_ebpf.abi import Seen
from fgpu_ebpf.agent import chores, parts
from fgpu_ebpf.agent.bypass_killer import BypassKiller
from fgpu_ebpf.agent.nvml_reconcile import Truth
from fgpu_ebpf.agent.settings import Options
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.ledger.unwitnessed_memory import LOOKS, Unwitnessed
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.policy import trusted_file
from fgpu_ebpf.tenancy.event_log import EventLog
from tests.unit.orphan_kit import MIB, Books, orphan, process, tenant

CONTEXT, MODULES = 3 * MIB, 2 * MIB


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as started:
        yield started
        started.kill()


def unwitnessed() -> Unwitnessed:
    """Return an Unwitnessed whose `find` has run once, without processes."""
    made = Unwitnessed({0: CONTEXT}, MODULES)
    assert made.find({}, ()) == {}
    return made


def found(**facts: Any) -> int:
    return unwitnessed().find({1: process(**facts)}, ()).get((1, 0), 0)


def test_the_setting_in_agent_yaml_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_built_file", lambda *_: tmp_path)
    monkeypatch.setattr(trusted_file, "load", lambda *_: (b"drivers: {modules: 7MiB}", None))
    module_bytes = daemon.settings(Options(config=tmp_path / "agent.yaml")).module_bytes
    monkeypatch.setattr(chores, "Writer", MagicMock())
    driver = MagicMock(contexts={0: CONTEXT})
    for name in ("Policies", "KernelEvents", "Reconciler", "Manager", "HostLook", "Looks", "StaleMountReports"):
        monkeypatch.setattr(parts, name, MagicMock())
    settings = MagicMock(module_bytes=module_bytes)
    made = parts.wire(settings, MagicMock(driver=driver), MagicMock(), EventLog(), {}).chores
    assert made.unwitnessed.find({1: process(overhead=7 * MIB)}, ()) == {}
    assert made.unwitnessed.find({1: process(overhead=7 * MIB + 1)}, ()) == {(1, 0): 1}


def test_contexts_and_modules_explain_unwitnessed_memory() -> None:
    assert found(overhead=2 * CONTEXT + MODULES, contexts=2) == 0
    assert found(overhead=2 * CONTEXT + MODULES + 7, contexts=2) == 7


@pytest.mark.parametrize(("flags", "beyond"), [(0, 4 * MIB), (Seen.IMPORT, 0)])
def test_exports_of_others_explain_memory_of_an_importer(flags: int, beyond: int) -> None:
    exporter = process(exported=3 * MIB)
    importer = process(flags=flags, overhead=MODULES + 4 * MIB)
    assert unwitnessed().find({1: exporter, 2: importer}, [orphan(bytes_=MIB)]).get((2, 0), 0) == beyond


def test_exports_of_a_process_do_not_explain_its_own_memory() -> None:
    assert found(flags=Seen.IMPORT, overhead=MODULES + 4 * MIB, exported=4 * MIB) == 4 * MIB


def importer(bytes_: int, **facts: Any) -> Process:
    """Return a process whose row shows this much memory of others."""
    return process(flags=Seen.IMPORT, overhead=MODULES + bytes_, **facts)


@pytest.mark.parametrize(
    "exporter",
    [
        {"exported": 4 * MIB},
        {"flags": Seen.POOL_EXPORT, "pool": 4 * MIB},
        {"flags": Seen.EXPORT, "bytes_": 4 * MIB},
    ],
)
def test_memory_freed_by_an_exporter_explains_the_importer_s_row(exporter: dict[str, Any]) -> None:
    """The driver then shows the memory in the importer's row, perhaps some comparisons later."""
    one = unwitnessed()
    assert one.find({1: process(**exporter), 2: importer(0)}, ()) == {}
    assert one.find({2: importer(0)}, [orphan(bytes_=4 * MIB)]) == {}
    for _ in range(LOOKS - 1):
        assert one.find({2: importer(0)}, ()) == {}
    for _ in range(2 * LOOKS):
        assert one.find({2: importer(4 * MIB)}, ()) == {}
    assert one.find({2: importer(5 * MIB)}, ()) == {(2, 0): MIB}


def test_memory_that_appears_long_after_the_end_of_an_export_is_no_import() -> None:
    one = unwitnessed()
    one.find({1: process(exported=4 * MIB), 2: importer(0)}, ())
    for _ in range(LOOKS + 1):
        one.find({2: importer(0)}, ())
    assert one.find({2: importer(4 * MIB)}, ()) == {(2, 0): 4 * MIB}


def test_freed_memory_explains_the_rows_of_one_importer() -> None:
    one = unwitnessed()
    one.find({1: process(exported=4 * MIB), 2: importer(0), 3: importer(0)}, ())
    assert sum(one.find({2: importer(4 * MIB), 3: importer(4 * MIB)}, ()).values()) == 4 * MIB


def test_an_importer_that_has_released_imported_memory_may_not_allocate_it_again() -> None:
    one = unwitnessed()
    one.find({1: process(exported=4 * MIB), 2: importer(0)}, ())
    assert one.find({2: importer(4 * MIB)}, ()) == {}
    assert one.find({2: importer(0)}, ()) == {}
    assert one.find({2: importer(4 * MIB)}, ()) == {(2, 0): 4 * MIB}


def test_exports_of_successive_producers_are_added() -> None:
    one = unwitnessed()
    for number in range(1, 9):
        one.find({number: process(generation=number, exported=MIB), 100: importer((number - 1) * MIB)}, ())
        assert one.find({100: importer(number * MIB)}, ()) == {}


def test_imports_before_the_agent_s_start_are_explained() -> None:
    one = Unwitnessed({0: CONTEXT}, MODULES)
    assert one.find({2: importer(4 * MIB)}, ()) == {}
    assert one.find({2: importer(5 * MIB)}, ()) == {(2, 0): MIB}
    assert one.find({2: importer(5 * MIB, generation=77)}, ()) == {(2, 0): 5 * MIB}, "another process of that pid"


# -- under onBypass: kill


class Host:
    """One tenant with a process, beyond its limit."""

    def __init__(self, pid: int, **facts: Any) -> None:
        self.books, self.history, self.is_spared = Books(), EventLog(), False
        self.since, self.held = dict[int, float](), 0
        self.place = Path(tempfile.mkdtemp()) / "spared.json"
        self.books.used, self.books.limit = 5 * MIB, 4 * MIB
        self.pid, self.process = pid, process(**facts)
        self.books.processes = {pid: self.process}

    def killer(self, **options: Any) -> BypassKiller:
        """Return the killer of a new agent."""
        one = tenant(**{"kill": True} | options)

        class Enforcer(list):  # type: ignore[type-arg]
            spares = staticmethod(lambda _: self.is_spared)
            since = self.since

        truth = Truth(processes={self.pid: self.process}, held={0: {self.pid: self.held}})
        return BypassKiller(lambda: truth, self.books, Enforcer([one]), unwitnessed(), self.history, self.place)  # type: ignore[arg-type]

    def look(self, **options: Any) -> None:
        self.killer(**options).look()

    def killed(self) -> list[int]:
        return [event["pid"] for event in self.history.since(0)["events"] if event["what"] == "killed"]


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Set the path of the cgroup of all processes; the tenant has the path /a."""
    found = {"path": "/a/b"}
    monkeypatch.setattr(procfs, "cgroup_path", lambda _: found["path"])
    return found


def is_killed(child: subprocess.Popen[bytes]) -> bool:
    child.terminate()  # the status of a process is that of its first deadly signal
    return child.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("facts", "dies"),
    [
        ({"bytes_": 5 * MIB, "overhead": 5 * MIB}, True),  # no call of the process was witnessed
        ({"flags": Seen.CALL, "bytes_": 6 * MIB, "overhead": MODULES + 1}, True),
        ({"flags": Seen.CALL, "bytes_": 6 * MIB, "overhead": MODULES}, False),  # the BPF programs handle this case
        ({"flags": Seen.SHIM, "bytes_": 6 * MIB, "overhead": MODULES + 1}, True),
        ({"bytes_": 0}, False),
    ],
)
def test_only_a_process_beyond_its_limit_by_unwitnessed_memory_is_killed(
    child: subprocess.Popen[bytes], facts: dict[str, Any], dies: bool
) -> None:
    host = Host(child.pid, **facts)
    host.look()
    assert is_killed(child) == dies
    assert host.killed() == [child.pid] * dies


@pytest.mark.parametrize("why", ["report", "observe", "spared", "within", "elsewhere", "another"])
def test_a_process_outside_the_scope_of_kill_is_not_killed_for_unwitnessed_memory(
    child: subprocess.Popen[bytes], why: str
) -> None:
    host = Host(child.pid, bytes_=5 * MIB, overhead=5 * MIB, levels=(8,) if why == "elsewhere" else (7,))
    host.is_spared = why == "spared"
    if why == "within":
        host.books.used = host.books.limit
    if why == "another":  # the pid's ledger entry belongs to a later program
        host.books.processes = {child.pid: SimpleNamespace(generation=10)}  # type: ignore[dict-item]
    host.look(kill=why != "report", observe=why == "observe")
    assert not is_killed(child)
    assert host.killed() == []


@pytest.mark.parametrize(
    ("limit_is_younger", "bytes_", "dies"),
    [(True, 5 * MIB + MODULES, False), (True, 5 * MIB + MODULES + 1, True), (False, 5 * MIB, True)],
)
def test_no_process_is_killed_for_what_it_had_before_its_limit(
    child: subprocess.Popen[bytes], limit_is_younger: bool, bytes_: int, dies: bool
) -> None:
    host = Host(child.pid, bytes_=bytes_, overhead=bytes_)
    host.held, host.since = 5 * MIB, {7: time.clock_gettime(time.CLOCK_BOOTTIME) if limit_is_younger else 0.001}
    host.look()
    assert is_killed(child) == dies


@pytest.mark.parametrize(("bytes_", "dies"), [(5 * MIB + MODULES, False), (5 * MIB + MODULES + 1, True)])
def test_a_later_agent_kills_no_process_for_what_it_had_before_its_limit(
    child: subprocess.Popen[bytes], bytes_: int, dies: bool
) -> None:
    host = Host(child.pid, bytes_=5 * MIB, overhead=5 * MIB)
    host.held, host.since = 5 * MIB, {7: time.clock_gettime(time.CLOCK_BOOTTIME)}
    host.look()
    host.since, host.held, host.process = {}, bytes_, process(bytes_=bytes_, overhead=bytes_)
    host.books.processes = {child.pid: host.process}
    host.look()
    assert is_killed(child) == dies


@pytest.mark.parametrize("said", ["", "[]", "{", '{"7": {"1": [1]}}', '{"7": 3}', "9" * 5000, "[" * 100_000])
def test_a_damaged_file_spares_nothing(child: subprocess.Popen[bytes], said: str) -> None:
    host = Host(child.pid, bytes_=5 * MIB, overhead=5 * MIB)
    host.place.write_text(said)
    host.look()
    assert is_killed(child)


def test_a_file_that_cannot_be_written_is_written_later(child: subprocess.Popen[bytes], caplog: Any) -> None:
    host = Host(child.pid, bytes_=MIB)
    host.held, host.since = MIB, {7: time.clock_gettime(time.CLOCK_BOOTTIME)}
    host.place.parent.rmdir()
    killer = host.killer()
    for _ in range(3):
        killer.look()
    assert caplog.text.count("cannot be written") == 1
    host.place.parent.mkdir()
    killer.look()
    assert json.loads(host.place.read_text()) == {"7": {f"{child.pid}": [procfs.started(child.pid), {"0": MIB}]}}


def test_memory_is_spared_if_the_policy_kills_only_after_a_restart(child: subprocess.Popen[bytes]) -> None:
    host = Host(child.pid, bytes_=5 * MIB, overhead=5 * MIB)
    host.held, host.since = 5 * MIB, {7: time.clock_gettime(time.CLOCK_BOOTTIME)}
    host.look(kill=False)
    host.since = {}
    host.look()
    assert not is_killed(child)


def test_a_process_whose_cgroup_cannot_be_read_at_first_is_spared_later(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(child.pid, bytes_=5 * MIB, overhead=5 * MIB)
    host.held, host.since = 5 * MIB, {7: time.clock_gettime(time.CLOCK_BOOTTIME)}
    paths = [None]
    monkeypatch.setattr(procfs, "cgroup_path", lambda _: paths.pop() if paths else "/a/b")
    killer = host.killer()
    with pytest.raises(OSError, match="cannot be read"):
        killer.look()
    killer.look()
    assert not is_killed(child)


def test_processes_of_other_cgroups_are_neither_spared_nor_stored(
    child: subprocess.Popen[bytes], places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, asked = Host(child.pid, bytes_=5 * MIB, overhead=5 * MIB), list[int]()
    host.held, host.since, places["path"] = 5 * MIB, {7: time.clock_gettime(time.CLOCK_BOOTTIME)}, "/ab"
    started = procfs.started
    monkeypatch.setattr(procfs, "started", lambda pid: (asked.append(pid), started(pid))[1])
    killer = host.killer(kill=False)
    for _ in range(3):
        killer.look()
    assert asked == [child.pid], "the processes are read once for new tenants"
    assert not host.place.exists()
    host.look()
    assert is_killed(child)


def test_a_limit_that_does_not_fit_its_device_kills_no_process_below_it(child: subprocess.Popen[bytes]) -> None:
    host = Host(child.pid, bytes_=4 * MIB, overhead=4 * MIB)
    host.books.used, host.books.limit = 4 * MIB, 0
    host.look()
    assert not is_killed(child)


def test_an_exited_process_is_no_error() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = Host(ended.pid, bytes_=5 * MIB)
    host.look()
    assert host.killed() == []
