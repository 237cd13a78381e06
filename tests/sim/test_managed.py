"""Managed memory is on a device from its first use there.

It is allocated in chunks for all processes, and is in no process's row.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from subprocess import Popen
from typing import Any

import pytest

from .conftest import MIB, Machine, say
from .faults_kit import order
from .lifetime_kit import FILES, KEEPERS, compute_rows
from .sharing_kit import hear

CONTEXT = 518
CHUNK = 128
OVERHEAD = 5832704  # bytes of a context, in no process's row

# Functions for client scripts, with sizes in MiB. OBEY also evaluates each line of stdin, and prints the value.
MANAGED = f"""
{FILES}
start(); first = info()[0]
def taken(): return (first - info()[0]) >> 20
def managed(mib):
    at = C.c_uint64()
    need("cuMemAllocManaged", C.byref(at), C.c_size_t(mib << 20), 1)
    return at
def touch(at, offset, mib): return L.cuMemsetD8_v2(C.c_uint64(at.value + (offset << 20)), 1, C.c_size_t(mib << 20))
def bring(at, mib, device): return L.cuMemPrefetchAsync(at, C.c_size_t(mib << 20), device, None)
"""
OBEY = f"{MANAGED}\nheld = []\nsay('ready')\nfor line in sys.stdin: say(eval(line))"


def obey(client: Popen[str], line: str) -> str:
    say(client, line)
    return hear(client)


def books(machine: Machine, device: int = 0) -> dict[str, Any]:
    """Return the dump's entry of a device. Fail if its sums are wrong."""
    dump = machine.dump()
    found, rows = dump["devices"][device], [row for row in dump["processes"] if row["device"] == device]
    assert found["managed_resident_bytes"] == sum(row["managed_resident_bytes"] for row in rows)
    assert found["managed_chunk_bytes"] == -(-found["managed_resident_bytes"] // (CHUNK * MIB)) * CHUNK * MIB
    assert found["used_bytes"] == found["driver_bytes"] + sum(row["bytes"] for row in rows)
    return found


def test_managed_memory_is_on_a_device_from_its_first_use_there(machine: Machine) -> None:
    """Each granule counts once. A prefetch to the host leaves granules on the device, and only a free removes them."""
    script = """
at = managed(300); say(taken()); wait()
say(touch(at, 0, 2), touch(at, 1, 2), taken()); wait()
data = C.create_string_buffer(8); offset = C.c_uint64(at.value + (100 << 20))
say(L.cuMemcpyHtoD_v2(offset, data, C.c_size_t(8)), L.cuMemcpyDtoH_v2(data, offset, C.c_size_t(8)), taken()); wait()
say(bring(at, 300, 0), bring(at, 300, -1), taken()); wait()
other = managed(10); say(touch(other, 0, 10), L.cuMemFree_v2(at), taken()); wait()
say(L.cuMemFreeAsync(other, None), L.cuMemFreeAsync(C.c_uint64(other.value + 8), None), taken()); wait()
say(L.cuMemFree_v2(other), L.cuMemFreeAsync(alloc(4 << 20), None), L.cuCtxSynchronize(), taken()); wait()
"""
    with machine.spawn(MANAGED + script) as client:
        for words, asked, resident in (
            ("0", 300, 0),
            ("0 0 128", 300, 4),
            ("0 0 128", 300, 6),
            ("0 0 384", 300, 300),
            ("0 0 128", 10, 10),
            ("801 1 128", 10, 10),
            ("0 0 0 0", 0, 0),
        ):
            assert hear(client) == words
            assert books(machine)["managed_resident_bytes"] == resident * MIB
            row = machine.process(client.pid)
            assert (row["managed_bytes"], row["managed_resident_bytes"]) == (asked * MIB, resident * MIB)
            assert row["bytes"] == CONTEXT * MIB
            assert compute_rows(machine) == {client.pid: CONTEXT}
            say(client)


def test_graphs_use_managed_memory_when_they_are_launched(machine: Machine) -> None:
    script = """
at = managed(8); s = stream(); graph, execute = C.c_void_p(), C.c_void_p()
need("cuStreamBeginCapture_v2", s, 0); need("cuMemsetD8Async", at, 1, C.c_size_t(8 << 20), s)
need("cuStreamEndCapture", s, C.byref(graph))
need("cuGraphInstantiateWithFlags", C.byref(execute), graph, C.c_uint64(0)); say(taken())
need("cuGraphLaunch", execute, s); say(taken())
"""
    assert machine.python(MANAGED + script) == ["0", "128"]


def test_processes_share_chunks(machine: Machine) -> None:
    with machine.spawn(OBEY) as one, machine.spawn(OBEY) as other:
        assert [hear(one), hear(other)] == ["ready", "ready"]
        for client in (one, other):
            assert obey(client, "touch(managed(2), 0, 2)") == "0"
            assert books(machine)["managed_chunk_bytes"] == CHUNK * MIB
        assert obey(other, "touch(managed(126), 0, 126)") == "0"
        assert books(machine)["managed_chunk_bytes"] == 2 * CHUNK * MIB
        assert compute_rows(machine) == {one.pid: CONTEXT, other.pid: CONTEXT}
        used = machine.used()
        one.kill()
        machine.settles_at(used - CONTEXT * MIB - OVERHEAD - CHUNK * MIB)
        assert books(machine)["managed_resident_bytes"] == 128 * MIB
        other.kill()
    machine.settles_at(0)


@pytest.mark.parametrize("end", ['need("cuDevicePrimaryCtxReset_v2", 0)', 'need("cuDevicePrimaryCtxRelease_v2", 0)'])
def test_the_end_of_the_context_frees_managed_memory(make_machine: Callable[..., Machine], end: str) -> None:
    """The memory is freed on each device that has a part of it."""
    machine = make_machine(FGPU_SIM_GPUS="2")
    script = f"at = managed(200); say(touch(at, 0, 10), bring(at, 200, 1)); wait(); {end}; say('ended'); wait()"
    with machine.spawn(MANAGED + script) as client:
        assert hear(client) == "0 0"
        assert [books(machine, i)["managed_resident_bytes"] // MIB for i in range(2)] == [10, 200]
        assert [machine.process(client.pid, i)["bytes"] // MIB for i in range(2)] == [CONTEXT, 0]
        say(client)
        assert hear(client) == "ended"
        assert machine.dump()["processes"] == []
        assert [books(machine, i)["managed_chunk_bytes"] for i in range(2)] == [0, 0]


@pytest.mark.parametrize("way", KEEPERS)
def test_managed_memory_stays_until_the_last_close(machine: Machine, way: str) -> None:
    with machine.spawn(f"{MANAGED}\ntouch(managed(200), 0, 200); say('ready'); serve()") as client:
        assert hear(client) == "ready"
        end = KEEPERS[way](client)
        client.kill()
        client.wait()
        time.sleep(0.3)
        assert books(machine)["managed_chunk_bytes"] == 2 * CHUNK * MIB
        assert compute_rows(machine) == {client.pid: CONTEXT}
        end()
    machine.settles_at(0)


def test_managed_memory_without_room_stays_on_the_host(make_machine: Callable[..., Machine]) -> None:
    """The use of this memory is no error. Granules that are used once there is room move to the device."""
    machine = make_machine(FGPU_SIM_MEMORY="4GiB")
    script = """
ballast = alloc((info()[0] - (64 << 20)) >> 21 << 21); at = managed(100); before = taken()
say(touch(at, 0, 100), bring(at, 100, 0), taken() - before)
need("cuMemFree_v2", ballast); before = taken(); say(touch(at, 50, 2), taken() - before)
"""
    assert machine.python(MANAGED + script) == ["0 0 0", "0 128"]


def test_no_memory_moves_to_the_device_after_an_ecc_error(machine: Machine) -> None:
    with machine.spawn(OBEY) as client:
        assert hear(client) == "ready"
        obey(client, "held.append(managed(300)) or touch(held[0], 0, 4)")
        order(machine, "ecc")
        obey(client, "bring(held[0], 300, 0)")
        assert books(machine)["managed_resident_bytes"] == 4 * MIB
        client.kill()
    machine.settles_at(0)


ACTS = (
    "held.append((managed(s := {size}), s)) or touch(held[-1][0], 0, s)",
    "held.append((managed(s := {size}), s)) or s",
    "[touch(at, min({offset}, size - 1), 1) for at, size in held]",
    "[bring(at, size, {device}) for at, size in held[-2:]]",
    "held and L.cuMemFree_v2(held.pop({at} % len(held))[0])",
    "held.clear() or need('cuDevicePrimaryCtxReset_v2', 0) or start()",
)


@pytest.mark.parametrize("seed", range(5))
def test_the_sums_of_managed_memory_are_right_at_each_step(make_machine: Callable[..., Machine], seed: int) -> None:
    """Several processes act in any order. Nothing is left in the end."""
    chance = random.Random(seed)
    machine = make_machine(FGPU_SIM_GPUS="2", FGPU_SIM_MEMORY="4GiB")
    with ExitStack() as stack:
        clients = [stack.enter_context(machine.spawn(OBEY)) for _ in range(3)]
        assert [hear(client) for client in clients] == ["ready"] * 3
        for _ in range(40):
            numbers = {"size": chance.randrange(1, 300), "offset": chance.randrange(300)}
            line = chance.choice(ACTS).format(device=chance.randrange(-1, 2), at=chance.randrange(9), **numbers)
            obey(chance.choice(clients), line)
            for device in range(2):
                books(machine, device)
        for client in clients:
            client.kill()
    machine.settles_at(0)
    assert machine.used(1) == 0
