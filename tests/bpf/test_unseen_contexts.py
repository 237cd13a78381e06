"""Contexts that are older than the ledger's entry of their process.

The process creates the context while its cgroup is unmanaged or its library has no probes. A successful allocation
shows such a context, and so does a row of NVML.
"""

from __future__ import annotations

import pytest

from fgpu_ebpf.abi import Verdict
from tests.bpf.conftest import CONTEXT, MIB, anomalies, assert_left, leave_levels

SMALL = 4 * MIB
pytestmark = pytest.mark.usefixtures("context_bytes")


def seen(kernel, client):
    """Report a row of NVML for the process."""
    process = client.entry(kernel)
    return kernel.ledger.context_seen(client.pid, process.generation, 0, process.changes)


def gone(kernel, client):
    """Report that NVML has no row of the process."""
    process = client.entry(kernel)
    return kernel.ledger.context_gone(client.pid, process.generation, 0, process.changes)


def counted(kernel, client):
    entry = client.entry(kernel)
    return entry.contexts[0], entry.is_unseen(0), entry.overhead[0]


@pytest.fixture
def older(kernel, make_level, make_client):
    """Return a client whose context was created before its cgroup had a limit, and the level of this cgroup."""
    level = make_level(None)
    client = make_client(level)
    client("context(0x77)")
    client("retain()")
    assert client.entry(kernel) is None
    level.limit(1024 * MIB)
    return level, client


@pytest.mark.parametrize(
    "call", [f"alloc(0x1000, {SMALL})", f"managed(0x1000, {SMALL})", f"pitched(0x1000, 4096, 1024, {SMALL // 1024})"]
)
@pytest.mark.parametrize("admits", [True, False])
def test_an_allocation_charges_the_older_context_once(kernel, older, call, admits):
    level, client = older
    if admits:
        client(f"shim.fgpu_admit(0, u64({SMALL}), 0, u64(7)) and None")
    client(call)
    assert (level.used, counted(kernel, client)) == (CONTEXT + SMALL, (1, True, CONTEXT))
    client(call.replace("0x1000", "0x2000"))
    assert (level.used, counted(kernel, client)) == (CONTEXT + 2 * SMALL, (1, True, CONTEXT))
    client.kill()
    assert_left(level, CONTEXT + 2 * SMALL)


def test_the_older_context_is_charged_at_every_level_beyond_the_limit(kernel, make_level, make_client):
    group = make_level(CONTEXT // 2)
    level = make_level(CONTEXT // 2, group)
    client = make_client(level)
    assert client(f"admit({SMALL})") == Verdict.ADMITTED
    client(f"alloc(0x1000, {SMALL})")
    assert (level.used, group.used) == (CONTEXT + SMALL, CONTEXT + SMALL)
    assert client(f"admit({SMALL})") == Verdict.REFUSED


@pytest.mark.parametrize("call", [f"alloc(0x1000, {SMALL}, code=2)", f"create(7, {SMALL}, code=2)", "free(0x1000)"])
def test_a_call_that_allocates_nothing_shows_no_context(kernel, level, client, call):
    client(call)
    assert (level.used, counted(kernel, client)) == (0, (0, False, 0))


def test_a_handle_shows_no_context(kernel, level, client):
    client(f"create(7, {SMALL})")
    assert (level.used, counted(kernel, client)) == (SMALL, (0, False, 0))


def test_a_forked_child_that_allocates_nothing_counts_no_context(kernel, level, client):
    client(f"alloc(0x1000, {SMALL})")
    client(f"fork() or (alloc(0x1000, {SMALL}, code=3), os._exit(0))")
    assert (level.used, counted(kernel, client)) == (CONTEXT + SMALL, (1, True, CONTEXT))


def test_a_recorded_context_is_not_counted_again(kernel, level, client):
    client("retain()")
    client(f"alloc(0x1000, {SMALL})")
    assert seen(kernel, client)
    assert (level.used, counted(kernel, client)) == (CONTEXT + SMALL, (1, False, CONTEXT))


def test_bytes_that_are_charged_as_overhead_are_not_charged_again(kernel, level, client):
    """The context was admitted and created by a function without a probe, or NVML has shown it."""
    assert client("admit(0, kind=2)") == Verdict.ADMITTED
    assert client(f"admit({SMALL})") == Verdict.ADMITTED
    client(f"alloc(0x1000, {SMALL})")
    assert (level.used, counted(kernel, client)) == (CONTEXT + SMALL, (1, True, CONTEXT))


@pytest.mark.parametrize("end", ["destroy(0x77)", "primary_release()", "primary_reset()"])
def test_the_end_of_the_older_context_releases_its_bytes_once(kernel, older, end):
    level, client = older
    before = anomalies(kernel)
    client(f"alloc(0x1000, {SMALL})")
    for _ in range(2):
        client(end)
        assert (level.used, counted(kernel, client)) == (SMALL, (0, False, 0))
    assert client.entry(kernel).ended[0] == 1
    client("free(0x1000)")
    assert level.used == 0
    assert anomalies(kernel)["RELEASE"] == before["RELEASE"]


@pytest.mark.parametrize("end", ["destroy(0x77)", "primary_release()", "primary_reset()"])
def test_an_unknown_library_does_not_end_the_older_context(kernel, older, end):
    level, client = older
    client(f"alloc(0x1000, {SMALL})")
    client(f"use_driver({str(kernel.unknown)!r})")
    client(end)
    assert (level.used, counted(kernel, client)) == (CONTEXT + SMALL, (1, True, CONTEXT))


def test_a_failed_destruction_keeps_the_older_context(kernel, older):
    level, client = older
    client(f"alloc(0x1000, {SMALL})")
    client("destroy(0x77, code=1)")
    assert (level.used, counted(kernel, client)) == (CONTEXT + SMALL, (1, True, CONTEXT))


def test_managed_memory_stays_charged_at_the_end_of_an_older_context(kernel, older):
    """Another older context may have the memory, and NVML does not show managed memory."""
    level, client = older
    client(f"managed(0x1000, {SMALL})")
    client("destroy(0x77)")
    assert (level.used, client.entry(kernel).managed[0]) == (SMALL, SMALL)


def test_memory_stays_charged_while_a_recorded_context_ends_before_an_older_one(kernel, older):
    level, client = older
    client(f"managed(0x1000, {SMALL})")
    client("context(0x78)")
    assert (level.used, counted(kernel, client)) == (2 * CONTEXT + SMALL, (2, True, 2 * CONTEXT))
    client("destroy(0x78)")
    assert (level.used, counted(kernel, client)) == (CONTEXT + SMALL, (1, True, CONTEXT))


def test_a_further_reference_to_the_older_context_charges_nothing(kernel, older):
    level, client = older
    client(f"alloc(0x1000, {SMALL})")
    client("retain()")
    assert (level.used, counted(kernel, client)) == (CONTEXT + SMALL, (1, True, CONTEXT))
    client("primary_release()")
    assert (level.used, counted(kernel, client)) == (CONTEXT + SMALL, (1, True, CONTEXT))
    client("primary_release()")
    assert (level.used, counted(kernel, client)) == (SMALL, (0, False, 0))


def test_a_context_with_an_admission_counts_beside_the_older_one(kernel, make_level, make_client):
    level = make_level(2048 * MIB)
    client = make_client(level)
    client(f"alloc(0x1000, {SMALL})")
    assert client("admit(0, kind=2)") == Verdict.ADMITTED
    client("retain()")
    assert (level.used, counted(kernel, client)) == (2 * CONTEXT + SMALL, (2, True, 2 * CONTEXT))
    client("primary_release()")
    assert (level.used, counted(kernel, client)) == (CONTEXT + SMALL, (1, True, CONTEXT))


def test_a_process_that_returns_to_its_cgroup_is_charged_for_its_context(kernel, level, client):
    client("retain()")
    leave_levels(kernel, client)
    assert level.used == 0
    client(f"alloc(0x1000, {SMALL})")
    assert (level.used, counted(kernel, client)) == (CONTEXT + SMALL, (1, True, CONTEXT))


def test_an_allocation_during_the_end_of_the_last_context_shows_no_context(kernel, level, client):
    client("context(0x77)")
    client("meanwhile(lambda: aside(destroy, 0x77))")
    client(f"alloc(0x1000, {SMALL})")
    assert (level.used, counted(kernel, client)) == (SMALL, (0, False, 0))


def test_a_context_that_nvml_shows_counts_once(kernel, level, client):
    client(f"create(7, {SMALL})")
    for _ in range(2):
        assert seen(kernel, client)
        assert (level.used, counted(kernel, client)) == (SMALL, (1, True, 0))
    for _ in range(2):
        assert gone(kernel, client)
        assert (level.used, counted(kernel, client)) == (SMALL, (0, False, 0))


def test_nvml_does_not_end_a_recorded_context(kernel, level, client):
    client("retain()")
    assert gone(kernel, client)
    assert (level.used, counted(kernel, client)) == (CONTEXT, (1, False, CONTEXT))


def test_a_context_that_nvml_shows_is_released_at_its_destruction(kernel, older):
    level, client = older
    client(f"create(7, {SMALL})")
    process = client.entry(kernel)
    assert seen(kernel, client)
    assert kernel.ledger.overhead(client.pid, process.generation, 0, CONTEXT, process.changes)
    client("destroy(0x77)")
    assert (level.used, counted(kernel, client)) == (SMALL, (0, False, 0))


def test_a_reading_of_nvml_before_a_change_counts_nothing(kernel, level, client):
    client(f"create(7, {SMALL})")
    process = client.entry(kernel)
    client("release(7)")
    assert not kernel.ledger.context_seen(client.pid, process.generation, 0, process.changes)
    assert counted(kernel, client) == (0, False, 0)
    client(f"alloc(0x1000, {SMALL})")
    assert not kernel.ledger.context_gone(client.pid, process.generation, 0, process.changes)
    assert not kernel.ledger.context_seen(client.pid, process.generation + 1, 0, process.changes)
    assert counted(kernel, client) == (1, True, CONTEXT)
