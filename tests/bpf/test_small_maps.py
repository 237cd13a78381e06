"""T16: floods with maps of 64 entries and a ring of one page. Sent and lost events add up to all events."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator

import pytest

from fgpu_ebpf.abi import LimitFlag, News
from tests.bpf.conftest import (
    MIB,
    REPOSITORY,
    Client,
    Kernel,
    Level,
    anomalies,
    assert_left,
    entries,
    forget_empty,
    loaded,
    page_of,
    wait_until,
)
from tests.bpf.events_kit import fates
from tests.bpf.spaces_kit import CLONE_VM, borrowers, reap

ENTRIES, PART = 64, 16
PAGE_EVENTS = 4096 // 64  # the most that fit in a page
ROUNDS = 10  # rounds of a flood, each by another process
SMALL = {
    "MOST_ALLOCATIONS": ENTRIES,
    "MOST_THREADS": ENTRIES,
    "MOST_PROCESSES": ENTRIES,
    "MOST_ORPHANS": ENTRIES,
    "MOST_BORROWERS": 1,
    "EVENT_BYTES": 4096,
    "EVENTS_A_SECOND": 1 << 30,  # no event is left out because of the rate: only the ring loses events
    "CGROUPS_A_SECOND": 0,  # other events of this host are ignored
}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """Load the programs with small maps, in place of the suite's."""
    folder = tmp_path_factory.mktemp("small")
    sources = folder / "bpf"
    shutil.copytree(REPOSITORY / "bpf", sources)
    for name, value in SMALL.items():
        found = [path for path in sources.glob("*.h") if re.search(rf"(?m)^#define {name} ", path.read_text())]
        assert len(found) == 1, name
        text = re.sub(rf"(?m)^(#define {name}) .*$", rf"\1 {value}", found[0].read_text())
        found[0].write_text(text)
    shim = folder / "libfgpu.so"
    shutil.copy(REPOSITORY / "build/shim/libfgpu.so", shim)
    with loaded(folder, sources, shim) as kernel:
        yield kernel


class Listener(threading.Thread):
    """A thread that reads a ring during the block, or only at its end."""

    def __init__(self, events, listens: bool) -> None:
        super().__init__()
        self._events, self._listens, self._over = events, listens, threading.Event()
        self.told = 0

    def run(self) -> None:
        while self._listens and not self._over.is_set():
            self.told += sum(1 for _ in self._events.read())

    def __enter__(self) -> Listener:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        self.told += sum(1 for _ in self._events.read())


@pytest.mark.parametrize("is_read", [True, False], ids=["read during the flood", "read at the end"])
def test_reported_and_lost_events_of_a_flood_add_up(kernel, events, level, attack, scale, is_read):
    """A thread reads the ring during the flood, or only at its end."""
    each = scale(20_000, 100_000, 1_000_000) // ROUNDS
    list(events.read())
    before = fates(kernel)
    with Listener(events, is_read) as listener:
        for _ in range(ROUNDS):
            assert attack(level, "flood", each) == each
    sent, _, full = (now - was for now, was in zip(fates(kernel), before, strict=True))
    assert listener.told == sent
    assert (sent > 3 * PAGE_EVENTS) == is_read
    assert full > 0
    assert ROUNDS * each <= sent + full < ROUNDS * (each + 100), "too many events"
    assert level.usage().refused == ROUNDS * each


def leave(client: Client, orphans: int) -> None:
    """Start this many children, each of which allocates a MiB in a pool, without an entry, and exits."""
    for _ in range(orphans):
        client(f"fork() or (admit({MIB}, kind=1), os._exit(0))")


def test_orphans_without_room_are_charged_and_released_level_by_level(kernel, make_level, make_client):
    """Each level has its part of the map, and four levels have filled it.

    Orphans without an entry are only on the page.
    """
    orphans, levels = kernel.ledger.orphans, [make_level(64 * MIB) for _ in range(ENTRIES // PART + 1)]
    before = anomalies(kernel)["FULL"]
    for level in levels:
        leave(make_client(level), PART + 3)
    with_entries = [PART] * (ENTRIES // PART) + [0]
    assert [len(level.orphans()) for level in levels] == with_entries
    assert [page_of(kernel, level).orphans for level in levels] == with_entries
    assert [(level.used, level.orphaned) for level in levels] == [((PART + 3) * MIB,) * 2] * len(levels)
    assert anomalies(kernel)["FULL"] - before == (PART + 3) * len(levels) - ENTRIES
    for level, n in zip(levels, with_entries, strict=True):
        assert level.let_go() == n * MIB
        assert level.used == level.orphaned == (PART + 3 - n) * MIB
        assert orphans.disown(level.cgroup, 0, level.orphaned)
        assert (level.used, page_of(kernel, level).orphans) == (0, 0)


def test_a_released_orphan_makes_room_for_another(kernel, level: Level, client):
    leave(client, PART)
    (first, *_) = level.orphans()
    assert kernel.ledger.orphans.let_go(first, MIB)
    forget_empty(kernel)
    before = anomalies(kernel)["FULL"]
    leave(client, 1)
    assert (len(level.orphans()), anomalies(kernel)["FULL"]) == (PART, before)
    leave(client, 1)
    assert (len(level.orphans()), anomalies(kernel)["FULL"]) == (PART, before + 1)
    assert kernel.ledger.orphans.disown(level.cgroup, 0, MIB)


def test_entries_and_missing_entries_add_up(kernel, make_level, make_client):
    """Four levels have used their parts, so the map is full. All bytes that the driver returned are charged."""
    kernel.ledger.sweep()
    before, levels = anomalies(kernel)["FULL"], [make_level(MIB) for _ in range(ENTRIES // PART + 1)]
    clients = [make_client(level) for level in levels]
    for client in clients:
        client("cuda.allocate_many(u64(0x1000), u64(23))")
    assert [entries(kernel, level) for level in levels] == [PART, PART, PART, PART, 0]
    assert [level.used for level in levels] == [23] * len(levels)
    assert anomalies(kernel)["FULL"] - before == 23 * len(levels) - ENTRIES
    for client in clients:
        client("cuda.free_many(u64(0x1000), u64(23))")
    assert [entries(kernel, level) for level in levels] == [0] * len(levels)
    assert [level.used for level in levels] == [23 - PART] * 4 + [23], "the freed size is not known"
    for client in clients:
        client.kill()
    for level in levels:
        assert_left(level, level.used)


def test_a_child_in_its_parent_s_memory_without_room_is_not_admitted_and_is_named(kernel, level, client, events, start):
    """Only managed memory is in no row of NVML, so the probes must report the call."""
    client(f"alloc(0x1000, {MIB})")
    first, second = start(client, CLONE_VM), start(client, CLONE_VM)
    first.order("a")
    wait_until(lambda: level.used == 5 * MIB)
    list(events.read())
    before = anomalies(kernel)
    second.order("a")
    wait_until(lambda: anomalies(kernel)["BYPASS"] > before["BYPASS"])
    after = anomalies(kernel)
    assert (level.used, after["FULL"] - before["FULL"]) == (5 * MIB, 1)
    assert [(e.tgid, e.cgroup) for e in events.read() if e.kind == News.BYPASS] == [(second.pid, level.cgroup)]
    for child in (first, second):
        child.order("x")
        reap(client, child)
    assert borrowers(kernel) == {}


def test_a_crowd_that_announces_itself_ends_no_announcement_of_a_neighbour(make_level, make_client, tmp_path) -> None:
    node = tmp_path / "node"
    tmp_path.chmod(0o755)
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(195, 7))
    one, other = make_level(None), make_level(None)
    for level in (one, other):
        level.limit(MIB, LimitFlag.DENY)
    client, crowd = make_client(one), make_client(other)
    assert client("announce()") is None
    assert crowd(f"announce_many({4 * ENTRIES})") is None
    assert client(f"error_of_open({str(node)!r})") == errno.ENXIO  # not refused: no driver is behind the node
    crowd.kill()
    assert client(f"error_of_open({str(node)!r})") == errno.ENXIO
