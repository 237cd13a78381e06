"""The kernel's ledger is compared with a model of it. After each call, in any order, both have the same charges.

hypothesis chooses the calls, in programs of two tenants of one group. Every limit is low enough to be reached.
"""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fgpu_ebpf import abi
from fgpu_ebpf.abi import Shared
from fgpu_ebpf.ledger.process_entry import Process
from tests.bpf import model
from tests.bpf.conftest import SECONDS, Client, Kernel, Level, anomalies, entries, leave_levels, wait_until
from tests.bpf.model import Call, Entry, Life

MOST_PROGRAMS = 2
POOL, CONTEXT_KIND = int(abi.Kind.POOL), int(abi.Kind.CONTEXT)
IMPOSSIBLE = ("RELEASE", "FULL", "DEVICE", "LOST")
sizes = st.integers(1, 1 << 20)
limits = st.integers(1 << 18, 1 << 22)
programs = st.integers(0, MOST_PROGRAMS - 1)
places = st.integers(0, 1)  # few pointers and handles, so that they are reused
outcomes = st.sampled_from([0, 0, 0, 1])  # results of a call: most succeed
libraries = st.sampled_from([True, True, True, False])  # most calls are of the host's library


@dataclass
class Program:
    """A process and its tenant."""

    client: Client
    tenant: int
    life: Life = field(default_factory=Life)
    is_host: bool = True  # whether it calls the host's library
    parked: int = 0
    parked_life: tuple[int, int] | None = None  # its entry in `parked`


@dataclass
class Left:
    """Bytes that an exited process has left at the levels that it had."""

    tgid: int
    number: int  # number of the process's generation
    turn: int
    bytes: int
    levels: tuple[int, ...]


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
        self.orphans: list[Left] = []
        self.left: Counter[int] = Counter()  # entries of exited processes, by level
        self.managed_freed = kernel.ledger.orphans.managed_freed(0)
        self.numbers = itertools.count(1)
        self.lives = itertools.count(1)
        self.before = anomalies(kernel)

    # -- the model

    def used(self, level: int) -> int:
        """Return what counts against a level's limit: parked bytes count for their own tenant alone."""
        held = sum(p.life.bytes() - (p.parked if level == 2 else 0) for p in self.programs if level in (p.tenant, 2))
        return held + self.orphaned[level]

    def parked(self, level: int) -> int:
        return sum(p.parked for p in self.programs if p.tenant == level)

    def fits(self, program: Program, bytes_: int) -> bool:
        return all(self.used(level) + bytes_ <= self.limits[level] for level in (program.tenant, 2))

    def orphan(self, program: Program, bytes_: int, tgid: int = 0, number: int = 0) -> None:
        """Orphan bytes of a program, or of a child of the program."""
        tgid, number, turn = tgid or program.client.pid, number or program.life.number, program.life.turn
        if not bytes_:
            return
        levels = (program.tenant, 2)
        for level in levels:
            self.orphaned[level] += bytes_
        for one in self.orphans:
            if (one.tgid, one.number, one.turn) == (tgid, number, turn if number == program.life.number else 0):
                one.bytes += bytes_
                return
        self.orphans.append(Left(tgid, number, turn if number == program.life.number else 0, bytes_, levels))

    def some(self, which: int) -> Program:
        """Return a program that is not parked: as after a restore, it is woken whatever the limits are."""
        program = self.any_one(which)
        if program.parked_life:
            assert self.kernel.ledger.parked.wake(program.parked_life, force=True) == 0
            self.end_park(program)
        return program

    def any_one(self, which: int) -> Program:
        return self.programs[which % len(self.programs)]

    def end_park(self, program: Program) -> None:
        assert program.parked_life
        assert self.kernel.ledger.parked.end(program.parked_life) == 0
        program.parked, program.parked_life = 0, None

    def known(self) -> list[Program]:
        """Return the programs with a call by their first thread."""
        return [program for program in self.programs if program.life.home >= 0]

    def seen(self, which: int) -> Program:
        """Return a program that makes a call next. The kernel has an entry for it from then on."""
        program = self.some(which)
        if program.life.home < 0:
            program.life = Life(number=next(self.lives), home=program.tenant)
        return program

    def calls(self, which: int, is_host: bool = True) -> Program:
        """Return a program that calls the driver, with this library."""
        program = self.seen(which)
        program.life.enter()
        if program.is_host != is_host:
            program.is_host = is_host
            program.client(f"use_driver({str(self.kernel.driver if is_host else self.kernel.unknown)!r})")
        return program

    def end(self, program: Program) -> None:
        """End a program, and orphan all memory that it held."""
        life = program.life
        life.enter()
        self.orphan(program, life.bytes() - program.parked)
        program.parked, program.parked_life = 0, None
        self.managed_freed += life.managed
        self.forget_life(program)

    def forget_life(self, program: Program) -> None:
        self.managed_freed += program.life.managed_freed
        for entry in program.life.entries():
            self.left[entry.home] += 1
        program.life = Life()

    # -- programs

    @precondition(lambda self: len(self.programs) < MOST_PROGRAMS)
    @rule(tenant=st.integers(0, 1))
    def begin(self, tenant: int) -> None:
        client = Client(self.kernel, self.levels[tenant], later=self.levels[:2])
        self.programs.append(Program(client, tenant))

    @precondition(lambda self: self.programs)
    @rule(which=programs)
    def kill(self, which: int) -> None:
        program = self.any_one(which)
        program.client.kill()
        self.end(program)
        self.programs.remove(program)

    @precondition(lambda self: self.programs)
    @rule(which=programs)
    def execute(self, which: int) -> None:
        program = self.any_one(which)
        program.client.send("os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])")
        program.client.begin(self.levels[program.tenant].cgroup)
        program.is_host = True
        self.end(program)

    @precondition(lambda self: self.programs)
    @rule(which=programs, size=sizes, call=st.sampled_from(["alloc", "managed"]))
    def fork(self, which: int, size: int, call: str) -> None:
        """Fork a child that allocates memory and exits."""
        program = self.some(which)
        child = program.client(f"fork() or ({call}(0x1000, {size}), os._exit(0))")
        self.orphan(program, size + model.CONTEXT, child, next(self.lives))
        self.managed_freed += size if call == "managed" else 0
        self.left[program.tenant] += 1

    @precondition(lambda self: self.programs)
    @rule(which=programs)
    def move(self, which: int) -> None:
        """Move a program to the other tenant, and its charges as the agent moves them. A parked one cannot be moved."""
        program = self.any_one(which)
        if program.parked_life:
            to = self.levels[1 - program.tenant].cgroup, self.levels[2].cgroup
            assert not self.kernel.ledger.move(*program.parked_life, to)
            return
        program.tenant = 1 - program.tenant
        level = self.levels[program.tenant]
        (level.path / "cgroup.procs").write_text(str(program.client.pid))
        process = program.client.entry(self.kernel)
        if process:
            levels = (level.cgroup, self.levels[2].cgroup)
            assert self.kernel.ledger.move(program.client.pid, process.generation, levels)
            program.life.turn += 1
        program.client(f"use_page({program.client.pages[level.cgroup]})")

    @precondition(lambda self: self.programs)
    @rule(which=programs)
    def forget(self, which: int) -> None:
        """Move a program out of all managed cgroups until its next call. This removes its charges."""
        program = self.any_one(which)
        process = program.client.entry(self.kernel)
        if process:
            if program.parked_life:
                assert not self.kernel.ledger.move(program.client.pid, process.generation, ())
                return
            leave_levels(self.kernel, program.client)
            self.forget_life(program)

    # -- parking

    @precondition(lambda self: self.known())
    @rule(which=programs)
    def park(self, which: int) -> None:
        """Park a program, or again if it has been charged since."""
        program = self.known()[which % len(self.known())]
        process = program.client.entry(self.kernel)
        program.parked_life = program.client.pid, process.generation
        assert self.kernel.ledger.parked.begin(program.parked_life) == 0
        assert self.kernel.ledger.parked.park(program.parked_life) == 0
        program.parked = program.life.bytes()

    @precondition(lambda self: any(program.parked_life for program in self.programs))
    @rule(which=programs, size=sizes)
    def admit_while_parked(self, which: int, size: int) -> None:
        """Request admission for a call that then waits in the driver."""
        away = [program for program in self.programs if program.parked_life]
        program = away[which % len(away)]
        program.life.leave_unsettled()
        fits = self.fits(program, size)
        assert program.client(f"admit({size})") == (abi.Verdict.ADMITTED if fits else abi.Verdict.REFUSED)
        program.life.asked, program.life.granted = True, fits
        program.life.admitted = size if fits else 0

    @precondition(lambda self: any(program.parked_life for program in self.programs))
    @rule(which=programs)
    def wake(self, which: int) -> None:
        """Wake a program, if its bytes fit in the group."""
        away = [program for program in self.programs if program.parked_life]
        program = away[which % len(away)]
        fits = self.used(2) + program.parked <= self.limits[2]
        assert self.kernel.ledger.parked.wake(program.parked_life) == (
            0 if fits or not program.parked else errno.ENOSPC
        )
        if fits or not program.parked:
            self.end_park(program)

    # -- requests

    @precondition(lambda self: self.programs)
    @rule(which=programs, size=sizes, kind=st.sampled_from([0, POOL, CONTEXT_KIND]))
    def admit(self, which: int, size: int, kind: int) -> None:
        program = self.seen(which)
        life = program.life
        life.leave_unsettled()
        size = model.CONTEXT if kind == CONTEXT_KIND else size
        fits = self.fits(program, size)
        verdict = program.client(f"admit({size}, kind={kind})")
        assert verdict == (abi.Verdict.ADMITTED if fits else abi.Verdict.REFUSED)
        life.asked, life.granted = kind != POOL, fits
        if fits and kind == POOL:
            life.pool += size
        elif fits:
            life.admitted = size

    @precondition(lambda self: self.programs)
    @rule(which=programs, size=sizes)
    def give_back(self, which: int, size: int) -> None:
        """Release bytes of a pool, if it has that many."""
        program = self.some(which)
        if program.life.pool >= size:
            program.client(f"give_back({size})")
            self.orphan(program, program.life.give_back(size))

    @precondition(lambda self: self.known())
    @rule(which=programs, size=sizes)
    def ask_in_a_thread_that_ends(self, which: int, size: int) -> None:
        program = self.known()[which % len(self.known())]
        if self.fits(program, size):
            program.life.overhead += size
        program.client(f"cuda.thread_admits_and_ends(u64({size}))")
        self.wait_for_threads(program)

    @precondition(lambda self: self.known())
    @rule(which=programs, size=sizes, managed=st.integers(0, 1))
    def end_a_thread_in_a_call(self, which: int, size: int, managed: int) -> None:
        """End a thread during a call, which may have allocated the bytes."""
        program = self.known()[which % len(self.known())]
        program.life.loose_managed += size if managed else 0
        program.life.overhead += 0 if managed else size
        program.client(f"cuda.thread_ends_inside(u64({size}), {managed})")
        self.wait_for_threads(program)

    def wait_for_threads(self, program: Program) -> None:
        """Wait for joined threads: before Linux 6.16 a join may return before the kernel records the end."""
        busy = 1 if program.life.admitted or program.life.late or program.life.call else 0
        wait_until(lambda: (p := program.client.entry(self.kernel)) and p.begun - p.changes == busy)

    # -- pointers

    @precondition(lambda self: self.programs)
    @rule(
        which=programs, at=places, size=sizes, call=st.sampled_from(["alloc", "managed"]), code=outcomes, host=libraries
    )
    def allocate(self, which: int, at: int, size: int, call: str, code: int, host: bool) -> None:
        """Allocate.

        If the pointer is in use already, its free was not recorded, or the call returned a forged pointer.
        """
        program = self.calls(which, host)
        code = code if call == "alloc" else 0
        charged = max(program.life.take_over() or 0, size)
        program.client(f"{call}({0x1000 * (at + 1)}, {size}{', code=1' if code else ''})")
        if not code:
            program.life.allocate()
            new = Entry(charged, program.tenant, managed=call == "managed")
            self.orphan(program, program.life.name_pointer(at, new))

    @precondition(lambda self: self.programs)
    @rule(which=programs, at=places, code=outcomes, host=libraries)
    def free(self, which: int, at: int, code: int, host: bool) -> None:
        """Free a pointer, which may be unknown."""
        program = self.calls(which, host)
        program.client(f"free({0x1000 * (at + 1)}, code={code})")
        if code:
            program.life.fail_to_free(at, host, program.tenant)
        else:
            self.orphan(program, program.life.free(at, host))

    @precondition(lambda self: self.programs)
    @rule(which=programs, size=sizes, managed=st.booleans())
    def leave(self, which: int, size: int, managed: bool) -> None:
        """Leave a call by longjmp. Bytes that were not admitted are charged if they fit, and else at the next call."""
        call = self.some(which).life.call
        size += bool(call and call.asked == size)  # for the ledger, a repeated call is the same call
        program = self.calls(which)
        kept = program.life.admitted
        has = max(program.life.take_over() or 0, size)
        program.life.call = Call(has if self.fits(program, has) else kept, size, managed, has)
        program.client(f"cuda.allocate_and_leap(u64({size}), {int(managed)})")

    @precondition(lambda self: self.programs)
    @rule(which=programs, at=places, code=outcomes, export=st.sampled_from(["export_pointer", "export_range"]))
    def export(self, which: int, at: int, code: int, export: str) -> None:
        """Export a pointer, so that another process may have it open."""
        entry = self.some(which).life.pointers.get(at)
        if entry and not entry.gone:
            self.calls(which).client(f"{export}({0x1000 * (at + 1)}, code={code})")
            entry.exported = entry.exported or not code

    @precondition(lambda self: self.programs)
    @rule(which=programs, code=outcomes)
    def export_a_pool(self, which: int, code: int) -> None:
        program = self.calls(which)
        program.client(f"export_pool(code={code})")
        program.life.exports_pools = program.life.exports_pools or not code

    # -- handles

    @precondition(lambda self: self.programs)
    @rule(which=programs, size=sizes, code=outcomes, at=places, again=outcomes, host=libraries)
    def create(self, which: int, size: int, code: int, at: int, again: int, host: bool) -> None:
        """Create a handle, seldom with a name that exists."""
        program = self.calls(which, host)
        known = self.handle_of(program, at) if again else None
        handle = next(self.numbers) if known is None else known
        charged = max(program.life.take_over() or 0, size)
        program.client(f"create({handle}, {size}, code={code})")
        if not code:
            program.life.name_handle(handle, Entry(charged, program.tenant))

    def handle_of(self, program: Program, at: int) -> int | None:
        handles = sorted(program.life.handles)
        return handles[at % len(handles)] if handles else None

    @precondition(lambda self: self.programs)
    @rule(
        which=programs,
        at=places,
        what=st.sampled_from(["map", "retain", "release", "export"]),
        code=outcomes,
        host=libraries,
    )
    def use_handle(self, which: int, at: int, what: str, code: int, host: bool) -> None:
        handle = self.handle_of(self.some(which), at)
        if handle is None:
            return
        program = self.calls(which, host)
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
                    program.life.frees_nothing = program.life.frees_nothing or not host
                    self.orphan(program, program.life.drop(handle))
                elif entry.references == 1:
                    entry.home = program.tenant
            case "export":
                program.client(f"export({handle}, code={code})")
                entry.exported = entry.exported or not code

    @precondition(lambda self: self.programs)
    @rule(which=programs, at=places, code=outcomes, host=libraries)
    def unmap(self, which: int, at: int, code: int, host: bool) -> None:
        mapped = sorted(self.some(which).life.mappings)
        if not mapped:
            return
        program = self.calls(which, host)
        pointer = mapped[at % len(mapped)]
        program.client(f"unmap({pointer}, 4096, code={code})")
        if not code:
            program.life.frees_nothing = program.life.frees_nothing or not host
            self.orphan(program, program.life.drop(program.life.mappings.pop(pointer).owner))

    # -- contexts

    @precondition(lambda self: self.programs)
    @rule(which=programs, code=outcomes, host=libraries)
    def retain(self, which: int, code: int, host: bool) -> None:
        program = self.calls(which, host)
        admitted = program.life.take_over()
        program.client(f"retain(code={code})")
        if not code:
            program.life.retain(admitted)
            program.life.context_entries.setdefault(0, Entry(0, program.tenant))

    @precondition(lambda self: self.programs)
    @rule(which=programs, code=outcomes, host=libraries)
    def make_context(self, which: int, code: int, host: bool) -> None:
        program = self.calls(which, host)
        admitted, handle = program.life.take_over(), next(self.numbers)
        program.client(f"context({handle}, code={code})")
        if not code:
            program.life.begin_context(model.CONTEXT if admitted is None else admitted)
            program.life.context_entries[handle] = Entry(0, program.tenant)

    @precondition(lambda self: self.programs)
    @rule(
        which=programs,
        at=places,
        what=st.sampled_from(["primary_release", "primary_reset", "destroy"]),
        code=outcomes,
        host=libraries,
    )
    def end_context(self, which: int, at: int, what: str, code: int, host: bool) -> None:
        """End a context. The last one releases the bytes of an admission; a call that has them is charged again."""
        handles = sorted(self.some(which).life.context_entries.keys() - {0})
        program = self.calls(which, host)
        if what == "destroy" and not handles:
            program.client(f"destroy({next(self.numbers)}, code={code})")
            if host and not code:
                program.life.end_unseen()
        elif what == "destroy":
            self.destroy(program, handles[at % len(handles)], code, host)
        else:
            program.client(f"{what}()")
            end = program.life.release_primary if what == "primary_release" else program.life.end_primary
            self.orphan(program, end() if host else 0)

    def destroy(self, program: Program, handle: int, code: int, host: bool) -> None:
        program.client(f"destroy({handle}, code={code})")
        if code and host:
            program.life.context_entries[handle].home = program.tenant
        elif host:
            del program.life.context_entries[handle]
            self.orphan(program, program.life.end_context())

    # -- the agent

    @rule(level=st.integers(0, 2), bytes_=limits)
    def limit(self, level: int, bytes_: int) -> None:
        self.levels[level].limit(bytes_)
        self.limits[level] = bytes_

    @precondition(lambda self: self.programs)
    @rule(which=programs, size=sizes, is_below=st.booleans())
    def correct(self, which: int, size: int, is_below: bool) -> None:
        """Correct the overhead, which only NVML shows. The kernel refuses that during a call.

        `is_below`: the program does not use as many bytes of its pools.
        """
        program = self.some(which)
        size = -min(size, program.life.pool) if is_below else size
        process = program.client.entry(self.kernel)
        if not process:
            return
        quiet = not program.life.admitted and not program.life.late and not program.life.call
        done = self.kernel.ledger.overhead(program.client.pid, process.generation, 0, size, process.changes)
        assert done == quiet == process.quiet
        if done:
            program.life.overhead = size

    @precondition(lambda self: self.programs)
    @rule(which=programs, is_listed=st.booleans())
    def list_contexts(self, which: int, is_listed: bool) -> None:
        """Tell the kernel that NVML lists a program, or does not. The kernel refuses that during a call."""
        program = self.some(which)
        process = program.client.entry(self.kernel)
        if not process:
            return
        quiet = not program.life.admitted and not program.life.late and not program.life.call
        tell = self.kernel.ledger.context_seen if is_listed else self.kernel.ledger.context_gone
        assert tell(program.client.pid, process.generation, 0, process.changes) == quiet
        if quiet and is_listed:
            program.life.show_context()
        elif quiet:
            program.life.hide_context()

    @precondition(lambda self: self.orphans)
    @rule(which=st.integers(0, 100), size=sizes)
    def let_go(self, which: int, size: int) -> None:
        """Release a part of an orphan, or all of it."""
        left = self.orphans[which % len(self.orphans)]
        orphans = {(o.tgid, o.turn, o.bytes): o for o in self.kernel.ledger.orphans.entries()}
        orphan = orphans[left.tgid, left.turn, left.bytes]
        assert self.kernel.ledger.orphans.let_go(orphan, size)
        some = min(size, left.bytes)
        left.bytes -= some
        if not left.bytes:
            self.orphans.remove(left)
        for level in left.levels:
            self.orphaned[level] -= min(some, self.orphaned[level])

    @rule(level=st.integers(0, 2))
    def disown(self, level: int) -> None:
        if self.orphaned[level]:
            assert not self.kernel.ledger.orphans.disown(self.levels[level].cgroup, 0, self.orphaned[level] + 1)
            assert self.kernel.ledger.orphans.disown(self.levels[level].cgroup, 0, self.orphaned[level])
            self.orphaned[level] = 0

    @rule()
    def sweep(self) -> None:
        self.kernel.ledger.sweep()
        self.left.clear()

    # -- at each check

    def seen_levels(self) -> list[tuple[int, ...]]:
        """Return bytes, orphaned bytes and the entries in each map, for each level."""
        found = []
        for level in self.levels:
            usage = level.usage()
            assert usage.peak >= usage.used
            found.append(
                (usage.used, usage.parked, usage.orphaned, *(entries(self.kernel, level, shared) for shared in Shared))
            )
        return found

    def modelled_levels(self) -> list[tuple[int, ...]]:
        of = Counter(self.left)
        for program in self.programs:
            of.update(entry.home for entry in program.life.entries())
        homes = Counter(program.life.home for program in self.programs)
        held = [self.used(n) - self.parked(n) for n in range(3)]
        return [(held[n], self.parked(n), self.orphaned[n], of[n], homes[n], homes[n]) for n in range(3)]

    @invariant()
    def agree(self) -> None:
        assert self.seen_levels() == self.modelled_levels()
        for program in self.programs:
            assert_same(program.client.entry(self.kernel), program.life)
        freed = self.managed_freed + sum(program.life.managed_freed for program in self.programs)
        assert self.kernel.ledger.orphans.managed_freed(0) == freed
        self.agree_on_orphans()
        after = anomalies(self.kernel)
        assert {kind: after[kind] - self.before[kind] for kind in IMPOSSIBLE} == dict.fromkeys(IMPOSSIBLE, 0)

    def agree_on_orphans(self) -> None:
        cgroups = [level.cgroup for level in self.levels]
        of_ours = [o for o in self.kernel.ledger.orphans.entries() if o.levels[-1] == cgroups[2]]
        found = sorted((o.tgid, o.turn, o.bytes, o.levels) for o in of_ours)
        expected = [(o.tgid, o.turn, o.bytes, tuple(cgroups[n] for n in o.levels)) for o in self.orphans]
        assert found == sorted(expected)

    def teardown(self) -> None:
        for program in self.programs:
            program.client.kill()
            self.end(program)
        self.programs.clear()
        self.sweep()
        try:
            wait_until(lambda: self.seen_levels() == self.modelled_levels(), SECONDS)
        finally:
            for level in self.levels:
                level.remove()


def assert_same(process: Process | None, life: Life) -> None:
    """Compare the charges of one process in the kernel with the model."""
    modelled = life.bytes(), life.managed, life.pool, life.overhead, life.contexts, life.ended, life.unseen
    found = (0,) * len(modelled)
    if process:
        all_ = (process.bytes[0] + process.parked[0],)
        each = all_, process.managed, process.pool, process.overhead, process.contexts, process.ended
        each = *each, (process.is_unseen(0),)
        found = tuple(numbers[0] for numbers in each)
    assert found == modelled


@pytest.mark.timeout(3600)
def test_the_ledger_equals_its_model(kernel: Kernel, scale: Callable[[int, int, int], int]) -> None:
    settings = hypothesis.settings(
        max_examples=scale(5, 40, 200),
        stateful_step_count=100,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    kernel.ledger.set_context_bytes(0, model.CONTEXT)
    try:
        run_state_machine_as_test(lambda: States(kernel), settings=settings)
    finally:
        kernel.ledger.set_context_bytes(0, 0)
