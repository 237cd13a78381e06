"""The use of devices, stored on disk: device-seconds, byte-seconds, idle and waiting time, by tenant and ten minutes.

The agent writes in its thread `usage`, so that a slow disk delays no other work. The command `fgpu usage` reads. The
file is an SQLite database with at most MOST_ROWS rows of use; the oldest are removed first. If the agent is killed,
amounts that are not written yet are lost, and the file stays valid.
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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

log = logging.getLogger("fgpu.agent")
FILE = Path("/var/lib/fgpu/usage.db")
PERIOD_SECONDS = 600  # the time that a row covers
MOST_ROWS = 500_000
CACHE_KIB = 256  # SQLite's cache in the writing thread; small, because the agent's memory is bounded
VERSION = 2
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
_ADD = """
INSERT INTO used VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET run = run + excluded.run,
    byte_seconds = byte_seconds + excluded.byte_seconds, held = held + excluded.held, idle = idle + excluded.idle,
    waited = waited + excluded.waited
"""
_READ = """
SELECT owners.tenant, owners.namespace, owners.user, owners.labels, owners.around, used.gpu, used.source,
    sum(run), sum(byte_seconds), sum(held), sum(idle), sum(waited)
FROM used JOIN owners ON owners.id = used.owner WHERE period >= ? GROUP BY owners.id, used.gpu, used.source
"""
_READ_FIRST = _READ.replace("owners.around", "'[]'")  # add() has not upgraded the file yet
_TRIM = "DELETE FROM used WHERE rowid IN (SELECT rowid FROM used ORDER BY rowid LIMIT ?)"
_FORGET = "DELETE FROM owners WHERE id NOT IN (SELECT owner FROM used)"


class StoreError(Exception):
    """The file cannot be read. The text has the reason."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A tenant and the names that its use can be grouped by.

    `labels`: the labels that the policy exports. `user`: the uid of a slice, or empty. `around`: the tenants around it,
    whose amounts include this tenant's.
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
        """Return whether a tenant around this one is in the same group: its amounts include those of this tenant."""
        return any(other.group(by) == self.group(by) for other in self.around)

    def words(self) -> tuple[str, str, str, str]:
        """Return the tenant's own names as the file has them."""
        return self.tenant, self.namespace, self.user, json.dumps(self.labels)

    @classmethod
    def of(cls, tenant: str, namespace: str, user: str, labels: str, around: tuple[Owner, ...] = ()) -> Owner:
        """Return the owner with these words(). `around`: the tenants around it."""
        return cls(tenant, namespace, user, tuple((name, value) for name, value in json.loads(labels)), around)


class Used(NamedTuple):
    """An amount of use of a device, in seconds and byte-seconds.

    `run` is the time that the device worked for the tenant. `held` is the time with memory on the device, and `idle`
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
    """The writing thread, which runs until stop(). Amounts that cannot be written are kept and written later."""

    def __init__(self, file: Path = FILE) -> None:
        self._file = file
        self._given: queue.SimpleQueue[Amounts | None] = queue.SimpleQueue()
        self._left: dict[Place, Used] = {}
        self._told = ""
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def give(self, amounts: Amounts) -> None:
        """Pass amounts to the thread, which adds them to the file."""
        self._given.put(amounts)

    def stop(self) -> None:
        """Stop the thread after it has written all amounts. Does not wait longer than END_SECONDS."""
        self._given.put(None)
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        for amounts in iter(self._given.get, None):
            for place, used in amounts.items():
                self._left[place] = self._left.get(place, Used()).plus(used)
            try:
                add(self._file, self._left)
                self._left, self._told = {}, ""
            except (sqlite3.Error, OSError) as error:
                if str(error) != self._told:
                    log.error("measured use cannot be written to %s and is kept in memory: %s", self._file, error)
                self._told = str(error)
                self._bound()

    def _bound(self) -> None:
        """Drop the oldest amounts, so that a full disk does not fill the memory."""
        while len(self._left) > MOST_ROWS // 100:
            self._left.pop(next(iter(self._left)))


def add(file: Path, amounts: Amounts) -> None:
    """Add amounts to the file, in one transaction. If it raises sqlite3.Error or OSError, nothing was added."""
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(file)) as store, store:
        store.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        columns = {name for _, name, *_ in store.execute("PRAGMA table_info(owners)")}
        store.executescript(_UPGRADE if columns and "around" not in columns else _TABLES)
        store.execute(f"PRAGMA user_version = {VERSION}")
        file.chmod(0o600)
        store.executemany(
            _ADD, ((p.period, _id(store, p.owner), p.gpu, p.source, *used) for p, used in amounts.items())
        )
        (rows,) = store.execute("SELECT count(*) FROM used").fetchone()
        if rows > MOST_ROWS:
            store.execute(_TRIM, (rows - MOST_ROWS * 9 // 10,))
            store.execute(_FORGET)


def _id(store: sqlite3.Connection, owner: Owner) -> int:
    words = (*owner.words(), json.dumps([other.words() for other in owner.around]))
    names = "tenant, namespace, user, labels, around"
    store.execute(f"INSERT OR IGNORE INTO owners ({names}) VALUES (?, ?, ?, ?, ?)", words)
    found = f"SELECT id FROM owners WHERE ({names}) = (?, ?, ?, ?, ?)"
    return int(store.execute(found, words).fetchone()[0])


def read(since_seconds: float, file: Path = FILE) -> Iterator[tuple[Owner, str, str, Used]]:
    """Yield owner, UUID of the device, source and amount of use since a time. Raises StoreError.

    Args:
        since_seconds: the time, in seconds since the epoch. The whole period that contains it is included.
        file: the database.
    """
    if not file.exists():
        raise StoreError(f"there is no {file}: no agent has run on this host for half a minute yet")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as store:
            (version,) = store.execute("PRAGMA user_version").fetchone()
            if version not in (1, VERSION):
                raise StoreError(f"{file} has version {version}, and this command reads version {VERSION}")
            for row in store.execute(_READ if version == VERSION else _READ_FIRST, (period(since_seconds),)):
                tenant, namespace, user, labels, around, gpu, source, *used = row
                others = tuple(Owner.of(*words) for words in json.loads(around))
                yield Owner.of(tenant, namespace, user, labels, others), gpu, source, Used(*used)
    except sqlite3.Error as error:
        raise StoreError(f"{file} cannot be read: {error}") from error


def period(seconds: float) -> int:
    """Return the number of the period that contains a time, which is in seconds since the epoch."""
    return int(seconds // PERIOD_SECONDS)


def grouped(rows: Iterator[tuple[Owner, str, str, Used]], by: str) -> dict[str, dict[str, Used]]:
    """Return the amounts by group and by source, summed over all devices.

    The amounts of a tenant include the amounts of the tenants inside it, so these are not added again if both tenants
    are in one group. The waiting time is an exception: it covers only the tenant's own programs, and is always added.
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
