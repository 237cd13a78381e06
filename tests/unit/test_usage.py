"""Tests of usage: which amounts a sample adds from which source, and the store on disk."""

from __future__ import annotations

import json
import sqlite3
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from fgpu_ebpf.agent import usage_meter
from fgpu_ebpf.agent.usage_meter import UsageMeter
from fgpu_ebpf.cli import usage as command
from fgpu_ebpf.ledger.compute_maps import TurnCounts
from fgpu_ebpf.tenancy import usage_store
from fgpu_ebpf.tenancy.usage_store import Owner, Place, Used, Writer

GIB = 1 << 30
UNIT = Owner("unit", "research", "1000")
ALICE = Owner("alice", "research", "1000", (("team", "vision"),), (UNIT,))


class Host:
    """A tenant, level 7 inside level 1, that is charged 3 GiB, 2 of them for process 71. NVML reports `percent`."""

    def __init__(self, monkeypatch, percent, counts=None):
        self.now, self.given, self.percent, self.counts = 1000.0, [], percent, counts
        monkeypatch.setattr(usage_meter.time, "monotonic", lambda: self.now)
        workload = SimpleNamespace(namespace="research")
        tenant = SimpleNamespace(
            cgroup=7,
            name="alice",
            path="user.slice/user-1000.slice/a",
            workload=workload,
            metric_labels={"team": "vision"},
        )
        self.processes = {71: SimpleNamespace(levels=(7, 1), bytes=(2 * GIB, 0))}
        self.of_nvml, self.readings = None, 0  # None: NVML lists all processes of the ledger
        self.tenants, self.ended = {7: tenant}, {}
        self.is_stale, self.sampled = False, self.now

        def truth():
            self.sampled = self.sampled if self.is_stale else self.now
            listed = self.processes if self.of_nvml is None else self.of_nvml
            return SimpleNamespace(processes=listed, percent={0: self.percent}, sampled=self.sampled)

        def processes():
            self.readings += 1
            return self.processes

        ledger = SimpleNamespace(
            times=SimpleNamespace(
                turns=lambda: {(7, 0): self.counts} if self.counts else {}, take_ended=lambda: self.ended
            ),
            processes=processes,
            usage=lambda cgroup, devices: [SimpleNamespace(used=3 * GIB) for _ in devices],
        )
        around = SimpleNamespace(name="unit", path="user.slice/user-1000.slice", workload=workload, metric_labels={})
        enforcer = SimpleNamespace(get=self.tenants.get, around=lambda _: [around])
        self.writer = SimpleNamespace(give=self.given.append, stop=lambda: None, fault="")
        self.failed = {}
        self.meter = UsageMeter(truth, ledger, enforcer, "GPU-{}".format, self.writer, self.failed)

    def looks(self, number, seconds=1.0):
        for _ in range(number):
            self.now += seconds
            self.meter.look()
        return self.meter.totals[7, 0]


def test_a_tenant_without_turns_is_measured_by_nvml(monkeypatch):
    host = Host(monkeypatch, {71: 25, 99: 70})
    assert host.looks(4) == {"nvml": pytest.approx(Used(1.0, 12 * GIB, 4.0, 0.0, 0.0))}
    host.percent = {99: 70}
    assert host.looks(2)["nvml"].idle == pytest.approx(2.0), "a tenant with memory and no work is not idle"


def test_each_sample_of_nvml_counts_once(monkeypatch):
    host = Host(monkeypatch, {71: 50})
    host.looks(1)
    host.is_stale = True
    assert host.looks(3)["nvml"].run == pytest.approx(0.5)
    host.is_stale = False
    assert host.looks(1)["nvml"].run == pytest.approx(0.5 + 0.5 * 4), "a later sample covers the time since then"


def test_a_tenant_with_turns_is_measured_by_its_turns(monkeypatch):
    host = Host(monkeypatch, {71: 100}, TurnCounts(owned_ns=5_000_000_000, wait_ns=1_000_000_000))
    host.looks(1)
    host.counts = TurnCounts(owned_ns=5_500_000_000, wait_ns=1_250_000_000)
    assert host.looks(1)["turns"] == pytest.approx(Used(0.5, 6 * GIB, 2.0, 1.0, 0.25))
    host.counts = TurnCounts(owned_ns=5_500_000_000, wait_ns=1_250_000_000, free=1)
    assert host.looks(1)["nvml"].run == pytest.approx(1.0), "a lone tenant is measured by NVML"
    host.counts = TurnCounts()  # the counters were reset
    assert host.looks(1)["turns"].run == pytest.approx(0.5)
    new = Host(monkeypatch, {71: 100})
    new.counts = TurnCounts(owned_ns=300_000_000)
    assert new.looks(1)["turns"].run == pytest.approx(0.3), "the first sample of a new tenant"


@pytest.mark.parametrize("removed", [False, True])
def test_the_last_turns_of_a_tenant_count(monkeypatch, removed):
    """The tenant's last process ends between two samples. The cgroup stays, or is removed with its counters."""
    host = Host(monkeypatch, {71: 100}, TurnCounts(owned_ns=5_000_000_000))
    host.looks(1)
    host.processes, last = {}, TurnCounts(owned_ns=5_400_000_000, wait_ns=300_000_000)
    if removed:
        host.counts, host.ended = None, {(7, 0): last}
        host.tenants.clear()
    else:
        host.counts = last
    for _ in range(3):
        host.now += 1.0
        host.meter.look()
        host.ended = {}
    host.meter.stop()
    (amounts,) = host.given
    ((place, used),) = amounts.items()
    assert (place.owner, place.source, used) == (ALICE, "turns", pytest.approx(Used(0.4, 3 * GIB, 1.0, 1.0, 0.3)))


def test_time_and_idleness_are_unknown_without_figures_of_nvml(monkeypatch):
    assert Host(monkeypatch, None).looks(2) == {"none": pytest.approx(Used(0.0, 6 * GIB, 2.0, 0.0, 0.0))}


def test_memory_and_held_time_are_measured_without_answers_of_nvml(monkeypatch):
    """NVML answers for no device, for example because the device is released: its last list of processes is old."""
    host = Host(monkeypatch, None)
    host.of_nvml, host.is_stale, host.sampled = {}, True, 0.0
    assert host.looks(2) == {"none": pytest.approx(Used(0.0, 6 * GIB, 2.0, 0.0, 0.0))}
    host.of_nvml, host.processes = host.processes, {}
    assert host.looks(3)["none"].held == 2.0, "an ended process has no memory"


def test_a_tenant_is_not_idle_by_an_old_sample_of_nvml(monkeypatch):
    host = Host(monkeypatch, {})
    assert host.looks(1)["nvml"].idle == pytest.approx(1.0)
    host.is_stale = True
    found = host.looks(10)
    assert (found["nvml"].idle, found["nvml"].held) == (pytest.approx(5.0), pytest.approx(5.0))
    assert found["none"] == pytest.approx(Used(0.0, 6 * 3 * GIB, 6.0, 0.0, 0.0))


def test_the_ledger_s_processes_are_not_read_again_while_nvml_answers(monkeypatch):
    """The main loop would wait for the reading of thousands of processes every second."""
    host = Host(monkeypatch, {71: 100})
    host.looks(3)
    assert host.readings == 0


def test_a_pause_of_the_agent_adds_a_bounded_time_of_use(monkeypatch):
    assert Host(monkeypatch, {71: 100}).looks(1, seconds=3600.0)["nvml"].run == usage_meter.MOST_SECONDS


def test_amounts_are_stored_every_half_minute_and_only_once(monkeypatch):
    host = Host(monkeypatch, {71: 100})
    host.looks(29)
    assert not host.given
    host.looks(1)
    host.meter.stop()
    (amounts,) = host.given
    ((place, used),) = amounts.items()
    assert (place.owner, place.gpu, place.source, used.run) == (ALICE, "GPU-0", "nvml", pytest.approx(30.0))


def test_amounts_that_cannot_be_written_are_a_failed_check_until_they_are(monkeypatch):
    host = Host(monkeypatch, {71: 100})
    host.writer.fault = "the disk is full"
    host.looks(1)
    assert [(check.name, check.ok, check.found) for check in host.failed.values()] == [
        ("usage", False, "the disk is full")
    ]
    host.writer.fault = ""
    host.looks(1)
    assert host.failed == {}


def used(tenant="alice", period=10, gpu="GPU-a", source="turns", seconds=1.0):
    owner = Owner(tenant, "research", "1000", (("team", "vision" if tenant < "b" else "speech"),))
    return {Place(period, owner, gpu, source): Used(seconds, seconds, seconds, seconds, seconds)}


def test_amounts_of_one_tenant_and_device_are_added_and_grouped(tmp_path):
    file = tmp_path / "fgpu" / "usage.db"
    for amounts in (used(), used(seconds=2.0), used(gpu="GPU-b"), used("bob", source="nvml"), used(period=9)):
        usage_store.add(file, amounts)
    rows = list(usage_store.read(10 * usage_store.PERIOD_SECONDS, file))
    by_tenant = usage_store.grouped(iter(rows), "tenant")
    assert {who: {source: u.run for source, u in of.items()} for who, of in by_tenant.items()} == {
        "alice": {"turns": 4.0}, "bob": {"nvml": 1.0},
    }  # fmt: skip
    assert set(usage_store.grouped(iter(rows), "label:team")) == {"vision", "speech"}
    assert set(usage_store.grouped(iter(rows), "user")) == {"1000"}
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("tenant", {"alice": 1.0, "unit": 3.0}),
        ("user", {"1000": 3.0}),
        ("namespace", {"research": 3.0}),
        ("label:team", {"vision": 1.0, "": 3.0}),
        ("label:other", {"": 3.0}),
    ],
)
def test_a_tenant_inside_another_one_of_the_same_group_counts_once(tmp_path, by, expected):
    """The outer tenant's running time includes the inner tenant's. Waiting times are separate, so both are added."""
    file = tmp_path / "usage.db"
    for owner, seconds in ((ALICE, 1.0), (UNIT, 3.0)):
        usage_store.add(file, {Place(10, owner, "GPU-a", "turns"): Used(run=seconds, waited=seconds)})
    found = usage_store.grouped(usage_store.read(0, file), by)
    assert {group: of["turns"].run for group, of in found.items()} == expected
    assert sum(of["turns"].waited for of in found.values()) == 4.0


def test_a_file_of_version_1_keeps_its_amounts(tmp_path):
    file = tmp_path / "usage.db"
    with sqlite3.connect(file) as store:
        tables = usage_store._TABLES.replace("    around TEXT NOT NULL DEFAULT '[]',\n", "").replace(", around", "")
        store.executescript(f"{tables} PRAGMA user_version = 1")
        names = ("alice", "research", "1000", '[["team", "vision"]]')
        store.execute("INSERT INTO owners (tenant, namespace, user, labels) VALUES (?, ?, ?, ?)", names)
        store.execute("INSERT INTO used VALUES (10, 1, 'GPU-a', 'turns', 1, 1, 1, 1, 1)")
    store.close()
    assert usage_store.grouped(usage_store.read(0, file), "label:team")["vision"]["turns"].run == 1.0
    for _ in range(2):
        usage_store.add(file, used(seconds=2.0))
    assert usage_store.grouped(usage_store.read(0, file), "label:team")["vision"]["turns"].run == 5.0


def test_a_file_of_a_later_version_is_named_and_not_read(tmp_path):
    file = tmp_path / "usage.db"
    usage_store.add(file, used(seconds=2.0))
    with sqlite3.connect(file) as store:
        store.execute("PRAGMA user_version = 9")
    store.close()
    with pytest.raises(usage_store.StoreError, match="has version 9"):
        list(usage_store.read(0, file))


def test_the_file_is_bounded_and_loses_its_oldest_rows_first(tmp_path, monkeypatch):
    monkeypatch.setattr(usage_store, "MOST_ROWS", 100)
    file = tmp_path / "usage.db"
    for number in range(150):
        usage_store.add(file, used(f"t{number}", period=1000 - number))  # the clock goes backwards
    with sqlite3.connect(file) as store:
        assert store.execute("SELECT count(*) FROM used").fetchone()[0] <= 100
        assert store.execute("SELECT count(*) FROM owners").fetchone()[0] <= 100
    assert "t149" in usage_store.grouped(usage_store.read(0, file), "tenant")


def test_amounts_that_cannot_be_written_are_written_later(tmp_path, caplog):
    folder = tmp_path / "fgpu"
    folder.write_text("in the way")
    writer = Writer(folder / "usage.db")
    writer.give(used())
    deadline = time.monotonic() + 10
    while "cannot be written" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert str(folder) in writer.fault
    folder.unlink()
    writer.give(used(seconds=2.0))
    writer.stop()
    assert writer.fault == ""
    assert usage_store.grouped(usage_store.read(0, folder / "usage.db"), "tenant")["alice"]["turns"].run == 3.0
    assert caplog.text.count("cannot be written") == 1


def test_amounts_are_written_after_a_shortage_of_memory(tmp_path, monkeypatch, caplog):
    file, add = tmp_path / "usage.db", usage_store.add
    shortages = [MemoryError()]
    monkeypatch.setattr(usage_store, "add", lambda *of: add(*of) if not shortages else fail(shortages.pop()))
    writer = Writer(file)
    writer.give(used())
    writer.give(used(seconds=2.0))
    writer.stop()
    assert f"measured use cannot be written to {file} and is kept in memory: MemoryError" in caplog.text
    assert writer.fault == ""
    assert usage_store.grouped(usage_store.read(0, file), "tenant")["alice"]["turns"].run == 3.0


def fail(error):
    raise error


def test_a_file_whose_mode_cannot_be_set_gets_no_amounts(tmp_path, monkeypatch):
    """The writer adds the same amounts again later, so a call that fails must not have added them."""
    file = tmp_path / "usage.db"
    with monkeypatch.context() as patched:
        patched.setattr(type(file), "chmod", lambda *_: (_ for _ in ()).throw(PermissionError("not permitted")))
        with pytest.raises(PermissionError):
            usage_store.add(file, used())
    assert not list(usage_store.read(0, file))
    usage_store.add(file, used())
    assert usage_store.grouped(usage_store.read(0, file), "tenant")["alice"]["turns"].run == 1.0


def test_a_missing_or_invalid_store_is_reported(tmp_path):
    file = tmp_path / "usage.db"
    file.write_bytes(b"no database at all, but longer than a header of one would be" * 20)
    with pytest.raises(usage_store.StoreError, match="cannot be read"):
        list(usage_store.read(0, file))
    with pytest.raises(usage_store.StoreError, match="no agent has run"):
        list(usage_store.read(0, tmp_path / "none.db"))


@pytest.mark.parametrize(
    "damage", [lambda whole: b"no database" * 99, lambda whole: whole[:5000], lambda whole: whole[:99]]
)
def test_a_damaged_store_is_kept_under_another_name_and_a_new_one_begins(damage, tmp_path, caplog):
    file = tmp_path / "usage.db"
    usage_store.add(file, used())
    damaged = damage(file.read_bytes())
    file.write_bytes(damaged)
    usage_store.add(file, used(seconds=2.0))
    assert usage_store.grouped(usage_store.read(0, file), "tenant")["alice"]["turns"].run == 2.0
    assert (tmp_path / "usage.db.damaged").read_bytes() == damaged
    assert caplog.text.count("is damaged and is renamed to usage.db.damaged") == 1


def test_an_error_that_is_not_a_damage_leaves_the_store_in_place(tmp_path):
    file = tmp_path / "usage.db"
    usage_store.add(file, used())
    with sqlite3.connect(file) as store:
        store.execute("CREATE TRIGGER never BEFORE INSERT ON used BEGIN SELECT RAISE(ABORT, 'never'); END")
    store.close()
    with pytest.raises(sqlite3.IntegrityError):
        usage_store.add(file, used())
    assert [path.name for path in tmp_path.iterdir()] == ["usage.db"]


def test_an_empty_store_is_read_as_a_missing_one_and_gets_amounts(tmp_path):
    file = tmp_path / "usage.db"
    file.touch()
    with pytest.raises(usage_store.StoreError, match="no agent has run"):
        list(usage_store.read(0, file))
    usage_store.add(file, used())
    assert usage_store.grouped(usage_store.read(0, file), "tenant")["alice"]["turns"].run == 1.0


@pytest.fixture
def stored(tmp_path, monkeypatch):
    file = tmp_path / "usage.db"
    now = usage_store.period(time.time())
    usage_store.add(file, used(period=now, seconds=7200.0) | used("bob", period=now, source="none", seconds=3600.0))
    monkeypatch.setattr(usage_store.read, "__defaults__", (file,))
    monkeypatch.setattr(usage_store.begin, "__defaults__", (file,))
    monkeypatch.setattr(command.os, "geteuid", lambda: 0)


def test_table_csv_and_json_contain_the_source(stored):
    table = CliRunner().invoke(command.usage, []).output
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["alice", "turns", "2.00", "0.00", "2.00", "2.00", "2.00"], ["bob", "none", "-", "0.00", "1.00", "-", "1.00"],
    ]  # fmt: skip
    csv = CliRunner().invoke(command.usage, ["--csv", "--by", "label:team"]).output
    assert csv.splitlines()[:2] == [
        "label:team,source,run_seconds,memory_byte_seconds,held_seconds,idle_seconds,waited_seconds",
        "vision,turns,7200.0,7200.0,7200.0,7200.0,7200.0",
    ]
    records = json.loads(CliRunner().invoke(command.usage, ["--json"]).output)
    assert [(r["tenant"], r["source"]) for r in records] == [("alice", "turns"), ("bob", "none")]


@pytest.mark.parametrize(
    ("words", "valid"),
    [(["--since", "1y"], "7d"), (["--since", ""], "7d"), (["--by", "color"], "label:NAME")],
)
def test_invalid_arguments_are_refused_with_the_valid_ones(words, valid):
    done = CliRunner().invoke(command.usage, words)
    assert done.exit_code == 2
    assert valid in done.output
