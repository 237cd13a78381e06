"""Memory that outlives its process, or that another process may have open, is charged until the agent releases it."""

from __future__ import annotations

import time

import pytest

from fgpu_ebpf import abi
from tests.bpf.conftest import (
    CONTEXT,
    MIB,
    Kernel,
    Level,
    assert_corrected,
    assert_left,
    forget_empty,
    page_of,
    wait_until,
)
from tests.bpf.events_kit import of

News = abi.News
POOL = int(abi.Kind.POOL)


# -- the end of a process


@pytest.mark.usefixtures("context_bytes")
def test_an_orphan_records_its_process_and_the_time_of_its_end(kernel, level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    client(f"managed(0x2000, {6 * MIB})")
    client(f"create(7, {8 * MIB})")
    client("retain()")
    client(f"admit({10 * MIB}, kind={POOL})")
    generation, before = client.entry(kernel).generation, time.monotonic_ns()
    held = level.used
    assert held == 28 * MIB + CONTEXT
    client.kill()
    (orphan,) = level.orphans()
    assert (orphan.tgid, orphan.device, orphan.generation, orphan.turn) == (client.pid, 0, generation, 0)
    assert (orphan.bytes, orphan.levels) == (held, (level.cgroup,))
    assert before < orphan.since_ns <= orphan.ended_ns < time.monotonic_ns()
    assert before < page_of(kernel, level).orphaned_ns[0] < time.monotonic_ns()
    assert_left(level, held)


def test_the_charge_is_never_lower_while_a_process_ends(level, client):
    client(f"alloc(0x1000, {700 * MIB})")
    client.process.kill()
    least = level.used
    while client.process.poll() is None:
        least = min(least, level.used)
    assert least == level.used == 700 * MIB


def test_managed_memory_that_ends_with_its_process_is_counted_as_freed(kernel, client):
    before = kernel.ledger.orphans.managed_freed(0)
    client(f"managed(0x1000, {6 * MIB})")
    client(f"managed(0x2000, {5 * MIB})")
    client(f"alloc(0x3000, {4 * MIB})")
    client("free(0x1000, code=1)")
    assert kernel.ledger.orphans.managed_freed(0) == before
    client("free(0x1000)")
    assert kernel.ledger.orphans.managed_freed(0) == before + 6 * MIB
    client.kill()
    assert kernel.ledger.orphans.managed_freed(0) == before + 11 * MIB


def test_only_the_first_of_several_orphans_is_reported(events, level, client, make_client):
    """The agent scans repeatedly as long as there are new orphans."""
    other = make_client(level)
    for each in (client, other):
        each(f"alloc(0x1000, {8 * MIB})")
    for each in (client, other):
        each.kill()
    told = of(events, level, News.ORPHANED)
    assert 1 <= len(told) <= 2, "a second report is possible if the second process exits more than 2 ms later"
    assert (told[0].bytes, told[0].device) == (8 * MIB, 0)


def test_an_orphan_of_a_running_process_is_reported(events, level, client):
    client(f"alloc(0x1000, {8 * MIB})")
    client("export_pointer(0x1000)")
    client("free(0x1000)")
    assert [event.bytes for event in of(events, level, News.ORPHANED)] == [8 * MIB]


def test_orphans_are_charged_at_every_level(make_level, make_client):
    group = make_level(1024 * MIB)
    leaf = make_level(512 * MIB, group)
    client = make_client(leaf)
    client(f"alloc(0x1000, {8 * MIB})")
    client.kill()
    (orphan,) = leaf.orphans()
    assert orphan.levels == (leaf.cgroup, group.cgroup)
    assert [(each.used, each.orphaned) for each in (leaf, group)] == [(8 * MIB, 8 * MIB)] * 2
    assert leaf.let_go() == 8 * MIB
    assert [(each.used, each.orphaned) for each in (leaf, group)] == [(0, 0)] * 2


def test_a_process_that_executes_another_program_leaves_an_orphan_and_starts_again(kernel, level, client):
    client(f"alloc(0x1000, {8 * MIB})")
    first = client.entry(kernel).generation
    client.send("os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])")
    client.begin(level.cgroup)
    client(f"alloc(0x2000, {2 * MIB})")
    second = client.entry(kernel).generation
    client("free(0x1000)")
    assert (level.used, level.orphaned) == (10 * MIB, 8 * MIB), "the pointer belonged to the previous program"
    client.kill()
    found = [(orphan.tgid, orphan.generation, orphan.bytes) for orphan in level.orphans()]
    assert found == [(client.pid, first, 8 * MIB), (client.pid, second, 2 * MIB)]


# -- the release of orphans


def test_an_orphan_is_released_in_parts_and_never_beyond_its_size(kernel, level, client):
    client(f"alloc(0x1000, {8 * MIB})")
    client.kill()
    (orphan,) = level.orphans()
    assert kernel.ledger.orphans.let_go(orphan, 0)
    for left in (5 * MIB, 4 * MIB):
        assert kernel.ledger.orphans.let_go(orphan, level.orphans()[0].bytes - left)
        assert (level.used, level.orphaned, level.orphans()[0].bytes) == (left, left, left)
    assert page_of(kernel, level).orphans == 1
    assert kernel.ledger.orphans.let_go(orphan, 99 * MIB)
    assert (level.used, level.orphaned, level.orphans()) == (0, 0, [])
    assert page_of(kernel, level).orphans == 1, "the entry stays while its process may add to it"
    forget_empty(kernel)
    assert page_of(kernel, level).orphans == 0
    assert not kernel.ledger.orphans.let_go(orphan, 1), "the entry was removed"


def test_released_memory_can_be_allocated_by_other_processes(kernel, make_level, make_client):
    level = make_level(100 * MIB)
    one, other = make_client(level), make_client(level)
    one(f"alloc(0x1000, {80 * MIB})")
    one.kill()
    assert other(f"admit({21 * MIB})") == abi.Verdict.REFUSED
    assert kernel.ledger.orphans.let_go(level.orphans()[0], 30 * MIB)
    assert other(f"admit({51 * MIB})") == abi.Verdict.REFUSED
    assert other(f"admit({50 * MIB})") == abi.Verdict.ADMITTED


def test_no_orphan_is_released_from_a_recreated_level(kernel, make_level, make_client):
    """The new level has the cgroup of the removed level. The charges of the former page ended with that page."""
    level, newcomer = make_level(1024 * MIB), make_level(1024 * MIB)
    one = make_client(level)
    one(f"alloc(0x1000, {8 * MIB})")
    one.kill()
    (orphan,) = level.orphans()
    kernel.ledger.remove([level.cgroup])
    level.limit(1024 * MIB)
    make_client(level)(f"alloc(0x1000, {3 * MIB})")
    make_client(newcomer)(f"alloc(0x1000, {5 * MIB})")
    assert kernel.ledger.orphans.let_go(orphan, 8 * MIB)
    assert (level.used, level.orphaned, newcomer.used) == (3 * MIB, 0, 5 * MIB)


def test_bytes_without_an_entry_are_released_and_never_more_than_charged(kernel, level, client):
    client(f"alloc(0x1000, {8 * MIB})")
    client.kill()
    assert not kernel.ledger.orphans.disown(level.cgroup, 0, 9 * MIB)
    assert kernel.ledger.orphans.disown(level.cgroup, 0, 3 * MIB)
    assert (level.used, level.orphaned) == (5 * MIB, 5 * MIB)
    assert kernel.ledger.orphans.of_level(level.cgroup)[0] == 5 * MIB
    level.let_go()
    assert (level.used, level.orphaned) == (0, 0), "the entry has more bytes than the level"


def test_the_time_of_a_comparison_is_written_to_the_page(kernel, level):
    kernel.ledger.orphans.looked(level.cgroup, 2, 77)
    assert list(page_of(kernel, level).looked_ns[:3]) == [0, 0, 77]


# -- memory that other processes may have open


@pytest.mark.parametrize("how", ["exit", "release(0x77)"])
def test_an_exported_handle_stays_charged_to_the_level(kernel, level, client, how):
    client(f"create(0x77, {8 * MIB})")
    client(f"create(0x78, {16 * MIB})")
    client("export(0x77)")
    client("export(0x77)")
    client.kill() if how == "exit" else client(how)
    (orphan,) = level.orphans()
    assert bool(orphan.ended_ns) == (how == "exit")
    assert (level.used, level.orphaned) == (24 * MIB, 24 * MIB if how == "exit" else 8 * MIB)
    level.let_go()
    assert (level.used, level.orphaned) == (0 if how == "exit" else 16 * MIB, 0)


def test_exported_memory_and_the_other_memory_of_a_process_are_one_orphan(kernel, level, client):
    for handle, bytes_ in ((0x77, 8 * MIB), (0x78, 16 * MIB), (0x79, 32 * MIB)):
        client(f"create({handle}, {bytes_})")
        client(f"export({handle})")
    client("release(0x77)")
    (first,) = level.orphans()
    client("release(0x78)")
    (orphan,) = level.orphans()
    assert (orphan.bytes, orphan.since_ns, orphan.ended_ns) == (24 * MIB, first.since_ns, 0)
    client.kill()
    (orphan,) = level.orphans()
    assert (orphan.bytes, orphan.since_ns) == (56 * MIB, first.since_ns)
    assert orphan.ended_ns
    assert_left(level, 56 * MIB)


def test_the_age_of_an_orphan_starts_again_after_all_its_bytes_were_released(kernel, level, client):
    for handle in (0x77, 0x78):
        before = time.monotonic_ns()
        client(f"create({handle}, {8 * MIB})")
        client(f"export({handle})")
        client(f"release({handle})")
        (orphan,) = level.orphans()
        assert (orphan.bytes, orphan.since_ns > before) == (8 * MIB, True)
        level.let_go()
    assert page_of(kernel, level).orphans == 1, "the entry of a live process stays"


def test_an_exported_handle_is_orphaned_with_its_last_mapping(level, client):
    client(f"create(0x77, {8 * MIB})")
    client("export(0x77)")
    client(f"map_(0x10000000, {8 * MIB}, 0x77)")
    client("release(0x77)")
    assert level.orphaned == 0
    client(f"unmap(0x10000000, {8 * MIB})")
    assert_left(level, 8 * MIB)


def test_a_handle_that_may_be_mapped_into_a_sparse_array_stays_charged_to_the_level(level, client):
    client(f"create(0x77, {8 * MIB})")
    client("map_array()")
    client("release(0x77)")
    assert_left(level, 8 * MIB)


@pytest.mark.usefixtures("context_bytes")
@pytest.mark.parametrize("export", ["export_pointer(0x1000)", "export_range(0x1000)"])
@pytest.mark.parametrize("how", ["exit", "free(0x1000)", "primary_release()"])
def test_an_exported_pointer_stays_charged_to_the_level(level, client, export, how):
    client("retain()")
    client(f"alloc(0x1000, {8 * MIB})")
    client(f"alloc(0x2000, {16 * MIB})")
    client(export)
    held = level.used
    client.kill() if how == "exit" else client(how)
    used = {"exit": held, "free(0x1000)": held, "primary_release()": 8 * MIB}[how]
    orphaned = held if how == "exit" else 8 * MIB
    assert (level.used, level.orphaned) == (used, orphaned)
    assert level.let_go() == orphaned
    assert level.used == used - orphaned


@pytest.mark.parametrize("export", ["export_pointer", "export_range"])
def test_a_failed_export_does_not_count(level, client, export):
    client(f"alloc(0x1000, {8 * MIB})")
    client(f"{export}(0x1000, code=1)")
    client("free(0x1000)")
    assert (level.used, level.orphaned) == (0, 0)


@pytest.mark.parametrize("export", ["export_pointer", "export_range"])
def test_nothing_is_released_after_an_export_without_an_entry(level, client, export):
    client(f"alloc(0x1000, {8 * MIB})")
    client(f"{export}(0x1200)")
    client("free(0x1000)")
    assert_left(level, 8 * MIB)


@pytest.mark.usefixtures("context_bytes")
def test_pool_bytes_are_orphaned_once_a_pool_is_exported(kernel, level, client):
    client("retain()")
    client(f"admit({32 * MIB}, kind={POOL})")
    client("export_pool(code=1)")
    client(f"give_back({8 * MIB})")
    assert (level.used - CONTEXT, level.orphaned) == (24 * MIB, 0)
    client("export_pool()")
    client(f"give_back({8 * MIB})")
    assert (level.used - CONTEXT, level.orphaned, client.entry(kernel).pool[0]) == (24 * MIB, 8 * MIB, 16 * MIB)
    client(f"give_back({99 * MIB})")
    client("primary_release()")
    assert_left(level, 24 * MIB)


@pytest.mark.parametrize(
    "opening", [f"map_(0x1000, {8 * MIB}, 7)", "export(7)", "retain_handle(7, 0x2000)", "export_range(0x5000)"]
)
def test_memory_that_is_freed_during_a_call_that_opens_it_stays_charged(level, client, opening):
    """The driver has opened the memory before the free. The kernel learns that at the return of the call."""
    end = begin_to_open(client, opening)
    client(f"meanwhile(lambda: aside({end}))")
    client(opening)
    assert (level.used, level.orphaned) == (8 * MIB, 8 * MIB)


@pytest.mark.parametrize(
    "opening", [f"map_, 0x1000, {8 * MIB}, 7", "export, 7", "retain_handle, 7, 0x2000", "export_range, 0x5000"]
)
def test_memory_that_is_opened_during_its_free_stays_charged(level, client, opening):
    """The driver has opened the memory before the free, which had begun before."""
    call, *arguments = begin_to_open(client, opening).split(", ")
    client(f"meanwhile(lambda: aside({opening}))")
    client(f"{call}({', '.join(arguments)})")
    assert level.used == 8 * MIB


@pytest.mark.parametrize("code", [0, 1])
def test_memory_is_freed_at_once_after_calls_that_open_other_memory_are_over(level, client, code):
    client(f"create(8, {MIB})")
    client(f"map_(0x9000, {MIB}, 8, code={code})")
    client("retain_handle(8, 0x9000)")
    client("export(8, code=1)")
    client(f"create(7, {8 * MIB})")
    client(f"alloc(0x5000, {8 * MIB})")
    client("release(7)")
    client("free(0x5000)")
    assert (level.used, level.orphaned) == (MIB, 0)


def begin_to_open(client, opening):
    """Allocate memory, and return the call that frees it while `opening` opens it."""
    if "range" in opening:
        client(f"alloc(0x5000, {8 * MIB})")
        return "free, 0x5000"
    client(f"create(7, {8 * MIB})")
    if "retain" not in opening:
        return "release, 7"
    client(f"map_(0x2000, {8 * MIB}, 7)")
    client("release(7)")
    return f"unmap, 0x2000, {8 * MIB}"


def test_an_import_is_recorded(kernel, level, client):
    client("import_(9, code=1)")
    assert not client.entry(kernel).flags & abi.Seen.IMPORT
    client("import_(9)")
    assert client.entry(kernel).flags & abi.Seen.IMPORT
    assert level.used == 0, "the exporter is charged"


# -- the end of a context


@pytest.mark.usefixtures("context_bytes")
def test_the_last_context_releases_plain_and_managed_memory_and_keeps_handles_and_pools(kernel, level, client):
    freed = kernel.ledger.orphans.managed_freed(0)
    client("retain()")
    client(f"alloc(0x1000, {2 * MIB})")
    client(f"alloc(0x2000, {3 * MIB})")
    client("export_pointer(0x2000)")
    client(f"managed(0x3000, {4 * MIB})")
    client(f"create(7, {5 * MIB})")
    client(f"create(8, {6 * MIB})")
    client("export(8)")
    client(f"admit({7 * MIB}, kind={POOL})")
    client("primary_release()")
    entry = client.entry(kernel)
    assert (entry.bytes[0], entry.pool[0], entry.managed[0], entry.overhead[0]) == (18 * MIB, 7 * MIB, 0, 0)
    assert (level.used, level.orphaned) == (21 * MIB, 3 * MIB), "exported memory stays charged"
    assert kernel.ledger.orphans.managed_freed(0) == freed + 4 * MIB
    client("free(0x1000)")
    client("free(0x3000)")
    assert level.used == 21 * MIB, "these allocations were freed with the context"
    client("release(7)")
    client("release(8)")
    client(f"give_back({7 * MIB})")
    assert (level.used, level.orphaned) == (16 * MIB, 16 * MIB), "without a context, no row shows whether pools shrank"


@pytest.mark.usefixtures("context_bytes")
def test_the_last_context_does_not_release_memory_that_only_nvml_has_shown(kernel, level, client):
    """It may be a pool of the process, which outlives contexts: then no row of NVML shows it any more."""
    client("retain()")
    assert_corrected(kernel, client, CONTEXT + 8 * MIB)
    client("primary_reset()")
    assert (level.used, level.orphaned) == (8 * MIB, 8 * MIB)


@pytest.mark.usefixtures("context_bytes")
def test_pool_bytes_that_a_process_without_a_context_releases_are_orphaned(kernel, level, client):
    client("retain()")
    client(f"admit({8 * MIB}, kind={POOL})")
    client("primary_reset()")
    client(f"give_back({8 * MIB})")
    assert (level.used, level.orphaned, client.entry(kernel).pool[0]) == (8 * MIB, 8 * MIB, 0)


@pytest.mark.usefixtures("context_bytes")
def test_the_end_of_a_context_that_is_not_the_last_is_counted_for_the_agent(kernel, level, client):
    client("retain()")
    client("context(0xabc)")
    client(f"alloc(0x1000, {2 * MIB})")
    assert level.used == 2 * CONTEXT + 2 * MIB
    client("destroy(0xabc)")
    entry = client.entry(kernel)
    assert (entry.contexts[0], entry.ended[0], level.used) == (1, 1, CONTEXT + 2 * MIB)
    client("primary_release()")
    assert (client.entry(kernel).ended[0], level.used) == (1, 0)


# -- moves


def test_orphans_are_charged_at_the_levels_in_which_they_were_created(kernel, make_level, make_client):
    group = make_level(1024 * MIB)
    levels = [make_level(512 * MIB, group) for _ in range(2)]
    one = make_client(levels[0])
    for turn in range(4):
        leave_one(kernel, one, levels[turn % 2], group, turn)
    assert [(level.used, level.orphaned) for level in levels] == [(4 * MIB, 4 * MIB), (6 * MIB, 6 * MIB)]
    one.kill()
    found = sorted((orphan.turn, orphan.bytes, orphan.levels) for orphan in group.orphans())
    assert found == [(n, (n + 1) * MIB, (levels[n % 2].cgroup, group.cgroup)) for n in range(4)]
    for orphan in group.orphans():
        before = [level.used for level in levels]
        assert kernel.ledger.orphans.let_go(orphan, orphan.bytes)
        gone = [was - level.used for was, level in zip(before, levels, strict=True)]
        assert gone[orphan.turn % 2] == orphan.bytes == sum(gone)
    assert [level.used for level in (*levels, group)] == [0, 0, 0]


def leave_one(kernel: Kernel, one, level: Level, group: Level, turn: int) -> None:
    """Move the process to the level, and make it export and free MiBs: in each turn one more than before."""
    if turn:
        assert kernel.ledger.move(one.pid, one.entry(kernel).generation, (level.cgroup, group.cgroup))
    one(f"create({turn + 7}, {(turn + 1) * MIB})")
    one(f"export({turn + 7})")
    one(f"release({turn + 7})")


def test_a_process_that_moved_and_ends_leaves_one_orphan_at_its_levels(kernel, make_level, make_client):
    first, second = make_level(1024 * MIB), make_level(1024 * MIB)
    one = make_client(first)
    one(f"alloc(0x1000, {4 * MIB})")
    assert kernel.ledger.move(one.pid, one.entry(kernel).generation, (second.cgroup,))
    one.kill()
    assert (first.used, second.used) == (0, 4 * MIB)
    (orphan,) = second.orphans()
    assert (orphan.turn, orphan.levels) == (1, (second.cgroup,))
    assert_left(second, 4 * MIB)


def test_an_entry_without_a_reported_end_is_reaped_into_an_orphan(kernel, level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    assert kernel.ledger.reap(client.pid, client.entry(kernel).generation)
    wait_until(lambda: client.entry(kernel) is None)
    (orphan,) = level.orphans()
    assert orphan.ended_ns
    assert_left(level, 4 * MIB)
