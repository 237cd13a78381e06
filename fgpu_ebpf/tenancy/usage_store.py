"""The store of the use of devices: device-seconds, byte-seconds, idle and waiting time, by tenant and ten minutes.

The agent writes in its thread `usage`, so that a slow disk delays no other work. `fgpu usage` reads the database. The
file is an SQLite database with at most MOST_ROWS rows of use. A row covers ten minutes. If the file is full, earlier
rows are merged to rows of an hour and then of a day (UTC), which changes no total. If merging is not enough, the oldest
rows are removed, and the file records the end of the removed time. If the agent is killed, amounts that are not written
yet are lost, and the file stays valid. A damaged file is renamed to usage.db.damaged, and a new file is created.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sqlite3
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("fgpu.agent")
FILE = Path("/var/lib/fgpu/usage.db")
PERIOD_SECONDS = 600  # the time that a row covers
MOST_ROWS = 500_000
CACHE_KIB = 256  # SQLite's cache in the writing thread, which is small because the agent's memory is bounded
HOUR, DAY = 6, 144  # periods that a merged row covers
VERSION = 3
CHUNK = 10_000  # the most rows that one statement merges or removes, so that a statement needs little memory
WAIT_SECONDS = 30.0  # the longest wait for another process that has locked the file
END_SECONDS = 2.0
LABEL = "label:"
_TABLES = """
CREATE TABLE IF NOT EXISTS owners (
    id INTEGER PRIMARY KEY, tenant TEXT, namespace TEXT, user TEXT, labels TEXT,
    around TEXT NOT NULL DEFAULT '[]',
    UNIQUE (tenant, namespace, user, labels, around));
CREATE TABLE IF NOT EXISTS used (
    period INTEGER, owner INTEGER, gpu TEXT, source TEXT,
    run REAL, byte_seconds REAL, held REAL, idle REAL, waited REAL,
    UNIQUE (period, owner, gpu, source));
CREATE TABLE IF NOT EXISTS merged (
    length INTEGER, period INTEGER, owner INTEGER, gpu TEXT, source TEXT,
    run REAL, byte_seconds REAL, held REAL, idle REAL, waited REAL,
    PRIMARY KEY (length, period, owner, gpu, source)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS removed (until INTEGER PRIMARY KEY);
"""
# A file of version 1 has owners without `around`.
_UPGRADE = f"""
BEGIN;
ALTER TABLE owners RENAME TO earlier;
{_TABLES}
INSERT INTO owners (id, tenant, namespace, user, labels) SELECT id, tenant, namespace, user, labels FROM earlier;
DROP TABLE earlier;
COMMIT;
"""
_NO_FILES = "PRAGMA temp_store = MEMORY"  # the agent may have no folder for temporary files
_SUM = """
ON CONFLICT DO UPDATE SET run = run + excluded.run, byte_seconds = byte_seconds + excluded.byte_seconds,
    held = held + excluded.held, idle = idle + excluded.idle, waited = waited + excluded.waited
"""
_ADD = f"INSERT INTO used VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) {_SUM}"
_AMOUNTS = "owner, gpu, source, run, byte_seconds, held, idle, waited"
_ALL = f"""
(SELECT 1 AS length, period, {_AMOUNTS} FROM used UNION ALL SELECT length, period, {_AMOUNTS} FROM merged)
"""
_READ = f"""
SELECT owners.tenant, owners.namespace, owners.user, owners.labels, owners.around, part.gpu, part.source,
    sum(run), sum(byte_seconds), sum(held), sum(idle), sum(waited)
FROM {_ALL} AS part JOIN owners ON owners.id = part.owner WHERE part.period + part.length > ?
GROUP BY owners.id, part.gpu, part.source
"""
_READ_SECOND = _READ.replace(_ALL, f"(SELECT 1 AS length, period, {_AMOUNTS} FROM used)")  # add() has not upgraded yet
_READ_FIRST = _READ_SECOND.replace("owners.around", "'[]'")
_READS = {1: _READ_FIRST, 2: _READ_SECOND, VERSION: _READ}
_COUNT = "SELECT (SELECT count(*) FROM used) + (SELECT count(*) FROM merged)"
# By length of the merged rows: the table of the rows to merge, and the condition of SELECT and DELETE for these rows.
_PARTS = {HOUR: ("used", "true"), DAY: ("merged", f"length = {HOUR}")}
# Rows of a time later than the present time, from a wrong clock, are removed before the oldest rows.
_OLDEST = f"""
CREATE TEMP TABLE oldest AS SELECT length, period, owner, gpu, source FROM {_ALL} ORDER BY period <= :now, period
LIMIT :rows
"""
_REMOVE = (
    _OLDEST,
    "INSERT OR IGNORE INTO removed SELECT period + length FROM oldest WHERE period <= :now",
    "DELETE FROM removed WHERE until < (SELECT max(until) FROM removed)",
    "DELETE FROM used WHERE (1, period, owner, gpu, source) IN oldest",
    "DELETE FROM merged WHERE (length, period, owner, gpu, source) IN oldest",
    "DROP TABLE oldest",
)
_FORGET = "DELETE FROM owners WHERE id NOT IN (SELECT owner FROM used UNION ALL SELECT owner FROM merged)"


class StoreError(Exception):
    """The error of a file that cannot be read. The text has the reason."""


class Owner(NamedTuple):
    """A tenant and the names by which its use can be grouped.

    `labels`: the labels that the policy exports. `user`: the uid of a slice, or empty. `around`: the tenants around
    this tenant, whose amounts include the amounts of this tenant.
    """

    tenant: str
    namespace: str = ""
    user: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    around: tuple[Owner, ...] = ()

    def group(self, by: str) -> str:
        """Return the value by which `fgpu usage --by` groups: tenant, namespace, user or label:NAME."""
        if by.startswith(LABEL):
            return dict(self.labels).get(by.removeprefix(LABEL), "")
        return str(getattr(self, by))

    def is_counted_around(self, by: str) -> bool:
        """Return whether a tenant around this tenant is in the same group and thus has this tenant's amounts."""
        return any(other.group(by) == self.group(by) for other in self.around)

    def words(self) -> tuple[str, str, str, str]:
        """Return the tenant's own names in the form of the database's rows."""
        return self.tenant, self.namespace, self.user, json.dumps(self.labels)

    @classmethod
    def of(cls, tenant: str, namespace: str, user: str, labels: str, around: tuple[Owner, ...] = ()) -> Owner:
        """Return the owner with the names that words() has returned. `around`: the tenants around the owner."""
        return cls(tenant, namespace, user, tuple((name, value) for name, value in json.loads(labels)), around)


class Used(NamedTuple):
    """An amount of use of a device, in seconds and byte-seconds.

    `run` is the time that the device worked for the tenant. `held` is the time with memory on the device, and `idle` is
    the part of `held` without work. `waited` is the time in which the tenant waited for a turn.
    """

    run: float = 0.0
    byte_seconds: float = 0.0
    held: float = 0.0
    idle: float = 0.0
    waited: float = 0.0

    def plus(self, other: Used) -> Used:
        """Return the sum of both amounts."""
        return Used(*map(sum, zip(self, other, strict=True)))


class Place(NamedTuple):
    """The key of an amount: period, tenant, UUID of the device, and the source that has measured `run`."""

    period: int
    owner: Owner
    gpu: str
    source: str


Amounts = Mapping[Place, Used]


class Writer:
    """The writing thread, which runs until stop(). Amounts that cannot be written are kept and written later.

    `fault`: the reason why the last amounts could not be written, or empty.
    """

    def __init__(self, file: Path = FILE) -> None:
        self._file = file
        self._given: queue.SimpleQueue[Amounts | None] = queue.SimpleQueue()
        self._left: dict[Place, Used] = {}
        self.fault = ""
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def give(self, amounts: Amounts) -> None:
        """Pass amounts to the thread, which adds the amounts to the file."""
        self._given.put(amounts)

    def stop(self) -> None:
        """Stop the thread after the thread has written all amounts. The method waits for at most END_SECONDS."""
        self._given.put(None)
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        for amounts in iter(self._given.get, None):
            try:
                for place, used in amounts.items():
                    self._left[place] = self._left.get(place, Used()).plus(used)
                add(self._file, self._left)
                self._left, self.fault = {}, ""
            except Exception as error:  # any exception, for example of malloc, because no other thread writes amounts
                why = str(error) or type(error).__name__
                fault = f"measured use cannot be written to {self._file} and is kept in memory: {why}"
                if fault != self.fault:
                    log.error("%s", fault)
                self.fault = fault
                self._bound()

    def _bound(self) -> None:
        """Drop the oldest amounts, so that a full disk does not fill the memory."""
        while len(self._left) > MOST_ROWS // 100:
            self._left.pop(next(iter(self._left)))


def add(file: Path, amounts: Amounts) -> None:
    """Add amounts to the file, in one transaction. After an exception, nothing was added.

    A damaged file is renamed, and the amounts are added to a new file.
    """
    try:
        _add(file, amounts)
    except sqlite3.DatabaseError as error:
        if type(error) is not sqlite3.DatabaseError:  # the subclasses are for errors other than a damaged file
            raise
        log.error("%s is damaged and is renamed to %s.damaged: %s", file, file.name, error)
        file.replace(f"{file}.damaged")
        _add(file, amounts)


def _add(file: Path, amounts: Amounts) -> None:
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(file, timeout=WAIT_SECONDS)) as store, store:
        store.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        store.execute(_NO_FILES)
        columns = {name for _, name, *_ in store.execute("PRAGMA table_info(owners)")}
        store.executescript(_UPGRADE if columns and "around" not in columns else _TABLES)
        store.execute(f"PRAGMA user_version = {VERSION}")
        file.chmod(0o600)
        store.executemany(
            _ADD, ((p.period, _id(store, p.owner), p.gpu, p.source, *used) for p, used in amounts.items())
        )
        if _rows(store) > MOST_ROWS:
            _shrink(store, now=max(place.period for place in amounts))


def _rows(store: sqlite3.Connection) -> int:
    return int(store.execute(_COUNT).fetchone()[0])


def _shrink(store: sqlite3.Connection, now: int) -> None:
    """Merge the rows, and if necessary remove the oldest rows, until the store has room for a tenth of its rows.

    All rows of a period except the rows of the last hour are merged to rows of an hour. If the store still has too many
    rows, all rows of an hour except the rows of the last day are merged to rows of a day.

    Args:
        store: the database, in a transaction.
        now: the present period.
    """
    most = MOST_ROWS * 9 // 10
    for length in _PARTS:
        if _rows(store) > most:
            _merge(store, length)
    while (rows := _rows(store)) > most:
        for command in _REMOVE:
            store.execute(command, {"now": now, "rows": min(CHUNK, rows - most)})
    store.execute(_FORGET)


def _merge(store: sqlite3.Connection, length: int) -> None:
    """Merge the rows of the next smaller length to rows of `length` periods, HOUR or DAY, except the last hour or day.

    Args:
        store: the database, in a transaction.
        length: the length of the merged rows.
    """
    table, which = _PARTS[length]
    (last,) = store.execute(f"SELECT max(period) FROM {table} WHERE {which}").fetchone()
    end, stop = (last or 0) // length * length, None
    while stop != end:
        place = f"SELECT period FROM {table} WHERE {which} ORDER BY period LIMIT 1 OFFSET {CHUNK}"
        found = store.execute(place).fetchone()
        stop = min(found[0] + 1, end) if found else end
        store.execute(
            f"INSERT INTO merged SELECT {length}, period / {length} * {length}, {_AMOUNTS} FROM {table} "
            f"WHERE {which} AND period < ? {_SUM}",
            (stop,),
        )
        store.execute(f"DELETE FROM {table} WHERE {which} AND period < ?", (stop,))


def _id(store: sqlite3.Connection, owner: Owner) -> int:
    words = (*owner.words(), json.dumps([other.words() for other in owner.around]))
    names = "tenant, namespace, user, labels, around"
    store.execute(f"INSERT OR IGNORE INTO owners ({names}) VALUES (?, ?, ?, ?, ?)", words)
    found = f"SELECT id FROM owners WHERE ({names}) = (?, ?, ?, ?, ?)"
    return int(store.execute(found, words).fetchone()[0])


def read(since_seconds: float, file: Path = FILE) -> Iterator[tuple[Owner, str, str, Used]]:
    """Yield the owner, the UUID of the device, the source and the amount of use since a time.

    Raise StoreError if the file is unreadable.

    Args:
        since_seconds: the time, in seconds since the epoch. The whole row that contains the time is included, which is
            ten minutes, or an hour or a day if old rows were merged.
        file: the database.
    """
    with _opened(file) as (store, version):
        for row in store.execute(_READS[version], (period(since_seconds),)):
            tenant, namespace, user, labels, around, gpu, source, *used = row
            others = tuple(Owner.of(*words) for words in json.loads(around))
            yield Owner.of(tenant, namespace, user, labels, others), gpu, source, Used(*used)


def begin(file: Path = FILE) -> float | None:
    """Return the time before which rows were removed, or None if no rows were removed. Raise StoreError on failure.

    Returns:
        The time in seconds since the epoch.
    """
    with _opened(file) as (store, version):
        (until,) = store.execute("SELECT max(until) FROM removed").fetchone() if version == VERSION else (None,)
        return None if until is None else float(until * PERIOD_SECONDS)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tuple[sqlite3.Connection, int]]:
    """Open the file for reading, and yield the database and its version. Raise StoreError if the file is unreadable.

    SQLite must be able to write, because SQLite restores the file if the agent was killed in a transaction.
    """
    nothing = StoreError(f"{file} is empty or missing: no agent has run on this host for half a minute yet")
    if not file.exists():
        raise nothing
    try:
        uri = f"file:{file}?mode=rw"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=WAIT_SECONDS)) as store:
            (version,) = store.execute("PRAGMA user_version").fetchone()
            if version == 0:  # a file without tables
                raise nothing
            if version not in _READS:
                raise StoreError(f"{file} has version {version}, and this command reads version {VERSION}")
            store.execute(_NO_FILES)
            yield store, version
    except sqlite3.Error as error:
        raise StoreError(f"{file} cannot be read: {error}") from error


def period(seconds: float) -> int:
    """Return the number of the period that contains a time, which is in seconds since the epoch."""
    return int(seconds // PERIOD_SECONDS)


def grouped(rows: Iterator[tuple[Owner, str, str, Used]], by: str) -> dict[str, dict[str, Used]]:
    """Return the amounts by group and by source, summed over all devices.

    The amounts of a tenant include the amounts of the tenants inside this tenant. The amounts of an inner tenant are
    therefore not added again if both tenants are in one group. The waiting time, which covers only the tenant's own
    programs, is always added.
    """
    found: defaultdict[str, dict[str, Used]] = defaultdict(dict)
    for owner, _, source, used in rows:
        if owner.is_counted_around(by):
            used = Used(waited=used.waited)
            if not used.waited:
                continue
        of = found[owner.group(by)]
        of[source] = of.get(source, Used()).plus(used)
    return dict(found)
