"""The row that shows shared memory: random lives of four processes, compared with a model at each step."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from subprocess import Popen

import pytest

from .conftest import MIB, Machine, say
from .lifetime_kit import get_descriptor
from .sharing_kit import SHARING, hear

# Evaluates lines of Python and prints the values. Each memory has a number, under which its handles are held.
OBEY = f"{SHARING}\nstart(); held = {{}}\nfor line in sys.stdin: say(eval(line))"
CREATE = "held.setdefault({m}, []).append(create({size}))"
EXPORT = "descriptor(held[{m}][-1])"
IMPORT = "(lambda fd: (held.setdefault({m}, []).append(imported(fd)[1]), os.close(fd)))(take_fd({pid}, {fd}))"
RELEASE = "need('cuMemRelease', held[{m}].pop())"
STEPS = 80
MOST = 4  # memories at the same time: each should belong to several processes


@dataclass
class Memory:
    """A model of the rule.

    Memory is in its maker's row, then in no row while a descriptor is open, then in the row of the newest holder.
    """

    size: int
    holders: list[int]  # one entry for each handle, oldest first
    named: int | None
    files: list[int] = field(default_factory=list)

    def settle(self) -> None:
        if self.named not in self.holders:
            self.named = None
        if self.named is None and not self.files and self.holders:
            self.named = list(dict.fromkeys(self.holders))[-1]


class Lives:
    def __init__(self, machine: Machine, clients: list[Popen[str]], seed: int) -> None:
        self.machine = machine
        self.clients = clients
        self.alive = list(range(len(clients)))
        self.chance = random.Random(seed)
        self.memories: dict[int, Memory] = {}
        self.base = machine.used()
        self.per_client = machine.dump()["devices"][0]["context_bytes"] + 5832704

    def tell(self, client: int, order: str, **words: int) -> str:
        say(self.clients[client], order.format(**words))
        return hear(self.clients[client])

    def create(self) -> None:
        if sum(1 for m in self.memories.values() if m.holders or m.files) == MOST:
            return
        client, number = self.chance.choice(self.alive), len(self.memories)
        size = (2 * MIB) << (number % 10)
        self.tell(client, CREATE, m=number, size=size)
        self.memories[number] = Memory(size, [client], client)

    def held(self) -> tuple[int, Memory, int]:
        found = [(n, m, c) for n, m in self.memories.items() for c in m.holders if c in self.alive]
        return self.chance.choice(found)

    def export(self) -> None:
        number, memory, client = self.held()
        fd = int(self.tell(client, EXPORT, m=number))
        memory.files.append(get_descriptor(self.clients[client].pid, fd))
        self.tell(client, "os.close({fd})", fd=fd)

    def take(self) -> None:
        number, memory = self.chance.choice([(n, m) for n, m in self.memories.items() if m.files])
        client = self.chance.choice(self.alive)
        self.tell(client, IMPORT, m=number, pid=os.getpid(), fd=self.chance.choice(memory.files))
        memory.holders.append(client)

    def release(self) -> None:
        number, memory, client = self.held()
        self.tell(client, RELEASE, m=number)
        memory.holders.reverse()
        memory.holders.remove(client)
        memory.holders.reverse()

    def release_all(self) -> None:
        """Release a memory until the process of its row has no handle of it."""
        number, memory = self.chance.choice([(n, m) for n, m in self.memories.items() if m.named is not None])
        while memory.named in memory.holders:
            self.tell(memory.named, RELEASE, m=number)
            memory.holders.remove(memory.named)

    def close(self) -> None:
        memory = self.chance.choice([m for m in self.memories.values() if m.files])
        os.close(memory.files.pop(self.chance.randrange(len(memory.files))))

    def close_all(self) -> None:
        memory = self.chance.choice([m for m in self.memories.values() if m.files])
        while memory.files:
            os.close(memory.files.pop())

    def kill(self) -> None:
        client = self.alive.pop(self.chance.randrange(len(self.alive)))
        self.clients[client].kill()
        for memory in self.memories.values():
            memory.holders = [holder for holder in memory.holders if holder != client]
        self.base -= self.per_client

    def step(self) -> None:
        """Take one possible step."""
        last = len(self.alive) == 1 or self.chance.random() < 0.7
        act = self.chance.choice(
            [self.create, self.export, self.export, self.take, self.take, self.release, self.close]
        )
        try:
            (act if last or self.chance.random() < 0.8 else self.kill)()
        except IndexError:
            return
        for memory in self.memories.values():
            memory.settle()

    def check(self) -> None:
        there = [m for m in self.memories.values() if m.holders or m.files]
        self.machine.settles_at(self.base + sum(m.size for m in there))
        rows = {p["pid"]: p["vmm_bytes"] for p in self.machine.dump()["processes"]}
        for client in self.alive:
            assert rows[self.clients[client].pid] == sum(m.size for m in there if m.named == client)
        nameless = self.machine.dump()["devices"][0]["exported_bytes"]
        assert nameless == sum(m.size for m in there if m.named is None)


@pytest.fixture
def clients(machine: Machine) -> Iterator[list[Popen[str]]]:
    found = [machine.spawn(OBEY) for _ in range(4)]
    for client in found:
        say(client, "1")
        hear(client)
    yield found
    for client in found:
        client.kill()
        client.communicate()


@pytest.mark.parametrize("seed", range(8))
def test_the_row_of_shared_memory_equals_the_model_at_each_step(
    machine: Machine, clients: list[Popen[str]], seed: int
) -> None:
    lives = Lives(machine, clients, seed)
    for _ in range(STEPS):
        lives.step()
        lives.check()
    for memory in lives.memories.values():
        for file in memory.files:
            os.close(file)
    while lives.alive:
        lives.kill()
    machine.settles_at(0)


def ask(client: Popen[str], order: str) -> str:
    say(client, order)
    return hear(client)


def vmm_and_block(machine: Machine, client: Popen[str]) -> tuple[int, int, int]:
    row = machine.process(client.pid)
    nameless = machine.dump()["devices"][0]["exported_bytes"]
    return row["block_bytes"] // MIB, row["vmm_bytes"] // MIB, nameless // MIB


@pytest.mark.parametrize(
    ("make", "free", "rows"),
    [
        ("held.update(p=alloc(6 << 20))", "need('cuMemFree_v2', held['p'])", ((6, 0, 0), (0, 0, 6))),
        # A small allocation shares a granule of 2 MiB, which stays until all allocations in it are freed.
        ("held.update(q=alloc(4096), p=alloc(8192))", "need('cuMemFree_v2', held['p'])", ((2, 0, 0), (2, 0, 0))),
        (
            "held.update(h=create(6 << 20, 0)), held.update(p=mapped(held['h'], 6 << 20))",
            "(need('cuMemUnmap', held['p'], C.c_size_t(6 << 20)), need('cuMemRelease', held['h']))",
            ((0, 6, 0), (0, 0, 6)),
        ),
    ],
    ids=["plain", "small", "mapped"],
)
def test_a_descriptor_of_a_range_keeps_its_memory(
    machine: Machine, clients: list[Popen[str]], make: str, free: str, rows: tuple[tuple[int, int, int], ...]
) -> None:
    """CUDA does not import the descriptor, but its memory survives the free and the end of its process."""
    client, other = clients[:2]
    ask(client, make)
    result, fd = map(int, ask(client, "range_descriptor(held['p'], 4096)").strip("()").split(", "))
    assert result == 0
    kept = get_descriptor(client.pid, fd)
    ask(client, f"os.close({fd})")
    taken = f"held.update(fd=take_fd({os.getpid()}, {kept})), imported(held['fd'])[0], os.close(held['fd'])"
    assert ask(other, taken) == "(None, 1, None)"
    assert vmm_and_block(machine, client) == rows[0]
    ask(client, free)
    assert vmm_and_block(machine, client) == rows[1]
    client.kill()
    client.wait()
    three = 3 * (machine.dump()["devices"][0]["context_bytes"] + 5832704) + 3407872
    machine.settles_at(three + (sum(rows[1]) or 2) * MIB)
    os.close(kept)
    machine.settles_at(three)


def test_invalid_ranges_are_refused(machine: Machine) -> None:
    script = """
start(); p = alloc(6 << 20); managed, host = C.c_uint64(), C.c_void_p()
need("cuMemAllocManaged", C.byref(managed), C.c_size_t(1 << 20), 1)
need("cuMemAllocHost_v2", C.byref(host), C.c_size_t(4096))
at = lambda offset: C.c_uint64(p.value + offset)
say([range_descriptor(*words)[0] for words in ((p, 0), (p, 100), (at(1), 4096), (at(4096), 6 << 20), (managed, 4096),
     (C.c_uint64(host.value), 4096), (C.c_uint64(4096), 4096), (at(4096), 4096))])
fd = C.c_int(); ask = lambda *words: L.cuMemGetHandleForAddressRange(*words)
say(ask(None, p, C.c_size_t(4096), 1, C.c_uint64(0)), ask(C.byref(fd), p, C.c_size_t(4096), 2, C.c_uint64(0)),
    ask(C.byref(fd), p, C.c_size_t(4096), 1, C.c_uint64(2)))
"""
    assert machine.python(SHARING + script) == ["[1, 1, 1, 1, 1, 1, 1, 0]", "1 1 1"]


def test_two_processes_share_the_memory_of_a_pool(machine: Machine, clients: list[Popen[str]]) -> None:
    """Both processes read the same contents.

    While the other process has the pool, freed memory stays allocated, in no row, and is reused.
    """
    one, two = clients[:2]
    ask(one, "held.update(pool=pool()), held.update(p=pooled(held['pool'], 40 << 20)), put(held['p'], b'first')")
    fd, text = ask(one, "pool_descriptor(held['pool'])"), ask(one, "pool_export(held['p'])")
    ask(
        two,
        f"held.update(fd=take_fd({one.pid}, {fd})), held.update(pool=pool_imported(held['fd'])), os.close(held['fd'])",
    )
    ask(one, f"os.close({fd})")
    seen = ask(two, f"held.update(p=pool_pointer(held['pool'][1], '{text}')), held['p'][0], get(held['p'][1], 5)")
    assert seen == "(None, 0, 'first')"
    pools = lambda: [machine.process(c.pid)["pool_bytes"] // MIB for c in (one, two)]  # noqa: E731
    nameless = lambda: machine.dump()["devices"][0]["exported_bytes"] // MIB  # noqa: E731
    ask(two, "put(held['p'][1], b'other')")
    assert ask(one, "get(held['p'], 5)") == "other"
    assert (pools(), nameless()) == ([64, 0], 0)
    ask(one, "held.update(q=pooled(held['pool'], 40 << 20))")
    assert (pools(), nameless()) == ([96, 0], 0)
    ask(one, "freed(held['p'])")
    assert (pools(), nameless()) == ([64, 0], 32)
    assert ask(two, "get(held['p'][1], 5)") == "other"
    ask(one, "held.update(p=pooled(held['pool'], 40 << 20))")
    assert (pools(), nameless()) == ([96, 0], 0)
    assert ask(two, "L.cuMemPoolDestroy(held['pool'][1])") == "1"
    ask(two, "freed(held['p'][1])")
    ask(one, "freed(held['q'])")
    assert (pools(), nameless()) == ([64, 0], 32)
    assert ask(two, "L.cuMemPoolDestroy(held['pool'][1])") == "0"
    assert (pools(), nameless()) == ([64, 0], 0)


def test_an_imported_pool_cannot_allocate(machine: Machine) -> None:
    script = """
start(); own = pool(); p = pooled(own, 1 << 20); fd = pool_descriptor(own); result, other = pool_imported(fd)
out = C.c_uint64()
say(result, L.cuMemAllocFromPoolAsync(C.byref(out), C.c_size_t(1), other, None), L.cuDeviceSetMemPool(0, other))
say(imported(fd)[0], pool_imported(descriptor(create(2 << 20)))[0], pool_imported(os.open("/dev/null", 0))[0])
text = pool_export(p); freed(p)
say(pool_pointer(other, text)[0], pool_pointer(other, "00" * 64)[0], pool_pointer(own, text)[0])
"""
    assert machine.python(SHARING + script) == ["0 1 1", "1 1 1", "1 1 1"]


def test_pools_leave_no_descriptor_in_the_server(machine: Machine) -> None:
    before = machine.descriptors()
    script = """
start()
for _ in range(30):
    one = pool(); p = pooled(one, 1 << 20); fd = pool_descriptor(one); other = pool_imported(fd)[1]; os.close(fd)
    q = pool_pointer(other, pool_export(p))[1]; freed(q); freed(p)
    need("cuMemPoolDestroy", other); need("cuMemPoolDestroy", one)
p = alloc(1 << 20)
for _ in range(30): os.close(range_descriptor(p, 4096)[1])
need("cuMemFree_v2", p); say("done"); ask()
"""
    with machine.spawn(SHARING + script) as client:
        assert hear(client) == "done"
        machine.has_descriptors(before + 2)
        assert machine.process(client.pid)["pool_bytes"] == 0
        say(client)
    machine.settles_at(0)
    machine.has_descriptors(before)
