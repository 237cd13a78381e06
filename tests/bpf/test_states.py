"""The kernel's ledger beside a model of it: whatever is called, in whatever order, both hold the same after each step.

hypothesis chooses what happens, in programs of two tenants of one group, with every limit near enough to be met.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis
import hypothesis.strategies as st
import pytest
from conftest import SECONDS, Client, Kernel, Level, anomalies, entries, wait_until
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fgpu_ebpf import pages
from fgpu_ebpf.pages import Shared

MOST_PROGRAMS = 2
POOL = int(pages.Kind.POOL)
IMPOSSIBLE = ("RELEASE", "FULL", "DEVICE", "LOST")
sizes = st.integers(1, 1 << 20)
limits = st.integers(1 << 18, 1 << 22)
whom = st.integers(0, MOST_PROGRAMS - 1)
places = st.integers(0, 1)  # pointers and handles, few: they come again
outcomes = st.sampled_from([0, 0, 0, 1])  # of a call: most succeed


@dataclass
class Entry:
    """An allocation, as the ledger should have it."""

    bytes: int
    home: int  # the level that counts it
    managed: bool = False
    exported: bool = False
    references: int = 1
    owner: int = -1  # of a mapping: its handle


@dataclass
class Life:
    """A process from its first call to its end, or until nobody manages it."""

    admitted: int = 0  # and not settled
    called: int = 0  # by a call that never returned
    pool: int = 0
    overhead: int = 0
    home: int = -1  # the level that counts it; below 0: it has not called yet
    pointers: dict[int, Entry] = field(default_factory=dict)
    handles: dict[int, Entry] = field(default_factory=dict)
    mappings: dict[int, Entry] = field(default_factory=dict)

    def of_calls(self) -> list[Entry]:
        """What holds bytes."""
        return [*self.pointers.values(), *self.handles.values()]

    def bytes(self) -> int:
        """All that is charged."""
        return sum(e.bytes for e in self.of_calls()) + self.admitted + self.called + self.pool + self.overhead


@dataclass
class Program:
    """A process and the tenant that it is in."""

    client: Client
    tenant: int
    life: Life = field(default_factory=Life)


class States(RuleBasedStateMachine):
    """Two tenants in a group: levels 0 and 1, the group is 2."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel
        group = Level(kernel, 6 << 20)
        self.levels = [Level(kernel, 4 << 20, group.path), Level(kernel, 4 << 20, group.path), group]
        self.limits = [4 << 20, 4 << 20, 6 << 20]
        self.programs: list[Program] = []
        self.orphaned = [0, 0, 0]
        self.left: Counter[int] = Counter()  # entries of the ended, by level
        self.numbers = itertools.count(1)
        self.before = anomalies(kernel)

    # -- the model

    def used(self, level: int) -> int:
        held = sum(p.life.bytes() for p in self.programs if level in (p.tenant, 2))
        return held + self.orphaned[level]

    def fits(self, program: Program, bytes_: int) -> bool:
        return all(self.used(level) + bytes_ <= self.limits[level] for level in (program.tenant, 2))

    def orphan(self, program: Program, bytes_: int) -> None:
        for level in (program.tenant, 2):
            self.orphaned[level] += bytes_

    def some(self, who: int) -> Program:
        return self.programs[who % len(self.programs)]

    def calls(self, who: int, enters: bool = True) -> Program:
        """One that calls; what it was in the middle of is over, if this is a call of the driver."""
        program = self.some(who)
        if program.life.home < 0:
            program.life.home = program.tenant
        if enters:
            program.life.called = 0
        return program

    def end(self, program: Program) -> None:
        """Its life is over; what others may have open is nobody's yet."""
        life = program.life
        self.orphan(program, sum(e.bytes for e in life.of_calls() if e.exported))
        for entry in (*life.of_calls(), *life.mappings.values()):
            self.left[entry.home] += 1
        program.life = Life()

    def settle(self, program: Program, bytes_: int) -> int:
        """What a call that was asked for or not is charged."""
        charged = max(program.life.admitted, bytes_)
        program.life.admitted = 0
        return charged

    # -- programs

    @precondition(lambda self: len(self.programs) < MOST_PROGRAMS)
    @rule(tenant=st.integers(0, 1))
    def begin(self, tenant: int) -> None:
        client = Client(self.kernel, self.levels[tenant], later=self.levels[:2])
        self.programs.append(Program(client, tenant))

    @precondition(lambda self: self.programs)
    @rule(who=whom)
    def kill(self, who: int) -> None:
        program = self.some(who)
        program.client.kill()
        self.end(program)
        self.programs.remove(program)

    @precondition(lambda self: self.programs)
    @rule(who=whom)
    def execute(self, who: int) -> None:
        program = self.some(who)
        program.client.send("os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])")
        program.client.begin(self.levels[program.tenant].cgroup)
        self.end(program)

    @precondition(lambda self: self.programs)
    @rule(who=whom, size=sizes)
    def fork(self, who: int, size: int) -> None:
        """A child takes memory and ends with it."""
        program = self.some(who)
        program.client(f"fork() or (alloc(0x1000, {size}), os._exit(0))")
        self.left[program.tenant] += 1

    @precondition(lambda self: self.programs)
    @rule(who=whom)
    def move(self, who: int) -> None:
        """To the other tenant, and the agent follows."""
        program = self.some(who)
        program.tenant = 1 - program.tenant
        level = self.levels[program.tenant]
        (level.path / "cgroup.procs").write_text(str(program.client.pid))
        process = program.client.entry(self.kernel)
        if process:
            assert self.kernel.ledger.move(
                program.client.pid, process.generation, (level.cgroup, self.levels[2].cgroup)
            )
        program.client(f"use_page({program.client.pages[level.cgroup]})")

    @precondition(lambda self: self.programs)
    @rule(who=whom)
    def forget(self, who: int) -> None:
        """Nobody manages it until it calls again."""
        program = self.some(who)
        process = program.client.entry(self.kernel)
        if process:
            assert self.kernel.ledger.move(program.client.pid, process.generation, ())
            for entry in program.life.of_calls():
                entry.exported = False
            self.end(program)

    # -- asking

    @precondition(lambda self: self.programs)
    @rule(who=whom, size=sizes, kind=st.sampled_from([0, POOL]))
    def admit(self, who: int, size: int, kind: int) -> None:
        program = self.calls(who, enters=False)
        program.life.admitted = 0
        fits = self.fits(program, size)
        verdict = program.client(f"admit({size}, kind={kind})")
        assert verdict == (pages.Verdict.ADMITTED if fits else pages.Verdict.REFUSED)
        if fits and kind == POOL:
            program.life.pool += size
        elif fits:
            program.life.admitted = size

    @precondition(lambda self: self.programs)
    @rule(who=whom, size=sizes)
    def give_back(self, who: int, size: int) -> None:
        """Of a pool, what there is of it."""
        program = self.some(who)
        if program.life.home < 0 or program.life.pool < size:
            return
        program.client(f"shim.fgpu_release(0, u64({size}), {POOL}, u64({next(self.numbers)}))")
        program.life.pool -= size

    @precondition(lambda self: self.programs)
    @rule(who=whom, size=sizes)
    def ask_in_a_thread_that_ends(self, who: int, size: int) -> None:
        program = self.calls(who, enters=False) if self.some(who).life.home >= 0 else None
        if program:
            program.client(f"cuda.thread_admits_and_ends(u64({size}))")

    # -- pointers

    @precondition(lambda self: self.programs)
    @rule(who=whom, at=places, size=sizes, call=st.sampled_from(["alloc", "managed"]), code=outcomes)
    def allocate(self, who: int, at: int, size: int, call: str, code: int) -> None:
        """A pointer that is in use already had an end that nobody saw."""
        program = self.calls(who)
        code = code if call == "alloc" else 0
        charged = self.settle(program, size)
        program.client(f"{call}({0x1000 * (at + 1)}, {size}{', code=1' if code else ''})")
        if not code:
            old = program.life.pointers.get(at)
            if old and old.exported:
                self.orphan(program, old.bytes)
            home = old.home if old else program.tenant
            program.life.pointers[at] = Entry(charged, home, managed=call == "managed")

    @precondition(lambda self: self.programs)
    @rule(who=whom, at=places, code=outcomes)
    def free(self, who: int, at: int, code: int) -> None:
        """Of something or nothing."""
        program = self.calls(who)
        program.client(f"free({0x1000 * (at + 1)}, code={code})")
        entry = program.life.pointers.get(at)
        if entry and code:
            entry.home = program.tenant  # it has been entered anew
        elif entry:
            del program.life.pointers[at]
            if entry.exported:
                self.orphan(program, entry.bytes)

    @precondition(lambda self: self.programs)
    @rule(who=whom, size=sizes)
    def leave(self, who: int, size: int) -> None:
        """A call that never returns: of what it was not admitted it is charged what fitted when it began."""
        program = self.calls(who)
        admitted, fits = program.life.admitted, self.fits(program, size - program.life.admitted)
        charged = self.settle(program, size)
        program.life.called = charged if fits else admitted
        program.client(f"cuda.allocate_and_leap(u64({size}))")

    @precondition(lambda self: self.programs)
    @rule(who=whom, at=places)
    def export(self, who: int, at: int) -> None:
        """To somebody, perhaps."""
        program = self.some(who)
        if at in program.life.pointers:
            self.calls(who).client(f"export_pointer({0x1000 * (at + 1)})")
            program.life.pointers[at].exported = True

    # -- handles

    @precondition(lambda self: self.programs)
    @rule(who=whom, size=sizes, code=outcomes)
    def create(self, who: int, size: int, code: int) -> None:
        program = self.calls(who)
        handle = next(self.numbers)
        charged = self.settle(program, size)
        program.client(f"create({handle}, {size}, code={code})")
        if not code:
            program.life.handles[handle] = Entry(charged, program.tenant)

    def handle_of(self, program: Program, at: int) -> int | None:
        handles = sorted(program.life.handles)
        return handles[at % len(handles)] if handles else None

    def drop(self, program: Program, handle: int) -> None:
        entry = program.life.handles[handle]
        entry.references -= 1
        if not entry.references:
            del program.life.handles[handle]
            if entry.exported:
                self.orphan(program, entry.bytes)

    @precondition(lambda self: self.programs)
    @rule(who=whom, at=places, what=st.sampled_from(["map", "retain", "release", "export"]), code=outcomes)
    def use_handle(self, who: int, at: int, what: str, code: int) -> None:
        program = self.some(who)
        handle = self.handle_of(program, at)
        if handle is None:
            return
        self.calls(who)
        entry = program.life.handles[handle]
        match what:
            case "map":
                pointer = next(self.numbers) << 32
                program.client(f"map_({pointer}, 4096, {handle}, code={code})")
                if not code:
                    entry.references += 1
                    program.life.mappings[pointer] = Entry(0, program.tenant, owner=handle)
            case "retain":
                program.client(f"retain_handle({handle}, 0)")
                entry.references += 1
            case "release":
                program.client(f"release({handle}, code={code})")
                if not code:
                    self.drop(program, handle)
                elif entry.references == 1:
                    entry.home = program.tenant
            case "export":
                program.client(f"export({handle}, code={code})")
                entry.exported = entry.exported or not code

    @precondition(lambda self: self.programs)
    @rule(who=whom, at=places, code=outcomes)
    def unmap(self, who: int, at: int, code: int) -> None:
        program = self.some(who)
        mapped = sorted(program.life.mappings)
        if not mapped:
            return
        self.calls(who)
        pointer = mapped[at % len(mapped)]
        program.client(f"unmap({pointer}, 4096, code={code})")
        if not code:
            self.drop(program, program.life.mappings.pop(pointer).owner)

    # -- the agent

    @rule(level=st.integers(0, 2), bytes_=limits)
    def limit(self, level: int, bytes_: int) -> None:
        self.levels[level].limit(bytes_)
        self.limits[level] = bytes_

    @precondition(lambda self: self.programs)
    @rule(who=whom, size=sizes)
    def correct(self, who: int, size: int) -> None:
        """What NVML alone knows; refused in the middle of anything."""
        program = self.some(who)
        process = program.client.entry(self.kernel)
        if not process:
            return
        quiet = not program.life.admitted and not program.life.called
        done = self.kernel.ledger.overhead(program.client.pid, process.generation, 0, size, process.changes)
        assert done == quiet == process.quiet
        if done:
            program.life.overhead = size

    @rule(level=st.integers(0, 2))
    def disown(self, level: int) -> None:
        if self.orphaned[level]:
            assert not self.kernel.ledger.disown(self.levels[level].cgroup, 0, self.orphaned[level] + 1)
            assert self.kernel.ledger.disown(self.levels[level].cgroup, 0, self.orphaned[level])
            self.orphaned[level] = 0

    @rule()
    def sweep(self) -> None:
        self.kernel.ledger.sweep()
        self.left.clear()

    # -- at each check

    def seen(self) -> list[tuple[int, ...]]:
        """Of each level: bytes, orphaned bytes, entries in each map."""
        found = []
        for level in self.levels:
            usage = level.usage()
            assert usage.peak >= usage.used
            found.append((usage.used, usage.orphaned, *(entries(self.kernel, level, shared) for shared in Shared)))
        return found

    def modelled(self) -> list[tuple[int, ...]]:
        of = Counter(self.left)
        for program in self.programs:
            of.update(e.home for e in (*program.life.of_calls(), *program.life.mappings.values()))
        homes = Counter(program.life.home for program in self.programs)
        return [(self.used(n), self.orphaned[n], of[n], homes[n], homes[n]) for n in range(3)]

    @invariant()
    def agree(self) -> None:
        assert self.seen() == self.modelled()
        for program in self.programs:
            process = program.client.entry(self.kernel)
            managed = sum(e.bytes for e in program.life.pointers.values() if e.managed)
            assert (process.managed[0] if process else 0) == managed
        after = anomalies(self.kernel)
        assert {kind: after[kind] - self.before[kind] for kind in IMPOSSIBLE} == dict.fromkeys(IMPOSSIBLE, 0)

    def teardown(self) -> None:
        for program in self.programs:
            program.client.kill()
            self.end(program)
        self.programs.clear()
        self.sweep()
        try:
            wait_until(lambda: self.seen() == self.modelled(), SECONDS)
        finally:
            for level in self.levels:
                level.remove()


@pytest.mark.timeout(3600)
def test_the_ledger_is_its_model(kernel: Kernel, scale: Callable[[int, int, int], int]) -> None:
    settings = hypothesis.settings(
        max_examples=scale(5, 40, 200),
        stateful_step_count=100,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(lambda: States(kernel), settings=settings)
