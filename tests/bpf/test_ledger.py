"""The kernel's side of the ledger, with one test for each rule: what is charged, what is released, and when."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.driver import probe_plan, programs
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.level_limits import LevelLimits
from fgpu_ebpf.linux import bpf, mapped_files
from tests.bpf.conftest import CONTEXT, MIB, anomalies, assert_corrected, assert_left, page_of, wait_until

REFUSED, ADMITTED, AGAIN, UNLIMITED = range(4)
VMM, CONTEXT_KIND, HELLO, POOL = abi.Kind.VMM, abi.Kind.CONTEXT, abi.Kind.HELLO, abi.Kind.POOL


# -- admission


def test_an_admission_is_charged_then_settled_by_the_call_and_released_by_the_free(kernel, level, client):
    assert client(f"admit({100 * MIB})") == ADMITTED
    assert level.used == 100 * MIB
    client(f"alloc(0x1000, {100 * MIB})")
    usage = level.usage()
    assert (usage.used, usage.peak, usage.admitted, usage.witnessed) == (100 * MIB,) * 4
    client("free(0x1000)")
    assert level.used == 0
    assert level.usage().peak == 100 * MIB


def test_the_limit_is_exact_to_the_byte(level, client):
    assert client(f"admit({1024 * MIB + 1})") == REFUSED
    assert level.usage().refused == 1
    assert client(f"admit({1024 * MIB})") == ADMITTED
    client(f"alloc(0x1000, {1024 * MIB})")
    assert client("admit(1)") == REFUSED
    assert level.used == 1024 * MIB


def test_the_part_of_a_limit_that_views_do_not_show_is_on_the_page_and_not_in_its_flags(kernel, level):
    for outside in ({0: 518 * MIB, 1: 65 * 1024 * MIB}, {}):
        flags = int(abi.LimitFlag.KILL)
        kernel.ledger.set_limits([LevelLimits(level.cgroup, {0: 1024 * MIB, 1: MIB}, flags, outside=outside)])
        page = page_of(kernel, level)
        assert list(page.outside) == [outside.get(device, 0) for device in range(abi.DEVICES)]
        assert page.flags == flags


def test_a_ticket_is_charged_once_for_any_number_of_requests(level, client):
    assert client(f"admit({10 * MIB})") == ADMITTED
    assert client(f"admit({10 * MIB}, again=True)") == ADMITTED
    assert (level.used, level.usage().admitted) == (10 * MIB, 10 * MIB)


def test_an_unsettled_admission_stays_charged_until_nvml_shows_that_it_was_unused(kernel, level, client):
    client(f"admit({10 * MIB})")
    client(f"admit({20 * MIB})")
    assert (level.used, client.entry(kernel).overhead[0]) == (30 * MIB, 10 * MIB)
    client(f"alloc(0x1000, {20 * MIB})")
    assert_corrected(kernel, client, 0)
    assert level.used == 20 * MIB


def test_a_hello_between_two_requests_changes_nothing(kernel, level, client):
    assert client(f"admit({10 * MIB})") == ADMITTED
    client(f"shim.fgpu_admit(0, u64(0), {int(HELLO)}, u64(5))")
    assert client(f"admit({10 * MIB}, again=True)") == ADMITTED
    client(f"alloc(0x1000, {10 * MIB})")
    assert level.used == 10 * MIB
    assert not client.entry(kernel).flags & abi.Seen.BYPASS


def test_a_failed_call_releases_its_admission(level, client):
    client(f"admit({10 * MIB})")
    client(f"alloc(0x1000, {10 * MIB}, code=2)")
    assert level.used == 0


def test_an_ended_thread_s_admission_stays_charged_until_nvml_shows_that_it_was_unused(kernel, level, client):
    client(f"cuda.thread_admits_and_ends(u64({30 * MIB}))")
    wait_until(lambda: client.entry(kernel).quiet)  # before Linux 6.16 a join may return before the kernel has the end
    assert (level.used, client.entry(kernel).overhead[0]) == (30 * MIB, 30 * MIB)
    assert_corrected(kernel, client, 0)
    assert level.used == 0


@pytest.mark.parametrize("bytes_", [1 << 48, 1 << 62, (1 << 64) - 1, 1 << 63])
def test_sizes_that_overflow_are_refused(level, client, bytes_):
    client(f"admit({10 * MIB})")
    client(f"alloc(0x1000, {10 * MIB})")
    assert client(f"admit({bytes_})") == REFUSED
    assert level.used == 10 * MIB


def test_a_device_that_is_not_the_tenant_s_is_refused(kernel, level, client):
    before = anomalies(kernel)["DEVICE"]
    assert client(f"admit({MIB}, device=1)") == REFUSED
    assert client(f"admit({MIB}, device=16)") == REFUSED
    assert anomalies(kernel)["DEVICE"] == before + 1
    assert level.used == 0


def test_a_hello_marks_its_process_as_one_with_the_shim(kernel, client):
    assert client(f"admit(0, kind={int(HELLO)})") == ADMITTED
    assert client.entry(kernel).flags & abi.Seen.SHIM


def test_an_unmanaged_process_gets_no_answer_and_no_entry(kernel, make_level, make_client, level):
    outside = make_client(make_level(None), page_of=level)
    assert outside(f"admit({MIB})") is None
    outside(f"alloc(0x1000, {MIB})")
    assert outside.entry(kernel) is None


def test_mode_observe_admits_and_counts(kernel, level, client):
    level.limit(10 * MIB, abi.LimitFlag.OBSERVE)
    assert client(f"admit({20 * MIB})") == ADMITTED
    reasons = {c.reason: n for c, n in kernel.ledger.counters().items() if c.cgroup == level.cgroup}
    assert reasons == {abi.Reason.OBSERVED: 1}
    assert level.used == 20 * MIB


def test_memory_without_a_limit_is_counted(level, client):
    level.limit(abi.NO_LIMIT)
    assert client(f"admit({20 * MIB})") == UNLIMITED
    assert level.used == 20 * MIB


def nested(make_level, outer, levels):
    """Return nested levels, outermost first, with a limit of 1 GiB each."""
    found = [outer]
    while len(found) < levels:
        found.append(make_level(1024 * MIB, found[-1]))
    return found


def test_the_innermost_of_too_many_levels_are_left_out(kernel, make_level, make_client):
    box = make_level(100 * MIB)
    one, other = nested(make_level, box, 6), nested(make_level, box, 5)
    client = make_client(one[-1], page_of=one[3])
    assert client(f"admit({60 * MIB})") == ADMITTED
    assert client.entry(kernel).levels == tuple(level.cgroup for level in reversed(one[:4]))
    assert [level.used for level in one] == [60 * MIB] * 4 + [0, 0]
    assert make_client(other[-1], page_of=other[3])(f"admit({60 * MIB})") == REFUSED
    assert box.usage().refused == 1


def test_a_limit_lowered_below_use_admits_nothing_more(level, client):
    client(f"admit({100 * MIB})")
    client(f"alloc(0x1000, {100 * MIB})")
    level.limit(50 * MIB)
    assert client("admit(1)") == REFUSED
    assert level.used == 100 * MIB
    client("free(0x1000)")
    assert client(f"admit({50 * MIB})") == ADMITTED


# -- groups


def test_a_refusal_by_a_group_charges_no_leaf(kernel, make_level, make_client):
    group = make_level(100 * MIB)
    leaf = make_level(1024 * MIB, group)
    one = make_client(leaf)
    assert one(f"admit({101 * MIB})") == REFUSED
    assert (leaf.used, group.used) == (0, 0)
    assert (leaf.usage().refused, group.usage().refused) == (0, 1)
    assert one(f"admit({100 * MIB})") == ADMITTED
    assert (leaf.used, group.used) == (100 * MIB, 100 * MIB)


def test_two_leaves_share_the_limit_of_their_group(make_level, make_client):
    group = make_level(100 * MIB)
    leaves = [make_level(80 * MIB, group) for _ in range(2)]
    one, two = (make_client(leaf) for leaf in leaves)
    assert one(f"admit({80 * MIB})") == ADMITTED
    assert two(f"admit({21 * MIB})") == REFUSED
    assert two(f"admit({20 * MIB})") == ADMITTED
    one.kill()
    wait_until(lambda: group.orphaned == 80 * MIB)
    assert group.used == 100 * MIB
    assert two("admit(1)") == REFUSED, "the device may still hold it"
    assert leaves[0].let_go() == 80 * MIB
    assert (group.used, group.orphaned) == (20 * MIB, 0)


# -- the witness


def test_memory_without_admission_is_charged_and_its_process_is_marked(kernel, level, client):
    client(f"alloc(0x1000, {2048 * MIB})")
    assert level.used == 2048 * MIB
    assert client.entry(kernel).flags & abi.Seen.BYPASS
    client("free(0x1000)")
    assert level.used == 0


def test_the_larger_of_admitted_and_witnessed_is_charged(level, client):
    client(f"admit({4 * MIB})")
    client(f"alloc(0x1000, {3 * MIB})")
    assert level.used == 4 * MIB
    client(f"admit({MIB})")
    client(f"alloc(0x2000, {3 * MIB})")
    assert level.used == 7 * MIB


def test_a_failed_free_keeps_the_charge(level, client):
    client(f"admit({4 * MIB})")
    client(f"alloc(0x1000, {4 * MIB})")
    client("free(0x1000, code=1)")
    assert level.used == 4 * MIB
    client("free(0x1000)")
    assert level.used == 0


def test_double_and_foreign_frees_change_nothing(level, client):
    client(f"admit({4 * MIB})")
    client(f"alloc(0x1000, {4 * MIB})")
    client("free(0x1000)")
    client("free(0x1000)")
    client("free(0x9999)")
    assert level.used == 0


def test_a_pointer_that_another_thread_gets_during_its_free_is_charged(level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    client(f"cuda.free_while_reused(u64(0x1000), u64({8 * MIB}))")
    assert level.used == 8 * MIB
    client("free(0x1000)")
    assert level.used == 0


def test_a_call_left_by_longjmp_stays_charged_until_nvml_shows_that_it_failed(kernel, level, client):
    client(f"admit({512 * MIB})")
    client(f"cuda.allocate_and_leap(u64({512 * MIB}), 0)")
    client("alloc(0x1000, 4096)")
    assert (level.used, client.entry(kernel).overhead[0]) == (512 * MIB + 4096, 512 * MIB)
    assert_corrected(kernel, client, 0)
    assert level.used == 4096


def test_a_second_probe_on_one_file_counts_nothing_twice(kernel, level, client):
    offset = probe_plan.symbol_offsets(str(kernel.driver), ["cuMemAlloc_v2"])["cuMemAlloc_v2"]
    links = []
    for name, at_return in (("call_return", True), ("call_enter", False)):
        program = bpf.pinned(kernel.pins / "programs" / name)
        places = [(offset, abi.Function.ALLOC)]
        links += [*bpf.attach_uprobes(program, str(kernel.driver), places, at_return), program]
    try:
        client(f"admit({4 * MIB})")
        client(f"alloc(0x1000, {4 * MIB})")
        assert not client.entry(kernel).flags & abi.Seen.BYPASS
        client(f"alloc(0x2000, {4 * MIB})")
        assert level.used == 8 * MIB
    finally:
        for fd in links:
            os.close(fd)


def test_pitched_memory_is_charged_with_the_driver_s_pitch(level, client):
    client("pitched(0x1000, 1000, 100, 1024)")
    assert level.used == 1024 * 100
    client("free(0x1000)")
    assert level.used == 0


def test_managed_memory_is_counted_as_managed_until_its_free(kernel, level, client):
    client(f"managed(0x1000, {4 * MIB})")
    assert level.used == client.entry(kernel).managed[0] == 4 * MIB
    client("free(0x1000, code=1)")
    assert level.used == client.entry(kernel).managed[0] == 4 * MIB
    client("free(0x1000)")
    assert level.used == client.entry(kernel).managed[0] == 0


def test_a_call_that_allocates_nothing_settles_no_admission(kernel, level, client):
    client(f"create(7, {2 * MIB})")
    client(f"admit({4 * MIB})")
    client(f"map_(0x100000, {2 * MIB}, 7)")
    client(f"admit({6 * MIB})")
    assert (level.used, client.entry(kernel).overhead[0]) == (12 * MIB, 4 * MIB), "the earlier admission is unsettled"
    client(f"alloc(0x1000, {6 * MIB})")
    client("free(0x1000)")
    client(f"unmap(0x100000, {2 * MIB})")
    client("release(7)")


# -- arrays


@pytest.mark.parametrize(
    ("call", "bytes_"),
    [
        ("array(7, 1024, 1024, 0x20, 4)", 16 * MIB),
        ("array(7, 1024, 0, 0x10, 1)", 2048),
        ("array3d(7, 64, 64, 64, 1, 2)", 64**3 * 2),
        ("array3d(7, 64, 64, 0, 2, 1)", 64 * 64 * 2),
        ("array3d(7, 1024, 1024, 0, 3, 1, levels=3)", 4 * (1024**2 + 512**2 + 256**2)),
        ("array3d(7, 4, 4, 0, 1, 1, levels=3)", 16 + 4 + 1),
        ("array3d(7, 1024, 1024, 0, 0x91, 4)", MIB // 2),  # BC1
        ("array3d(7, 1024, 1024, 0, 0x9D, 4)", MIB),  # BC7
        ("array3d(7, 1024, 1024, 0, 0xB0, 3)", MIB * 3 // 2),  # NV12
        ("array3d(7, 1024, 1024, 0, 0xCB, 4)", 8 * MIB),  # SNORM_INT16X4
        ("array3d(7, 1024, 1024, 0, 0xFFFF, 4)", MIB // 2),  # an unknown format
    ],
)
def test_arrays_are_charged_by_their_extent(level, client, call, bytes_):
    client(call)
    assert level.used == bytes_
    client("array_destroy(7, code=1)")
    assert level.used == bytes_
    client("array_destroy(7)")
    assert level.used == 0


def test_the_admitted_size_of_an_array_is_charged(level, client):
    client(f"admit({64 * MIB})")
    client("array(7, 1000, 1000, 0x20, 4)")
    assert level.used == 64 * MIB
    client("array_destroy(7)")
    assert level.used == 0


def test_arrays_without_memory_are_not_charged(level, client):
    client("array3d(7, 1024, 1024, 0, 3, 1, flags=0x40)")
    client("array3d(8, 1024, 1024, 0, 3, 1, flags=0x80)")
    client("array3d(9, 1024, 1024, 0, 3, 1, code=2)")
    assert level.used == 0


def test_an_array_and_a_pointer_of_the_same_number_are_charged_separately(level, client):
    client("array(7, 1024, 1024, 3, 1)")
    client(f"alloc(7, {2 * MIB})")
    client("array_destroy(7)")
    assert level.used == 2 * MIB


# -- VMM


def test_a_released_handle_stays_charged_until_its_unmap(level, client):
    client(f"admit({4 * MIB}, kind={int(VMM)})")
    client(f"create(7, {4 * MIB})")
    client(f"map_(0x100000, {4 * MIB}, 7)")
    client("release(7)")
    assert level.used == 4 * MIB
    client(f"unmap(0x100000, {4 * MIB})")
    assert level.used == 0


def test_an_unmapped_handle_stays_charged_until_its_release(level, client):
    client(f"create(7, {4 * MIB})")
    client(f"map_(0x100000, {4 * MIB}, 7)")
    client(f"unmap(0x100000, {4 * MIB})")
    assert level.used == 4 * MIB
    client("release(7, code=1)")
    assert level.used == 4 * MIB
    client("release(7)")
    assert level.used == 0


@pytest.mark.parametrize("mappings", [5, 32, 33, 300])
def test_one_unmap_ends_several_mappings(level, client, mappings):
    for i in range(mappings):
        client(f"create({7 + i}, {2 * MIB})")
        client(f"map_({0x100000000 + i * 2 * MIB}, {2 * MIB}, {7 + i})")
        client(f"release({7 + i})")
    assert level.used == mappings * 2 * MIB
    client(f"unmap(0x100000000, {mappings * 2 * MIB})")
    assert level.used == 0


def test_one_unmap_of_two_devices_releases_the_bytes_of_each(level, client):
    """Bytes of exported handles count as orphaned. The order does not matter."""
    level.limit(200 * MIB, devices=(0, 1))
    for i, device in enumerate((0, 0, 1, 0, 1, 1)):
        client(f"admit({2 * MIB}, kind={int(VMM)}, device={device})")
        client(f"create({7 + i}, {2 * MIB}, location={device})")
        client(f"map_({0x100000000 + i * 2 * MIB}, {2 * MIB}, {7 + i})")
        if i in (1, 4):
            client(f"export({7 + i})")
        client(f"release({7 + i})")
    usage = level.kernel.ledger.usage(level.cgroup)
    assert [(usage[device].used, usage[device].orphaned) for device in (0, 1)] == [(6 * MIB, 0)] * 2
    client(f"unmap(0x100000000, {12 * MIB})")
    usage = level.kernel.ledger.usage(level.cgroup)
    assert [(usage[device].used, usage[device].orphaned) for device in (0, 1)] == [(2 * MIB, 2 * MIB)] * 2


def test_an_unmap_stops_at_an_unmapped_address(level, client):
    for i in range(40):
        client(f"create({7 + i}, {2 * MIB})")
        client(f"map_({0x100000000 + (i + (i > 35)) * 2 * MIB}, {2 * MIB}, {7 + i})")
        client(f"release({7 + i})")
    client(f"unmap(0x100000000, {200 * MIB})")
    assert level.used == 4 * 2 * MIB


@pytest.mark.parametrize("first", [0, 99], ids=["no-handle", "unknown-handle"])
def test_one_unmap_ends_the_mappings_behind_unknown_memory(level, client, first):
    """Memory of the host and imported memory have no entry of a handle."""
    client(f"create(7, {4 * MIB})")
    client(f"map_(0x100000000, {2 * MIB}, {first})")
    client(f"map_({0x100000000 + 2 * MIB}, {4 * MIB}, 7)")
    client("release(7)")
    client(f"unmap(0x100000000, {6 * MIB})")
    assert level.used == 0


def test_the_end_of_unknown_memory_frees_no_handle_that_got_its_number(level, client):
    client(f"map_(0x100000000, {2 * MIB}, 99)")
    client(f"create(99, {4 * MIB})")
    client(f"unmap(0x100000000, {2 * MIB})")
    assert level.used == 4 * MIB


def test_a_mapping_whose_end_is_not_recorded_yet_and_its_successor_keep_their_handles(level, client):
    client(f"create(7, {8 * MIB})")
    client(f"create(8, {2 * MIB})")
    client(f"map_(0x100000000, {8 * MIB}, 7)")
    client("release(7)")
    client(f"map_(0x100000000, {2 * MIB}, 8)")
    client(f"unmap(0x100000000, {2 * MIB})")  # the end of either mapping
    client("release(8)")
    assert level.used == 10 * MIB


def test_a_retained_handle_keeps_its_memory_charged(level, client):
    client(f"create(7, {4 * MIB})")
    client("retain_handle(7, 0)")
    client("release(7)")
    assert level.used == 4 * MIB
    client("release(7)")
    assert level.used == 0


def test_host_memory_is_not_charged(level, client):
    client(f"create(7, {4 * MIB}, location=2)")
    assert level.used == 0


# -- contexts


@pytest.mark.usefixtures("context_bytes")
def test_a_context_is_admitted_with_the_last_known_size(level, client):
    assert client(f"admit(0, kind={int(CONTEXT_KIND)})") == ADMITTED
    assert level.used == CONTEXT
    client("retain()")
    client("retain()")
    assert level.used == CONTEXT
    client("primary_release()")
    assert level.used == CONTEXT
    client("primary_release()")
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
def test_the_end_of_the_last_context_releases_its_allocations(kernel, level, client):
    client(f"admit(0, kind={int(HELLO)})")
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("retain()")
    client("context(0xabc)")
    client(f"alloc(0x1000, {4 * MIB})")
    client(f"create(7, {6 * MIB})")
    client("destroy(0xabc)")
    assert level.used >= 10 * MIB
    client("primary_release()")
    assert level.used == 6 * MIB
    client("free(0x1000)")
    assert level.used == 6 * MIB
    client("release(7)")
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
def test_a_reset_ends_the_primary_context(level, client):
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("retain()")
    client(f"alloc(0x1000, {4 * MIB})")
    client("primary_reset()")
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
@pytest.mark.parametrize("call", ["primary_release(version='')", "primary_reset(version='')"])
def test_the_former_functions_end_the_primary_context(level, client, call):
    client("retain()")
    client(f"managed(0x1000, {4 * MIB})")
    client(call)
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
def test_the_former_function_ends_one_context(kernel, level, client):
    """The driver may call the newer function inside the former function."""
    client("context(0xabc)")
    client("context(0xdef)")
    client("destroy(0xabc, version='')")
    assert (client.entry(kernel).contexts[0], level.used) == (1, CONTEXT)


@pytest.mark.usefixtures("context_bytes")
def test_a_reset_keeps_the_references(level, client):
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("retain()")
    client("primary_reset()")
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("retain()")
    assert level.used == CONTEXT
    client("primary_release()")
    assert level.used == CONTEXT
    client("primary_release()")
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
def test_a_green_context_keeps_the_primary_context(kernel, level, client):
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("retain()")
    client(f"managed(0x1000, {4 * MIB})")
    client("green(0x9001)")
    client("green(0x9002, code=1)")
    client("primary_release()")
    assert (level.used, client.entry(kernel).managed[0]) == (CONTEXT + 4 * MIB, 4 * MIB)
    client("green_destroy(0x9001, code=1)")
    assert level.used == CONTEXT + 4 * MIB
    client("green_destroy(0x9001)")
    assert (level.used, client.entry(kernel).contexts[0]) == (0, 0)


@pytest.mark.usefixtures("context_bytes")
def test_a_green_context_creates_the_primary_context_with_its_admission(kernel, level, client):
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("green(0x9001)")
    client("retain()")
    assert (level.used, client.entry(kernel).contexts[0]) == (CONTEXT, 1)
    client("green_destroy(0x9001)")
    assert level.used == CONTEXT
    client("primary_release()")
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
def test_an_untrusted_library_ends_no_green_context(kernel, level, client):
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("green(0x9001)")
    client(f"use_driver({str(kernel.unknown)!r})")
    client("green_destroy(0x9001)")
    assert level.used == CONTEXT


@pytest.mark.usefixtures("context_bytes")
def test_further_references_count_on_the_device_of_the_first(kernel, level, client):
    """CUDA's ordinal 0 is the ledger's device 3. A further reference has no admission."""
    level.limit(1024 * MIB, devices=(0, 3))
    kernel.ledger.set_context_bytes(3, CONTEXT)
    client(f"admit(0, kind={int(CONTEXT_KIND)}, device=3)")
    client("retain()")
    client("retain()")
    client("primary_release()")
    assert client.entry(kernel).contexts[:4] == (0, 0, 0, 1)
    client("primary_release()")
    assert not any(client.entry(kernel).contexts)


@pytest.mark.usefixtures("context_bytes")
def test_threads_that_retain_and_release_do_not_end_the_context(level, client):
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("retain()")
    client(f"alloc(0x1000, {4 * MIB})")
    client("cuda.race_primary(u64(100003))")
    assert level.used == CONTEXT + 4 * MIB
    client("primary_release()")
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
def test_a_reference_retained_during_a_release_keeps_the_context(level, client):
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("retain()")
    client(f"alloc(0x1000, {4 * MIB})")
    client("cuda.retain_while_released(0)")
    assert level.used == CONTEXT + 4 * MIB
    client("primary_release()")
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
def test_a_retain_that_fails_leaves_no_reference(level, client):
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("retain()")
    client("retain(code=1)")
    client("primary_release()")
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
def test_admitted_pool_bytes_do_not_admit_a_context(kernel, level, client):
    client(f"admit({MIB}, kind={int(POOL)})")
    client("retain()")
    assert level.used == CONTEXT + MIB
    assert client.entry(kernel).flags & abi.Seen.BYPASS


@pytest.mark.usefixtures("context_bytes")
def test_a_refused_context_is_not_charged(level, client):
    level.limit(100 * MIB)
    assert client(f"admit(0, kind={int(CONTEXT_KIND)})") == REFUSED
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
def test_a_context_that_the_driver_refuses_is_released(level, client):
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("retain(code=2)")
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
def test_pool_bytes_are_charged_at_once_and_no_other_bytes_are_released_as_pool_bytes(kernel, level, client):
    before = anomalies(kernel)["RELEASE"]
    client("retain()")
    client(f"admit({8 * MIB}); alloc(0x1000, {8 * MIB})")  # this memory belongs to no pool
    client(f"admit({32 * MIB}, kind={int(POOL)})")
    client(f"admit({32 * MIB}, kind={int(POOL)})")
    assert level.used == CONTEXT + 72 * MIB
    client(f"shim.fgpu_release(0, u64({16 * MIB}), {int(POOL)}, u64(1))")
    assert level.used == CONTEXT + 56 * MIB
    client(f"shim.fgpu_release(0, u64({1024 * MIB}), {int(POOL)}, u64(2))")
    assert level.used == CONTEXT + 8 * MIB
    client("free(0x1000)")
    assert level.used == CONTEXT
    assert anomalies(kernel)["RELEASE"] == before + 1


def test_every_hit_of_a_probe_is_counted(kernel, level, client):
    before = kernel.ledger.hits()
    for n in range(23):
        client(f"admit({MIB})")
        client(f"alloc({0x1000 + n}, {MIB})")
    for n in range(17):
        client(f"free({0x1000 + n})")
    client(f"shim.fgpu_release(0, u64({MIB}), {int(POOL)}, u64(1))")
    grown = {
        n: now - then for n, (then, now) in enumerate(zip(before, kernel.ledger.hits(), strict=True)) if now - then
    }
    function = abi.Function
    assert grown == {function.ALLOC: 23, function.FREE: 17, abi.HIT_ADMIT: 23, abi.HIT_GIVE_BACK: 1}


@pytest.mark.usefixtures("context_bytes")
def test_programs_of_two_versions_release_once(kernel, level, client):
    """During an upgrade the programs of both versions are attached to the same functions."""
    before = anomalies(kernel)["RELEASE"]
    links = []
    offsets = probe_plan.symbol_offsets(str(kernel.shim), probe_plan.SHIM)
    for symbol, name in probe_plan.SHIM.items():
        program = bpf.pinned(kernel.pins / "programs" / name)
        links += [*bpf.attach_uprobes(program, str(kernel.shim), [(offsets[symbol], 0)], False), program]
    client("retain()")
    try:
        for ticket in (1, 2):
            client(f"admit({32 * MIB}, kind={int(POOL)})")
            client(f"shim.fgpu_release(0, u64({16 * MIB}), {int(POOL)}, u64({ticket}))")
            assert level.used == CONTEXT + ticket * 16 * MIB
        client(f"alloc(0x1000, {4 * MIB})")
        client(f"shim.fgpu_release(0, u64({32 * MIB}), {int(POOL)}, u64(3))")
        assert level.used == CONTEXT + 4 * MIB
        client("free(0x1000)")
        assert level.used == CONTEXT
    finally:
        for fd in links:
            os.close(fd)
    assert anomalies(kernel)["RELEASE"] == before


# -- ends


def test_memory_of_a_killed_process_stays_charged_until_it_is_released(kernel, level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    client(f"admit({6 * MIB})")
    client.kill()
    assert client.entry(kernel) is None
    assert_left(level, 10 * MIB)


def test_an_unreaped_zombie_has_no_charge_of_its_own(level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    client.process.kill()
    wait_until(lambda: level.held == 0, 1.0)
    assert os.path.exists(f"/proc/{client.pid}")
    assert_left(level, 4 * MIB)


def test_the_first_thread_may_exit_before_the_others(kernel, level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    client.send("cuda.leave_leader()")
    wait_until(lambda: "Z" in Path(f"/proc/{client.pid}/stat").read_text().rsplit(")")[1])
    assert level.used == 4 * MIB
    assert client.entry(kernel) is not None
    client.kill()
    assert client.entry(kernel) is None
    assert_left(level, 4 * MIB)


def test_exec_orphans_the_memory_of_the_previous_program(kernel, level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    client(f"admit({6 * MIB})")
    client.send("os.execv('/bin/sleep', ['sleep', '100'])")
    wait_until(lambda: client.entry(kernel) is None)
    assert_left(level, 10 * MIB)


def test_exec_in_a_later_thread_orphans_the_memory_of_the_previous_program(kernel, level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    client("import threading")
    body = f"lambda: (admit({6 * MIB}), os.execv('/bin/sleep', ['sleep', '100']))"
    client.send(f"threading.Thread(target={body}).start()")
    wait_until(lambda: client.entry(kernel) is None)
    assert kernel.ledger.entries("threads") == 0
    assert_left(level, 10 * MIB)


def test_a_forked_child_is_another_process(kernel, level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    assert client(f"fork() or (alloc(0x1000, {8 * MIB}), os._exit(0))") != 0
    assert (level.used, level.orphaned, level.usage().peak) == (12 * MIB, 8 * MIB, 12 * MIB)
    level.let_go()
    assert level.used == 4 * MIB


def test_releases_go_to_the_levels_of_the_charge(kernel, make_level, make_client):
    first, second = make_level(1024 * MIB), make_level(1024 * MIB)
    one = make_client(first)
    one(f"alloc(0x1000, {4 * MIB})")
    (second.path / "cgroup.procs").write_text(str(one.pid))
    one("free(0x1000)")
    assert (first.used, second.used) == (0, 0)


# -- bytes that the agent enters


def test_overhead_is_set_and_released(kernel, level, client):
    client(f"admit({4 * MIB})")
    client(f"alloc(0x1000, {4 * MIB})")
    p = client.entry(kernel)
    assert kernel.ledger.overhead(client.pid, p.generation, 0, 9 * MIB, p.changes)
    assert level.used == 13 * MIB
    p = client.entry(kernel)
    assert p.overhead[0] == 9 * MIB
    assert p.witnessed(0) == 4 * MIB
    assert kernel.ledger.overhead(client.pid, p.generation, 0, -MIB, p.changes)
    assert level.used == 3 * MIB
    client("free(0x1000)")
    client.kill()
    assert level.used == 0


@pytest.mark.usefixtures("context_bytes")
def test_unused_pool_bytes_are_released_once(kernel, level, client):
    """NVML shows the context alone, so the charge of context and pool is that of the context."""
    level.limit(4096 * MIB)
    client("retain()")
    client(f"admit({600 * MIB}, kind={int(POOL)})")
    assert_corrected(kernel, client, CONTEXT - 100 * MIB)
    used = level.used
    client(f"give_back({60 * MIB})")
    assert level.used == used, "60 of the 100 MiB that were never charged"
    client(f"give_back({60 * MIB})")
    assert level.used == used - 20 * MIB
    assert client.entry(kernel).overhead[0] == CONTEXT
    client(f"give_back({480 * MIB})")
    assert level.used == CONTEXT


@pytest.mark.usefixtures("context_bytes")
@pytest.mark.parametrize(("held", "pool"), [(700, 444), (200, 0)])
def test_unused_pool_bytes_are_not_released_from_handles(kernel, level, client, held, pool):
    """The last correction found `held` MiB, 256 MiB of them in a handle."""
    level.limit(4096 * MIB)
    client("retain()")
    client(f"create(7, {256 * MIB})")
    client(f"admit({768 * MIB}, kind={int(POOL)})")
    assert_corrected(kernel, client, (held - 256 - 768) * MIB)
    client("primary_release()")
    entry = client.entry(kernel)
    assert (level.used, entry.pool[0]) == (held * MIB, pool * MIB)
    assert entry.overhead[0] == min(0, held - 256) * MIB
    client(f"give_back({768 * MIB})")
    assert level.held == min(held, 256) * MIB
    client("release(7)")
    assert level.held == 0


@pytest.mark.usefixtures("context_bytes")
@pytest.mark.parametrize(
    ("then", "used"),
    [
        (f"create(7, {64 * MIB})", 96 * MIB),
        (f"alloc(0x1000, {64 * MIB}, code=1)", 32 * MIB),
        (f"admit({4 * MIB})", 36 * MIB),
    ],
    ids=["a handle", "a failed call", "another request"],
)
def test_a_request_that_the_last_context_released_is_charged_once(kernel, level, client, then, used):
    """The call for which the request was made comes after the end of the context."""
    client(f"create(5, {32 * MIB})")
    client("retain()")
    client(f"admit({64 * MIB}, kind={int(VMM)})")
    flags = client.entry(kernel).flags
    client("primary_reset()")
    assert level.used == 32 * MIB
    client(then)
    entry = client.entry(kernel)
    assert (level.used, entry.bytes[0], entry.overhead[0]) == (used, used, 0)
    assert entry.flags == flags, "the call counts as one without an admission"


@pytest.mark.usefixtures("context_bytes")
def test_a_context_that_was_admitted_before_the_last_one_ended_is_charged(kernel, level, client):
    client("retain()")
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("primary_reset()")
    client("context(0xC0FFEE)")
    assert (level.used, client.entry(kernel).overhead[0]) == (CONTEXT, CONTEXT)


def test_no_more_bytes_are_released_than_the_process_has(kernel, level, client):
    """NVML shows that memory is gone, and later a free of it is reported. Later memory does not pay for that."""
    client(f"alloc(0x1000, {64 * MIB})")
    assert_corrected(kernel, client, -64 * MIB)
    client("free(0x1000)")
    assert not client.entry(kernel).late
    client(f"alloc(0x2000, {48 * MIB})")
    assert (level.used, client.entry(kernel).bytes[0]) == (48 * MIB, 48 * MIB)


@pytest.mark.parametrize("managed", [0, 1])
def test_a_call_that_does_not_fit_and_does_not_return_is_charged(level, client, managed):
    """The program leaves the call by longjmp, as if the driver had completed it."""
    level.limit(16 * MIB)
    client(f"cuda.allocate_and_leap(u64({20 * MIB}), {managed})")
    client("free(0x9000)")
    assert level.used == 20 * MIB


def test_overhead_is_refused_if_the_process_has_changed_since(kernel, level, client):
    client(f"admit({4 * MIB})")
    p = client.entry(kernel)
    client(f"alloc(0x1000, {4 * MIB})")
    assert not kernel.ledger.overhead(client.pid, p.generation, 0, MIB, p.changes)
    p = client.entry(kernel)
    assert not kernel.ledger.overhead(client.pid, p.generation + 1, 0, MIB, p.changes)
    assert level.used == 4 * MIB


@pytest.mark.parametrize("kind", [0, abi.PATIENT], ids=["once", "patient"])
def test_a_refused_request_is_no_change(kernel, level, client, kind):
    """Programs that wait for room send requests all the time.

    If a request were a change, no process would ever be quiet.
    """
    client(f"admit({4 * MIB})")
    client(f"alloc(0x1000, {4 * MIB})")
    before = client.entry(kernel)
    for _ in range(3):
        assert client(f"admit({2048 * MIB}, kind={kind})") == REFUSED
    assert client.entry(kernel) == before
    client(f"admit({4 * MIB})")
    assert client.entry(kernel).begun == before.begun + 1


def quiet(kernel, client):
    return client.entry(kernel).quiet


def test_a_process_is_not_quiet_from_an_admission_to_the_end_of_its_call(kernel, level, client):
    client(f"admit({4 * MIB}, kind=1)")  # pool bytes are committed at once
    assert quiet(kernel, client)
    client(f"admit({4 * MIB})")
    assert not quiet(kernel, client)
    client(f"alloc(0x1000, {4 * MIB})")
    assert quiet(kernel, client)
    client(f"admit({2048 * MIB})")
    assert quiet(kernel, client), "a refused request has no call to wait for"
    client(f"admit({4 * MIB})")
    client(f"admit({2048 * MIB})")  # this admission replaces the previous one
    assert quiet(kernel, client)


def test_a_process_in_a_call_is_not_quiet(kernel, client):
    client(f"cuda.allocate_and_leap(u64({4 * MIB}), 0)")
    assert not quiet(kernel, client)
    client(f"admit({2048 * MIB})")
    assert not quiet(kernel, client), "a refusal ends no call"
    client(f"alloc(0x1000, {6 * MIB})")
    assert quiet(kernel, client)


def test_a_thread_that_ends_leaves_its_process_quiet(kernel, level, client):
    client("import threading")
    client(f"t = threading.Thread(target=lambda: admit({4 * MIB})); t.start(); t.join()")
    wait_until(lambda: quiet(kernel, client))
    assert_corrected(kernel, client, 0)
    assert level.used == 0


def test_the_ledger_lists_a_process_from_its_first_call_until_its_end(kernel, level, make_client):
    one, other = make_client(level), make_client(level)
    one(f"alloc(0x1000, {4 * MIB})")
    assert {one.pid} == kernel.ledger.processes().keys() & {one.pid, other.pid}
    other(f"alloc(0x1000, {4 * MIB})")
    assert {one.pid, other.pid} <= kernel.ledger.processes().keys()
    other("free(0x1000)")
    assert kernel.ledger.processes()[other.pid].bytes[0] == 0
    other.kill()
    wait_until(lambda: other.pid not in kernel.ledger.processes())
    assert one.pid in kernel.ledger.processes()


def test_a_removed_page_charges_no_process(kernel, make_level, make_client):
    first = make_level(1024 * MIB)
    one = make_client(first)
    one(f"alloc(0x1000, {4 * MIB})")
    kernel.ledger.remove([first.cgroup])  # its process was not moved
    assert one(f"admit({MIB})") is None, "a process without a page gets no verdict"
    second = make_level(1024 * MIB)  # it gets the freed slot
    one(f"alloc(0x2000, {6 * MIB})")
    one("free(0x1000)")
    assert second.used == 0
    first.limit(512 * MIB)
    assert kernel.ledger.move(one.pid, one.entry(kernel).generation, (first.cgroup,))
    one(f"alloc(0x3000, {8 * MIB})")
    assert (first.used, second.used) == (8 * MIB, 0)


def test_another_ledger_finds_the_used_slots(kernel, level, make_level, make_client):
    one = make_client(level)
    one(f"alloc(0x1000, {4 * MIB})")
    later = Ledger(kernel.pins)
    try:
        other = make_level(None)
        later.set_limits([LevelLimits(other.cgroup, {0: 64 * MIB})])
    finally:
        later.close()
    one(f"alloc(0x2000, {6 * MIB})")
    assert (level.used, other.used) == (10 * MIB, 0)


def test_charges_move_with_a_process(kernel, make_level, make_client):
    first, second = make_level(1024 * MIB), make_level(1024 * MIB)
    one = make_client(first)
    one(f"alloc(0x1000, {4 * MIB})")
    generation = one.entry(kernel).generation
    assert kernel.ledger.move(one.pid, generation, (second.cgroup,))
    assert (first.used, second.used) == (0, 4 * MIB)
    one("free(0x1000)")
    assert second.used == 0


def test_an_older_process_is_adopted(kernel, make_level, make_client, level):
    outside = make_level(None)
    one = make_client(outside, page_of=level)
    one(f"alloc(0x1000, {4 * MIB})")
    outside.limit(1024 * MIB)
    assert kernel.ledger.move(one.pid, 0, (outside.cgroup,))
    p = one.entry(kernel)
    assert kernel.ledger.overhead(one.pid, p.generation, 0, 600 * MIB, p.changes)
    assert outside.used == 600 * MIB
    one("free(0x1000)")
    one.kill()
    assert_left(outside, 600 * MIB)


def test_reap_ends_a_process_whose_exit_was_not_reported(kernel, level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    generation = client.entry(kernel).generation
    assert not kernel.ledger.reap(client.pid, generation + 1)
    assert kernel.ledger.reap(client.pid, generation)
    assert_left(level, 4 * MIB)


def test_sweep_deletes_the_entries_of_an_exited_process(kernel, client):
    for i in range(23):
        client(f"alloc({0x1000 * (i + 1)}, 4096)")
    before = kernel.ledger.entries("allocations")
    client.kill()
    kernel.ledger.sweep()
    assert kernel.ledger.entries("allocations") <= before - 23


def own_descriptor(kernel, cgroup):
    """Return a descriptor of a level's page. Only the page's freeze prevents writes through it."""
    raw = bpf.lookup(bpf.pinned(kernel.pins / "maps/pages"), cgroup.to_bytes(8, "little"), 4)
    return bpf.map_by_id(int.from_bytes(raw, "little"))


def test_a_usage_page_cannot_be_written_from_outside(kernel, level):
    fd = own_descriptor(kernel, level.cgroup)
    with pytest.raises(OSError, match="not permitted"):
        bpf.update(fd, bytes(4), bytes(4096))
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)
    os.close(fd)


@pytest.mark.parametrize("last", ["create_array_page", "update", "freeze", "update_all"])
@pytest.mark.parametrize("done", [False, True])
def test_an_agent_killed_while_creating_a_page_leaves_no_writable_page(kernel, make_level, monkeypatch, last, done):
    level, call = make_level(None), getattr(bpf, last)
    monkeypatch.setattr(bpf, last, lambda *given: (call(*given) if done else None, os._exit(9)))
    child = os.fork()
    if not child:
        level.limit(MIB)
        kernel.ledger.close()  # no change is in progress in the kernel after this
        os._exit(0)
    monkeypatch.undo()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if not kernel.ledger.page_missing(level.cgroup):
        with pytest.raises(PermissionError):
            mmap.mmap(own_descriptor(kernel, level.cgroup), 4096, mmap.MAP_SHARED, mmap.PROT_WRITE)
    level.limit(2 * MIB)
    assert level.usage().limit == 2 * MIB


def test_a_writable_page_is_not_handed_out(kernel, make_level):
    level = make_level(None)
    page = bpf.create_array_page("fgpu_usage", 4096)
    bpf.update(bpf.pinned(kernel.pins / "maps/pages"), level.cgroup.to_bytes(8, "little"), page.to_bytes(4, "little"))
    assert kernel.ledger.page_fd(level.cgroup) is None
    bpf.freeze(page)
    assert kernel.ledger.page_fd(level.cgroup) is not None


def test_a_change_with_more_levels_than_fit_changes_no_limit(kernel, level):
    before = sorted(kernel.ledger.tenants())
    many = [LevelLimits(10**12 + n, {0: MIB}) for n in range(4201)]
    with pytest.raises(OSError, match=r"the maximum number of cgroups with a limit \(levels\) is reached"):
        kernel.ledger.set_limits([LevelLimits(level.cgroup, {0: MIB}), *many])
    assert sorted(kernel.ledger.tenants()) == before
    assert kernel.ledger.limit(many[0].cgroup, 0) is None
    assert kernel.ledger.limit(level.cgroup, 0) == 1024 * MIB


def test_the_shim_s_exports_are_not_probed_as_the_driver_s(kernel):
    links = (kernel.pins / "links").glob(f"*-{kernel.shim.stat().st_ino:x}-*")
    check = kernel.probes.of(mapped_files.as_mapped(str(kernel.shim))).check
    assert {link.name.split("-", 3)[3] for link in links} == {"s0-admit", "s0-give_back", f"s0-all2at{check:x}"}


def test_the_check_of_an_interpreter_without_bcc_fails_and_names_the_missing_package():
    check = programs.check_loader([sys.executable, "-I", "-S"])
    assert not check.ok
    assert "python3-bpfcc" in check.fix
