"""Maps that all tenants share: each level has a part, and a full part uses no entry of the neighbours."""

from __future__ import annotations

import gc
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.driver import cuda_mappings
from fgpu_ebpf.linux import bpf
from tests.bpf.conftest import (
    MIB,
    REPOSITORY,
    Client,
    Kernel,
    Level,
    anomalies,
    assert_left,
    entries,
    leave_levels,
    loaded,
    page_of,
    pins_of,
    wait_until,
)
from tests.bpf.events_kit import of

Shared = abi.Shared
REFUSED, ADMITTED = 0, 1
OLDER = 262144
PART = (1048576 if bpf.kernel_release() >= (6, 1) else OLDER) // 4
PARTS = {Shared.THREADS: 65536 // 4, Shared.PROCESSES: 16384 // 4}
MORE = 101  # threads or processes beyond a level's part


@pytest.fixture(autouse=True)
def swept(kernel: Kernel) -> Iterator[None]:
    """Remove entries of exited processes, as an agent does twice a second, so that the next crowd has room."""
    yield
    kernel.ledger.sweep()


@pytest.fixture
def crowd(kernel: Kernel, make_level: Callable[..., Level], make_client: Callable[..., Client]) -> Client:
    """Return a client whose level would fill the whole map."""
    client = make_client(make_level(1024 * MIB))
    client(f"cuda.allocate_many(u64(0x1000), u64({4 * PART + 1009}))")
    return client


def test_a_process_with_too_many_allocations_is_refused_and_counted_by_reason(kernel, crowd):
    level = next(cgroup for cgroup in kernel.ledger.process(crowd.pid).levels)
    assert crowd("admit(1)") == REFUSED
    assert crowd("admit(1, kind=1)") == ADMITTED, "pool bytes have no entry"
    counted = {c.reason: n for c, n in kernel.ledger.counters().items() if c.cgroup == level}
    assert counted == {abi.Reason.ENTRIES: 1}
    crowd("cuda.free_many(u64(0x1000), u64(1))")
    assert crowd("admit(1)") == ADMITTED


def test_a_shorter_map_of_an_older_version_has_smaller_parts(kernel, tmp_path):
    """An upgrade keeps the pinned map."""
    shim, maps = tmp_path / "libfgpu.so", pins_of(tmp_path) / "maps"
    shutil.copy(kernel.shim, shim)
    maps.mkdir(parents=True)
    pinned = bpf.pinned(kernel.pins / "maps/allocations")
    older = bpf.create("allocations", bpf.form(pinned)._replace(max_entries=OLDER))
    bpf.pin(older, maps / "allocations")
    for fd in (pinned, older):
        os.close(fd)
    with loaded(tmp_path, REPOSITORY / "bpf", shim) as upgraded:
        level = Level(upgraded, 1024 * MIB)
        client = Client(upgraded, level)
        try:
            client(f"cuda.allocate_many(u64(0x1000), u64({OLDER // 4 + 101}))")
            assert entries(upgraded, level) == OLDER // 4
            assert client("admit(1)") == REFUSED
            assert page_of(upgraded, level).crowded == 1
        finally:
            client.kill()
            level.remove()


def test_the_ledger_counts_the_frees_of_a_crowd_s_neighbour(kernel, crowd, level, client):
    before = anomalies(kernel)["FULL"]
    for _ in range(11):
        assert client(f"admit({512 * MIB})") == ADMITTED
        client(f"alloc(0x1000, {512 * MIB})")
        client("free(0x1000)")
    assert (level.used, entries(kernel, level)) == (0, 0)
    assert anomalies(kernel)["FULL"] == before


@pytest.mark.usefixtures("context_bytes")
def test_entries_are_counted_through_frees_failures_and_reuse(kernel, level, client):
    client("alloc(0x1000, 1)")
    client("alloc(0x1000, 2)")  # the end of the first allocation was not recorded
    client("alloc(0x2000, 1, code=2)")
    assert entries(kernel, level) == 1
    client("free(0x1000, code=1)")
    assert entries(kernel, level) == 1
    client("free(0x1000)")
    client("free(0x1000)")
    assert entries(kernel, level) == 0
    client("retain()")
    client("retain()")
    client("context(0xabc)")
    client(f"create(7, {MIB})")
    client(f"map_(0x100000, {MIB}, 7)")
    assert entries(kernel, level) == 4
    client("release(7)")
    assert entries(kernel, level) == 4
    client(f"unmap(0x100000, {MIB})")
    client("destroy(0xabc)")
    assert entries(kernel, level) == 1


def test_entries_count_for_the_level_in_which_they_were_created(kernel, level, make_level, client):
    other = make_level(1024 * MIB)
    client("alloc(0x1000, 1)")
    assert kernel.ledger.move(client.pid, client.entry(kernel).generation, (other.cgroup,))
    client("alloc(0x2000, 1)")
    assert (entries(kernel, level), entries(kernel, other)) == (1, 1)
    client("free(0x1000)")
    assert (entries(kernel, level), entries(kernel, other)) == (0, 1)
    client("free(0x2000)")
    assert entries(kernel, other) == 0


def test_entries_of_ended_processes_count_until_they_are_swept(kernel, level, client):
    client("cuda.allocate_many(u64(0x1000), u64(101))")
    client.kill()
    assert_left(level, 101)
    assert entries(kernel, level) == 101
    assert kernel.ledger.sweep() >= 101
    assert entries(kernel, level) == 0


def test_a_sweep_holds_only_a_part_of_all_entries_in_memory(kernel, level, client):
    client("cuda.allocate_many(u64(0x1000), u64(20000))")
    tracemalloc.start()
    try:
        kernel.ledger.sweep()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert entries(kernel, level) == 20000
    assert most <= MIB, "all entries at once need about 200 bytes each"


def test_reads_of_the_ledger_leave_no_cyclic_garbage(kernel, level, client):
    """Memory that only the cycle collector frees would stay for hours."""
    client("alloc(0x1000, 1)")

    def look() -> None:
        kernel.ledger.usage(level.cgroup)
        kernel.ledger.sweep()
        kernel.ledger.counters()
        cuda_mappings.fgpu_mappings(client.pid)

    look()
    gc.collect()
    look()
    assert gc.collect() == 0


# -- threads and processes


@pytest.fixture(params=PARTS, ids=lambda shared: shared.name.lower())
def shared(request: pytest.FixtureRequest) -> abi.Shared:
    return request.param


def reasons(kernel: Kernel, level: Level) -> dict[tuple[int, int], int]:
    return {(c.kind, c.reason): n for c, n in kernel.ledger.counters().items() if c.cgroup == level.cgroup}


@pytest.fixture
def gathered(level: Level, client: Client, shared: abi.Shared) -> Client:
    """Return a client that has started more threads or processes than its level may have entries.

    The client's first thread, or its process, has no entry.
    """
    client(f"cuda.gather(u64({PARTS[shared] + MORE}), {int(shared == Shared.PROCESSES)})")
    return client


def test_a_process_beyond_the_bound_is_refused_and_counted_by_reason(kernel, gathered, level, shared):
    assert entries(kernel, level, shared) == PARTS[shared]
    assert gathered(f"admit({MIB})") == REFUSED
    assert gathered(f"admit({MIB}, kind=1)") == REFUSED, "pool bytes are refused too: the process has no entry"
    assert reasons(kernel, level) == {(kind, abi.Reason.ENTRIES): 1 for kind in (0, 1)}
    assert (level.used, level.usage().refused) == (0, 2)
    assert gathered(f"admit({MIB}, device=17)") == REFUSED
    assert len(reasons(kernel, level)) == 2, "a refusal on an unknown device is not counted"


def test_a_crowd_does_not_affect_its_neighbour(kernel, gathered, make_level, make_client, shared):
    before = anomalies(kernel)["FULL"]
    other = make_level(1024 * MIB)
    neighbour = make_client(other)
    for _ in range(11):
        assert neighbour(f"admit({512 * MIB})") == ADMITTED
        neighbour(f"alloc(0x1000, {512 * MIB})")
        neighbour("free(0x1000)")
    assert (other.used, entries(kernel, other, shared)) == (0, 1)
    assert anomalies(kernel)["FULL"] == before


def test_a_crowd_under_observing_levels_is_admitted(gathered, level):
    level.limit(MIB, abi.LimitFlag.OBSERVE)
    assert gathered(f"admit({2 * MIB})") == ADMITTED


def test_a_crowd_of_an_observing_level_within_a_limit_is_refused(kernel, make_level, make_client):
    group = make_level(1024 * MIB)
    leaf = make_level(None, group)
    leaf.limit(1024 * MIB, abi.LimitFlag.OBSERVE)
    one = make_client(leaf)
    one(f"cuda.gather(u64({PARTS[Shared.PROCESSES]}), 1)")
    assert one(f"admit({MIB})") == REFUSED


def test_memory_of_a_surplus_process_is_charged_when_nvml_reports_it(kernel, gathered, level, shared):
    before = anomalies(kernel)["FULL"]
    gathered(f"alloc(0x1000, {4 * MIB})")
    assert (level.used, anomalies(kernel)["FULL"]) == (0, before + 1)
    if gathered.entry(kernel) is None:
        assert kernel.ledger.move(gathered.pid, 0, (level.cgroup,)), "the agent may add entries beyond the level's part"
        assert entries(kernel, level, shared) == PARTS[shared] + 1
    process = gathered.entry(kernel)
    assert kernel.ledger.overhead(gathered.pid, process.generation, 0, 4 * MIB, process.changes)
    assert level.used == 4 * MIB


def test_a_call_of_a_surplus_process_that_takes_memory_is_a_bypass(kernel, events, gathered, level):
    before = anomalies(kernel)["BYPASS"]
    gathered(f"alloc(0x1000, {4 * MIB}, code=1)")
    gathered("free(0x1000)")
    assert (anomalies(kernel)["BYPASS"], of(events, level, abi.News.BYPASS)) == (before, [])
    gathered(f"create(7, {4 * MIB})")
    (event,) = of(events, level, abi.News.BYPASS)
    assert (event.tgid, event.operation, anomalies(kernel)["BYPASS"]) == (gathered.pid, abi.Kind.VMM, before + 1)
    process = gathered.entry(kernel)
    assert process is None or process.flags & abi.Seen.BYPASS
    level.limit(MIB, abi.LimitFlag.OBSERVE)
    gathered(f"create(8, {4 * MIB})")
    assert anomalies(kernel)["BYPASS"] == before + 1, "the request of such a call is admitted"


def test_a_process_is_admitted_after_its_surplus_threads_have_exited(kernel, level, client):
    client(f"cuda.gather(u64({PARTS[Shared.THREADS] + MORE}), 0)")
    assert client(f"admit({MIB})") == REFUSED
    client("cuda.disperse()")
    wait_until(lambda: entries(kernel, level, Shared.THREADS) == 0)
    assert client(f"admit({MIB})") == ADMITTED
    assert entries(kernel, level, Shared.THREADS) == entries(kernel, level, Shared.PROCESSES) == 1


def test_a_crowd_that_is_killed_leaves_room(kernel, gathered, level, make_client, shared):
    gathered.kill()
    wait_until(lambda: entries(kernel, level, shared) == 0)
    assert make_client(level)(f"admit({MIB})") == ADMITTED


def test_threads_and_processes_count_for_the_level_in_which_they_first_called(kernel, level, make_level, client):
    other = make_level(1024 * MIB)
    client("cuda.gather(u64(23), 0)")
    client("import os")
    assert kernel.ledger.move(client.pid, client.entry(kernel).generation, (other.cgroup,))
    client(f"admit({MIB})")
    for shared, n in ((Shared.THREADS, 24), (Shared.PROCESSES, 1)):
        # the kernel counts the last thread at its first call, perhaps after the first thread has seen all of them
        wait_until(lambda shared=shared, n=n: entries(kernel, level, shared) == n)
        assert entries(kernel, other, shared) == 0
    client("cuda.disperse()")
    # a join may return before the kernel records the thread's end
    wait_until(lambda: entries(kernel, level, Shared.THREADS) == 1)
    client.send("os.execv('/bin/sleep', ['sleep', '100'])")
    wait_until(lambda: entries(kernel, level, Shared.PROCESSES) == entries(kernel, level, Shared.THREADS) == 0)


def test_a_process_that_leaves_its_cgroups_is_counted_again_when_it_returns(kernel, level, client):
    client("cuda.gather(u64(23), 0)")
    client(f"admit({MIB})")
    leave_levels(kernel, client)
    counted = [entries(kernel, level, shared) for shared in Shared]
    assert (client.entry(kernel), level.used, counted) == (None, 0, [0, 0, 0])
    client(f"admit({4 * MIB})")
    assert (level.used, [entries(kernel, level, shared) for shared in Shared]) == (4 * MIB, [0, 1, 1])
    client("cuda.disperse()")
    # no other entry was counted
    wait_until(lambda: [entries(kernel, level, shared) for shared in Shared] == [0, 1, 1])
    client(f"alloc(0x1000, {4 * MIB})")
    client.kill()
    wait_until(lambda: [entries(kernel, level, shared) for shared in Shared] == [1, 0, 0])  # until the agent sweeps


def test_the_end_of_a_call_counts_for_the_process_that_began_it(kernel, level, client, tmp_path):
    before = anomalies(kernel)["RELEASE"]
    begun, over = tmp_path / "begun", tmp_path / "over"
    client(f"linger({str(begun)!r}, {str(over)!r})")
    client.send(f"alloc(0x1000, {4 * MIB})")
    wait_until(lambda: level.used == 4 * MIB)
    leave_levels(kernel, client)
    assert kernel.ledger.move(client.pid, 0, (level.cgroup,))
    over.touch()
    assert client.process.stdout.readline() == "0\n"
    assert level.used == 0, "the agent charges this memory when NVML shows it"
    client("free(0x1000)")
    assert (level.used, client.entry(kernel).late, anomalies(kernel)["RELEASE"]) == (0, False, before)
    client(f"alloc(0x1000, {6 * MIB})")
    assert level.used == 6 * MIB


# -- several levels of one owner


@pytest.fixture
def owned(kernel: Kernel) -> Callable[..., None]:
    """Return owned(owner, levels, most).

    It binds these levels to this owner, with at most this many entries of each kind.
    """

    def own(owner: Level, levels: list[Level], most: int = 1 << 30) -> None:
        for level in levels:
            kernel.ledger.owners.attach(level.cgroup, owner.cgroup, (most,) * 4, ())

    return own


def share_of(kernel: Kernel, owner: Level, shared: abi.Shared) -> int:
    share = kernel.ledger.owners.share(owner.cgroup)
    assert share
    return share.entries[shared]


@pytest.mark.parametrize("nested", [False, True], ids=["siblings", "nested"])
def test_levels_of_one_owner_share_one_part(kernel, make_level, make_client, owned, shared, nested):
    """Four levels together have as many entries as the owner may have, with or without a level around them."""
    owner = make_level(1024 * MIB)
    levels = [make_level(1024 * MIB, owner if nested else None) for _ in range(4)]
    each = PARTS[shared] // 4 - 50
    owned(owner, [owner, *levels], 3 * each)
    clients = [make_client(level) for level in levels]
    for client in clients:
        client(f"cuda.gather(u64({each + 23}), {int(shared == Shared.PROCESSES)})")
    found = [entries(kernel, level, shared) for level in levels]
    assert sum(found) == share_of(kernel, owner, shared) == 3 * each
    assert clients[3](f"admit({MIB})") == REFUSED
    assert reasons(kernel, levels[3]) == {(0, abi.Reason.ENTRIES): 1}
    assert make_client(make_level(1024 * MIB))(f"admit({MIB})") == ADMITTED, "another owner has room"
    for client in clients:
        client.kill()
    wait_until(lambda: share_of(kernel, owner, shared) == 0)
    assert make_client(levels[3])(f"admit({MIB})") == ADMITTED
    assert kernel.ledger.owners.claimed()[shared] >= 1


@pytest.mark.parametrize("shared", [Shared.ALLOCATIONS, Shared.PROCESSES], ids=["allocations", "processes"])
def test_owners_leave_room_for_owners_with_few_entries(kernel, make_level, make_client, owned, shared):
    """Owners that may use the whole map leave an eighth of it to owners with few entries."""
    part = PARTS.get(shared, PART)
    owners = [make_level(1024 * MIB) for _ in range(5)]
    for owner in owners:
        owned(owner, [owner])
    clients = [make_client(owner) for owner in owners]
    most = 4 * part
    before = kernel.ledger.owners.claimed()[shared]

    def take(client: Client, n: int) -> None:
        if shared is Shared.PROCESSES:
            client(f"cuda.gather(u64({n}), 1)")
        else:
            client(f"cuda.allocate_many(u64(0x1000), u64({n}))")

    for client in clients[:4]:
        take(client, part + 23)
    claimed = kernel.ledger.owners.claimed()[shared]
    assert most - most // 8 - most // 1024 < claimed <= most - most // 8 + 4 * most // 1024
    assert sum(share_of(kernel, owner, shared) for owner in owners) <= claimed - before + 5 * (most // 1024)
    assert clients[3](f"admit({MIB})") == REFUSED
    take(clients[4], most // 1024 - 2)
    assert clients[4](f"admit({MIB})") == ADMITTED
    for client in clients:
        client.kill()
    kernel.ledger.sweep()
    wait_until(lambda: not any(share_of(kernel, owner, shared) for owner in owners))
    kernel.ledger.owners.trim()
    assert kernel.ledger.owners.claimed()[shared] <= before


def test_allocations_of_removed_levels_count_for_their_owner_until_swept(kernel, make_level, make_client, owned):
    owner, level = make_level(1024 * MIB), make_level(1024 * MIB)
    owned(owner, [owner, level])
    client = make_client(level)
    client("cuda.allocate_many(u64(0x1000), u64(1009))")
    assert share_of(kernel, owner, Shared.ALLOCATIONS) == 1009
    client("cuda.free_many(u64(0x1000), u64(9))")
    assert share_of(kernel, owner, Shared.ALLOCATIONS) == 1000
    client.kill()
    level.remove()
    assert share_of(kernel, owner, Shared.ALLOCATIONS) == 1000
    kernel.ledger.sweep()
    assert share_of(kernel, owner, Shared.ALLOCATIONS) == 0


def test_a_slot_without_entries_is_given_to_another_owner(kernel, make_level, make_client, owned, monkeypatch):
    one, two = make_level(1024 * MIB), make_level(1024 * MIB)
    owned(one, [one])
    client = make_client(one)
    client("alloc(0x1000, 1)")
    table = kernel.ledger.owners
    others = [cgroup for cgroup in table._look() if cgroup != one.cgroup]
    monkeypatch.setattr(table, "_free", [])
    with pytest.raises(OSError, match="bounds"):
        table.attach(two.cgroup, two.cgroup, (1,) * 4, others)
    client.kill()
    assert_left(one, 1)
    kernel.ledger.sweep()
    assert not any(table.share(one.cgroup).entries)
    table.attach(two.cgroup, two.cgroup, (1,) * 4, others)
    assert table.share(two.cgroup)
