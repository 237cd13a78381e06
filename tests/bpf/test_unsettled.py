"""Unsettled admissions, and calls whose end is not recorded, stay charged: the driver may have executed them."""

from __future__ import annotations

import pytest

from fgpu_ebpf import abi
from tests.bpf.conftest import CONTEXT, MIB, assert_corrected, assert_left, wait_until

REFUSED, ADMITTED = abi.Verdict.REFUSED, abi.Verdict.ADMITTED


def test_unused_admissions_in_a_loop_reach_the_limit(kernel, level, client):
    """The limit holds, because the memory may have been allocated where there is no probe."""
    asked = [client(f"admit({100 * MIB})") for _ in range(23)]
    assert asked == [ADMITTED] * 10 + [REFUSED] * 13
    assert (level.used, client.entry(kernel).overhead[0]) == (1000 * MIB, 1000 * MIB)
    assert client.entry(kernel).quiet
    assert_corrected(kernel, client, 0)
    assert client(f"admit({1024 * MIB})") == ADMITTED


def test_a_process_with_an_unused_earlier_admission_is_not_quiet(kernel, level, client):
    client(f"admit({4 * MIB})")
    client(f"admit({6 * MIB})")
    entry = client.entry(kernel)
    assert (entry.quiet, entry.bytes[0], entry.overhead[0]) == (False, 10 * MIB, 4 * MIB)


def test_admissions_of_ended_threads_stay_charged(kernel, level, client):
    for _ in range(7):
        client(f"cuda.thread_admits_and_ends(u64({4 * MIB}))")
    wait_until(lambda: client.entry(kernel).quiet)
    assert (level.used, client.entry(kernel).overhead[0]) == (28 * MIB, 28 * MIB)
    client.kill()
    assert_left(level, 28 * MIB)


@pytest.mark.parametrize("how", ["allocate_and_leap", "thread_ends_inside"])
@pytest.mark.parametrize(("managed", "corrected"), [(0, 0), (1, 6 * MIB)])
def test_memory_of_a_call_left_by_longjmp_or_by_a_thread_s_end_stays_charged(
    kernel, level, client, how, managed, corrected
):
    """NVML does not show managed memory, so only the end of the process proves that the memory is free."""
    client(f"cuda.{how}(u64({6 * MIB}), {managed})")
    client("free(0x9999)")  # another call
    wait_until(lambda: client.entry(kernel).quiet)
    entry = client.entry(kernel)
    assert (level.used, entry.managed[0], entry.overhead[0]) == (6 * MIB, corrected, 6 * MIB - corrected)
    assert_corrected(kernel, client, 0)
    assert level.used == corrected
    client.kill()
    assert_left(level, corrected)


def test_a_call_left_by_longjmp_stays_charged_with_its_whole_admission(kernel, level, client):
    client(f"admit({8 * MIB})")
    client(f"cuda.thread_ends_inside(u64({6 * MIB}), 1)")  # another thread, without this admission
    client(f"cuda.allocate_and_leap(u64({6 * MIB}), 1)")
    client("free(0x9999)")
    entry = client.entry(kernel)
    assert (level.used, entry.managed[0]) == (14 * MIB, 14 * MIB)


# -- a call during another call of the same thread: the result of the outer call is not recorded


def left(client, call: str) -> None:
    """Make this call, which succeeds. Make another call during it, as a signal handler does."""
    client(f"meanwhile(lambda: free(0x9999, code=1)) or {call}")


@pytest.mark.usefixtures("context_bytes")
def test_a_context_whose_creation_was_not_recorded_still_counts(kernel, level, client):
    client("retain()")
    client(f"managed(0x1000, {4 * MIB})")
    left(client, "context(0xabc)")
    client("primary_release()")
    assert (client.entry(kernel).contexts[0], client.entry(kernel).managed[0]) == (1, 4 * MIB)
    assert level.used >= 4 * MIB


@pytest.mark.usefixtures("context_bytes")
def test_an_unrecorded_second_retain_keeps_the_primary_context(kernel, level, client):
    client("retain()")
    client(f"managed(0x1000, {4 * MIB})")
    left(client, "retain()")
    client("primary_release()")
    assert level.used == CONTEXT + 4 * MIB
    client("primary_release()")
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
def test_an_unrecorded_first_retain_counts_as_a_context(kernel, level, client):
    left(client, "retain()")
    client("context(0xabc)")
    client(f"managed(0x1000, {4 * MIB})")
    client("destroy(0xabc)")
    assert (client.entry(kernel).contexts[0], client.entry(kernel).managed[0]) == (1, 4 * MIB)


@pytest.mark.usefixtures("context_bytes")
def test_a_handle_whose_creation_was_not_recorded_survives_the_last_context(kernel, level, client):
    left(client, f"create(7, {4 * MIB})")
    client("retain()")
    client("primary_release()")
    assert (level.used, client.entry(kernel).overhead[0]) == (4 * MIB, 0)


def test_a_mapping_that_was_not_recorded_keeps_its_handle_charged(kernel, level, client):
    client(f"create(7, {4 * MIB})")
    left(client, f"map_(0x100000, {4 * MIB}, 7)")
    client("release(7)")
    assert level.used == 4 * MIB


def test_memory_stays_charged_after_an_unrecorded_reference_to_it(level, client):
    client(f"create(7, {4 * MIB})")
    client(f"map_(0x100000, {4 * MIB}, 7)")
    left(client, "retain_handle(7, 0x100000)")
    client("release(7)")
    client(f"unmap(0x100000, {4 * MIB})")
    assert (level.used, level.orphaned) == (4 * MIB, 4 * MIB)


def test_a_call_that_was_left_is_over(level, client):
    """A mapping that was not recorded keeps its handle, and delays no release of other memory."""
    client(f"create(7, {4 * MIB})")
    left(client, f"map_(0x100000, {4 * MIB}, 7)")
    client(f"create(8, {2 * MIB})")
    client("release(8)")
    assert (level.used, level.orphaned) == (4 * MIB, 0)


@pytest.mark.parametrize("export", ["export_pointer(0x1000)", "export_range(0x1000)", "export(7)"])
def test_nothing_is_released_after_an_unrecorded_export(level, client, export):
    client(f"alloc(0x1000, {2 * MIB})")
    client(f"create(7, {4 * MIB})")
    left(client, export)
    client("free(0x1000)")
    client("release(7)")
    assert (level.used, level.orphaned) == (6 * MIB, 6 * MIB)


def test_pool_bytes_are_orphaned_after_an_unrecorded_export_of_the_pool(level, client):
    client(f"admit({8 * MIB}, kind={int(abi.Kind.POOL)})")
    left(client, "export_pool()")
    client(f"give_back({8 * MIB})")
    assert_left(level, 8 * MIB)
