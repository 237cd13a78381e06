"""Libraries that are not trusted: their allocations are charged as usual, and memory that they free may still exist.

A tenant may use a library that exports the driver's names and does nothing. The agent probes it, because it may be a
driver. A call of it must not release memory that the real driver holds.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.driver.library_class import Role
from fgpu_ebpf.driver.library_files import Target
from tests.bpf.conftest import CONTEXT, MIB, Client, Kernel, assert_left


@pytest.fixture
def other(kernel: Kernel, client: Client) -> Client:
    """Return the client, which has called the host's library and calls the unknown library now."""
    client(f"def host(): use_driver({str(kernel.driver)!r})")
    client(f"def unknown(): use_driver({str(kernel.unknown)!r})")
    return client


def test_memory_allocated_by_an_unknown_library_is_charged(kernel, level, other):
    other("unknown()")
    other(f"alloc(0x1000, {4 * MIB})")
    assert (level.used, other.entry(kernel).flags & abi.Seen.BYPASS) == (4 * MIB, abi.Seen.BYPASS)
    other(f"admit({6 * MIB})")
    other(f"create(7, {6 * MIB})")
    other(f"admit({8 * MIB})")
    other(f"alloc(0x2000, {8 * MIB}, code=2)")
    assert level.used == 10 * MIB, "a failed call is charged nothing"


@pytest.mark.parametrize(
    ("take", "give"),
    [
        (f"alloc(0x1000, {4 * MIB})", "free(0x1000)"),
        (f"pitched(0x1000, 1024, {4 * 1024}, 1024)", "free(0x1000)"),
        ("array(7, 2048, 2048, 1, 1)", "array_destroy(7)"),
        (f"create(7, {4 * MIB})", "release(7)"),
    ],
)
@pytest.mark.parametrize("with_", ["host()", "unknown()"])
def test_memory_freed_by_an_unknown_library_is_orphaned(level, other, take, give, with_):
    other(with_)
    other(take)
    other("unknown()")
    other(give.replace(")", ", code=1)"))
    assert (level.used, level.orphaned) == (4 * MIB, 0)
    other(give)
    assert (level.used, level.orphaned) == (4 * MIB, 4 * MIB)
    other("host()")
    other(give)
    assert_left(level, 4 * MIB)


def test_a_mapping_that_an_unknown_library_ends_orphans_its_memory(level, other):
    other(f"create(7, {4 * MIB})")
    other(f"map_(0x100000, {4 * MIB}, 7)")
    other("release(7)")
    other("unknown()")
    other(f"unmap(0x100000, {4 * MIB})")
    assert_left(level, 4 * MIB)


@pytest.mark.parametrize(("first", "last"), [("release(7)", "unmap"), ("unmap", "release(7)")])
def test_memory_is_orphaned_if_an_unknown_library_dropped_one_of_its_references(level, other, first, last):
    unmap = f"unmap(0x100000, {4 * MIB})"
    other(f"create(7, {4 * MIB})")
    other(f"map_(0x100000, {4 * MIB}, 7)")
    other("unknown()")
    other(unmap if first == "unmap" else first)
    assert (level.used, level.orphaned) == (4 * MIB, 0)
    other("host()")
    other(unmap if last == "unmap" else last)
    assert_left(level, 4 * MIB)


def test_managed_memory_is_not_freed_by_an_unknown_library(kernel, level, other):
    freed = kernel.ledger.orphans.managed_freed(0)
    other(f"managed(0x1000, {4 * MIB})")
    other("unknown()")
    other(f"managed(0x2000, {2 * MIB})")
    for pointer in (0x1000, 0x2000):
        other(f"free({pointer})")
    assert (level.used, level.orphaned, other.entry(kernel).managed[0]) == (6 * MIB, 0, 6 * MIB)
    other("host()")
    other("free(0x1000)")
    assert (level.used, other.entry(kernel).managed[0]) == (2 * MIB, 2 * MIB)
    assert kernel.ledger.orphans.managed_freed(0) == freed + 4 * MIB
    other.kill()
    assert kernel.ledger.orphans.managed_freed(0) == freed + 6 * MIB
    assert_left(level, 2 * MIB)


# -- contexts


@pytest.fixture
def held(other: Client) -> int:
    """Allocate memory of every kind, beside the primary context. Return its bytes."""
    other("retain()")
    other(f"alloc(0x1000, {2 * MIB})")
    other(f"managed(0x2000, {3 * MIB})")
    other(f"create(7, {4 * MIB})")
    return CONTEXT + 9 * MIB


@pytest.mark.usefixtures("context_bytes")
@pytest.mark.parametrize("end", ["primary_release()", "primary_reset()"])
def test_an_unknown_library_ends_no_context(kernel, level, other, held, end):
    other("unknown()")
    other(end)
    entry = other.entry(kernel)
    assert (level.used, level.orphaned) == (held, 0)
    assert (entry.contexts[0], entry.managed[0], entry.overhead[0]) == (1, 3 * MIB, CONTEXT)
    other("host()")
    other("primary_release()")
    assert (level.used, level.orphaned) == (4 * MIB, 0), "the context was still the last one"


@pytest.mark.usefixtures("context_bytes")
def test_a_context_ended_by_an_unknown_library_still_counts(kernel, level, other, held):
    """Another context is created and ended with the real driver.

    If it counted as the last, its end would free the memory of the first.
    """
    other("context(0xabc)")
    other("primary_release()")
    before = level.used
    other("unknown()")
    other("destroy(0xabc)")
    other("host()")
    other("context(0xdef)")
    other("destroy(0xdef)")
    assert (other.entry(kernel).contexts[0], other.entry(kernel).managed[0]) == (1, 3 * MIB)
    assert level.used == before


@pytest.mark.usefixtures("context_bytes")
def test_a_reference_dropped_by_an_unknown_library_keeps_the_primary_context(kernel, level, other, held):
    other("retain()")
    other("unknown()")
    other("primary_release()")
    other("host()")
    other("primary_release()")
    assert (level.used, other.entry(kernel).contexts[0]) == (held, 1)
    other("primary_release()")
    assert level.used == 4 * MIB


@pytest.mark.usefixtures("context_bytes")
def test_names_stay_in_use_after_an_unknown_library_ends_a_context(kernel, level, other, held):
    """A small piece of managed memory must not be able to free a large piece of the same name."""
    other("unknown()")
    other("primary_release()")
    other("host()")
    other(f"managed(0x2000, {64 * MIB})")
    other("free(0x2000)")
    assert other.entry(kernel).managed[0] == 64 * MIB


# -- listed files


@pytest.mark.usefixtures("context_bytes")
def test_a_listed_library_is_trusted_like_the_host_s(kernel, level, client, tmp_path: Path):
    listed = tmp_path / "libcuda.so.1"
    shutil.copy(kernel.driver, listed)
    kernel.probes.attach(Target.of(str(listed)), Role.LISTED)
    client(f"use_driver({str(listed)!r})")
    client("retain()")
    client(f"managed(0x1000, {2 * MIB})")
    client("free(0x1000)")
    client(f"alloc(0x1000, {2 * MIB})")
    client("free(0x1000)")
    assert (level.used, level.orphaned) == (CONTEXT, 0)
    client(f"alloc(0x1000, {2 * MIB})")
    client("primary_release()")
    assert (level.used, level.orphaned) == (0, 0)
