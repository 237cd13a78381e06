"""The end of a context: which memory is freed, which stays, and which row of NVML shows it then."""

from __future__ import annotations

import pytest

from .conftest import MIB, Machine, say
from .lifetime_kit import compute_rows
from .sharing_kit import SHARING, hear

CONTEXT = 518
OVERHEAD = 3407872  # while a process is initialised
LAST_ENDS = ("need('cuDevicePrimaryCtxReset_v2', 0)", "need('cuDevicePrimaryCtxRelease_v2', 0)")
HOLD = f"""
{SHARING}
def streamed(size):
    pointer = C.c_uint64()
    need("cuMemAllocAsync", C.byref(pointer), C.c_size_t(size), None); need("cuStreamSynchronize", None)
    return pointer
def reserved():
    pool, value = C.c_void_p(), C.c_uint64()
    need("cuDeviceGetDefaultMemPool", C.byref(pool), 0)
    need("cuMemPoolGetAttribute", pool, 5, C.byref(value))
    return value.value >> 20
start()
"""


@pytest.mark.parametrize("end", LAST_ENDS)
def test_pools_and_mapped_memory_survive_the_last_context(machine: Machine, end: str) -> None:
    """Pools and mapped memory stay on the device, in no row until there is a context again.

    Plain and managed memory is freed.
    """
    script = f"""
p = alloc(10 << 20); managed = C.c_uint64(); need("cuMemAllocManaged", C.byref(managed), C.c_size_t(1 << 20), 1)
h = create(6 << 20, 0); mapped(h, 6 << 20); pooled = streamed(40 << 20); say('holding'); ask()
{end}; say('ended'); ask()
start(); say(L.cuMemFree_v2(p), L.cuMemFree_v2(managed), reserved()); ask()
freed(pooled); say(reserved()); ask()
need("cuMemRelease", h); say("released"); ask()
"""
    with machine.spawn(HOLD + script) as client:
        steps = []
        for _ in range(5):
            words = hear(client)
            row = machine.process(client.pid)
            steps.append((words, row["vmm_bytes"] // MIB, row["pool_bytes"] // MIB, row["block_bytes"] // MIB))
            assert compute_rows(machine) == ({client.pid: row["bytes"] // MIB} if row["contexts"] else {})
            device = machine.dump()["devices"][0]
            assert device["used_bytes"] == row["bytes"] + device["driver_bytes"]
            assert row["managed_bytes"] == (MIB if words == "holding" else 0)
            say(client)
    assert steps == [
        ("holding", 6, 64, 10),
        ("ended", 6, 64, 0),
        ("1 1 64", 6, 64, 0),
        ("0", 6, 0, 0),
        ("released", 6, 0, 0),  # its mapping stays
    ]
    machine.settles_at(0)


def test_pools_survive_the_context_that_used_them(machine: Machine) -> None:
    """Allocations from these pools can be freed by address in any other context."""
    script = """
contexts = [C.c_void_p() for _ in range(2)]
held = []
for context in contexts:
    need("cuCtxCreate_v2", C.byref(context), 0, 0); alloc(10 << 20); held.append(streamed(30 << 20))
for context in contexts: need("cuCtxDestroy_v2", context)
start(); say(reserved()); ask()
need("cuMemFree_v2", held[0]); need("cuCtxSynchronize"); say(reserved())
freed(held[1]); say(reserved()); ask()
"""
    with machine.spawn(HOLD + script) as client:
        assert hear(client) == "64"
        assert compute_rows(machine) == {client.pid: CONTEXT + 64}
        say(client)
        assert [hear(client), hear(client)] == ["32", "0"]
        assert compute_rows(machine) == {client.pid: CONTEXT}
        say(client)
    machine.settles_at(0)


def test_a_process_is_listed_on_a_device_with_its_context(machine: Machine) -> None:
    """Mapped memory alone makes no row, neither before the first context nor between two contexts."""
    script = """
need("cuDevicePrimaryCtxRelease_v2", 0); h = create(8 << 20, 0); say("without"); ask()
start(); say("with"); ask(); need("cuDevicePrimaryCtxReset_v2", 0); say("reset"); ask()
"""
    with machine.spawn(HOLD + script) as client:
        for words, rows in (("without", {}), ("with", {client.pid: CONTEXT + 8}), ("reset", {})):
            assert hear(client) == words
            assert compute_rows(machine) == rows
            if not rows:
                assert machine.used() == 8 * MIB + OVERHEAD
            say(client)
    machine.settles_at(0)


def test_a_shared_pool_survives_the_last_context(machine: Machine) -> None:
    script = """
own = pool(); p = pooled(own, 40 << 20); fd = pool_descriptor(own); need("cuDevicePrimaryCtxReset_v2", 0)
say("reset"); ask(); os.close(fd); start(); freed(p); say("freed"); ask()
"""
    with machine.spawn(HOLD + script) as client:
        assert hear(client) == "reset"
        assert machine.used() == 64 * MIB + OVERHEAD
        assert machine.process(client.pid)["pool_bytes"] == 64 * MIB
        say(client)
        assert hear(client) == "freed"
        assert compute_rows(machine) == {client.pid: CONTEXT}
        assert machine.process(client.pid)["pool_bytes"] == 0
        assert machine.dump()["devices"][0]["exported_bytes"] == 0
        say(client)
    machine.settles_at(0)
