"""Tests of the bounded store of use: old rows are merged before any is removed, and a killed writer loses little."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from fgpu_ebpf.agent.usage_meter import WRITE_SECONDS
from fgpu_ebpf.cli import usage as command
from fgpu_ebpf.tenancy import usage_store
from fgpu_ebpf.tenancy.usage_store import DAY, HOUR, PERIOD_SECONDS, Owner, Place, Used

ROOT = Path(__file__).parents[3]
NOW = 20_000 * DAY  # a period at which a day begins
LATE, EARLY = NOW + 5_000 * DAY, 7  # of a clock that is wrong


def amounts(periods, tenants=("alice",), seconds=1.0):
    used = Used(seconds, 2 * seconds, 3 * seconds, 4 * seconds, 5 * seconds)
    return {Place(period, Owner(name), "GPU-a", "turns"): used for period in periods for name in tenants}


def rows(file):
    with sqlite3.connect(file) as store:
        found = usage_store._rows(store)
    store.close()
    return found


def totals(file, since=0):
    found = usage_store.grouped(usage_store.read(since * PERIOD_SECONDS, file), "tenant")
    return {who: of["turns"] for who, of in found.items()}


def seconds(file, since=0):
    return {who: used.run for who, used in totals(file, since).items()}


# Two tenants in three days: at most 66 rows remain if all rows are merged except those of the last hour and day.
one = st.tuples(st.integers(NOW, NOW + 3 * DAY - 1), st.sampled_from(["alice", "bob"]))


@settings(deadline=None, max_examples=10)  # the test writes files
@given(st.lists(st.dictionaries(one, st.integers(1, 1000), min_size=60, max_size=120), min_size=2, max_size=4))
def test_merged_rows_have_the_same_totals(tmp_path_factory, batches):
    """The times of the batches are in any order, as those of a clock that is set back and forth."""
    file, expected = tmp_path_factory.mktemp("store") / "usage.db", dict[str, float]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usage_store, "MOST_ROWS", 80)
        patch.setattr(usage_store, "CHUNK", 7)
        for batch in batches:
            given = {}
            for (period, name), run in batch.items():
                given |= amounts([period], [name], float(run))
                expected[name] = expected.get(name, 0.0) + run
            usage_store.add(file, given)
            assert rows(file) <= 80
    assert totals(file) == {name: Used(run, 2 * run, 3 * run, 4 * run, 5 * run) for name, run in expected.items()}
    assert usage_store.begin(file) is None


def test_two_weeks_of_10_000_tenants_fit(tmp_path, monkeypatch):
    """5 tenants and as many rows for each."""
    monkeypatch.setattr(usage_store, "MOST_ROWS", usage_store.MOST_ROWS // 2000)
    file, names, end = tmp_path / "usage.db", [f"t{number}" for number in range(5)], NOW + 14 * DAY
    for period in range(NOW, end, 48):
        usage_store.add(file, amounts(range(period, period + 48), names))
        assert rows(file) <= 250
    assert seconds(file) == dict.fromkeys(names, 14.0 * DAY)
    assert seconds(file, end - HOUR) == dict.fromkeys(names, 1.0 * HOUR), "the last hour is exact"
    assert seconds(file, end - 3 * DAY - 5)["t0"] in range(3 * DAY + 5, 4 * DAY + 1), "the day around the time counts"
    assert usage_store.begin(file) is None


def test_rows_that_have_to_be_removed_are_the_oldest_and_the_store_has_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(usage_store, "MOST_ROWS", 100)
    monkeypatch.setattr(usage_store, "CHUNK", 4)
    file = tmp_path / "usage.db"
    days = range(NOW, NOW + 120 * DAY, DAY)
    for day in days:
        usage_store.add(file, amounts([day], [f"t{day}"]))
    assert rows(file) <= 100
    begin = usage_store.begin(file)
    assert begin is not None
    assert set(seconds(file)) == {f"t{day}" for day in days if day * PERIOD_SECONDS >= begin}
    with sqlite3.connect(file) as store:
        assert store.execute("SELECT count(*) FROM owners").fetchone()[0] <= 100
        assert store.execute("SELECT count(*) FROM removed").fetchone() == (1,)
    store.close()


def test_a_clock_that_jumps_loses_and_doubles_nothing(tmp_path, monkeypatch):
    """The store is full and every row is of another tenant, so rows have to be removed, but not those of now."""
    monkeypatch.setattr(usage_store, "MOST_ROWS", 100)
    file = tmp_path / "usage.db"
    usage_store.add(file, amounts([LATE + n * DAY for n in range(30)], ["late"]))
    for step in range(3):
        for clock in (NOW + step, EARLY + step, LATE, NOW + step):
            usage_store.add(file, amounts([clock], ["alice"]))
    assert seconds(file) == {"late": 30.0, "alice": 12.0}
    usage_store.add(file, amounts([NOW + HOUR], [f"t{number}" for number in range(85)]))
    found = seconds(file, EARLY)
    assert found["alice"] >= 9.0, "only the use at a time after the present one is removed"
    assert len(found) == 86 + ("late" in found)
    assert found.get("late", 0.0) < 30.0
    assert usage_store.begin(file) is None, "no row of the past was removed"


def test_a_file_of_version_2_is_read_and_keeps_its_amounts(tmp_path):
    file = tmp_path / "usage.db"
    usage_store.add(file, amounts([NOW]))
    with sqlite3.connect(file) as store:
        store.executescript("DROP TABLE merged; DROP TABLE removed; PRAGMA user_version = 2")
    store.close()
    assert (seconds(file), usage_store.begin(file)) == ({"alice": 1.0}, None)
    usage_store.add(file, amounts([NOW]))
    assert seconds(file) == {"alice": 2.0}


WRITER = """
import os, signal, sys
from pathlib import Path
from fgpu_ebpf.tenancy import usage_store
from fgpu_ebpf.tenancy.usage_store import Owner, Place, Used

def amounts(step, names):
    return {Place(step, Owner(name), "GPU-a", "turns"): Used(float(sys.argv[2])) for name in names}

file = Path(sys.argv[1])
"""
IN_A_LOOP = """
usage_store.MOST_ROWS = 100
step = 0
while True:
    usage_store.add(file, amounts(step, ["alice", "bob"]))
    print(step := step + 1, flush=True)
"""
IN_A_TRANSACTION = """
usage_store.add(file, amounts(1, ["alice"]))
usage_store.MOST_ROWS = 10
usage_store._shrink = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
usage_store.add(file, amounts(2, map(str, range(5000))))
"""


@pytest.mark.parametrize("after", [20, 60, 61])
def test_a_writer_that_is_killed_loses_at_most_a_minute(after, tmp_path):
    """Each call of the writer adds what the agent measures between two calls."""
    file = tmp_path / "usage.db"
    words = [sys.executable, "-c", WRITER + IN_A_LOOP, str(file), str(WRITE_SECONDS)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
        assert writer.stdout
        while int(writer.stdout.readline()) < after:
            pass
        writer.send_signal(signal.SIGKILL)
        said = [after, *map(int, writer.stdout.read().split())][-1]
    for name in ("alice", "bob"):
        assert WRITE_SECONDS * said <= seconds(file)[name] <= WRITE_SECONDS * said + 60
    usage_store.add(file, amounts([NOW]))
    assert usage_store.begin(file) is None


def test_a_file_whose_writer_was_killed_in_a_transaction_is_read_without_it(tmp_path):
    file = tmp_path / "usage.db"
    done = subprocess.run([sys.executable, "-c", WRITER + IN_A_TRANSACTION, str(file), "1"], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "usage.db-journal").stat().st_size, "the file has a part of the transaction"
    assert seconds(file) == {"alice": 1.0}


def printed(*words):
    done = CliRunner().invoke(command.usage, words)
    assert done.exit_code == 0
    return done.stdout, done.stderr


def test_the_command_names_the_begin_of_the_store_on_stderr_only(tmp_path, monkeypatch):
    file, now = tmp_path / "usage.db", usage_store.period(time.time())
    usage_store.add(file, amounts([now]))
    monkeypatch.setattr(usage_store.read, "__defaults__", (file,))
    monkeypatch.setattr(usage_store.begin, "__defaults__", (file,))
    monkeypatch.setattr(command.os, "geteuid", lambda: 0)
    kinds = ((), ("--json",), ("--csv",))
    before = [printed(*words) for words in kinds]
    with sqlite3.connect(file) as store:
        store.execute("INSERT INTO removed VALUES (?)", (now - HOUR,))
    store.close()
    begin = time.strftime("%Y-%m-%d %H:%M", time.localtime((now - HOUR) * PERIOD_SECONDS))
    assert [printed(*words) for words in kinds] == [(out, f"the store begins at {begin}\n") for out, _ in before]
    assert json.loads(before[1][0])[0]["tenant"] == "alice"
    assert printed("--since", "30m")[1] == "", "the whole time is in the store"
