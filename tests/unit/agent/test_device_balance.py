"""Random operations on a device, with reads of NVML at any time. Released bytes equal the freed bytes within 32 MiB."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis.internal.conjecture import providers
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from fgpu_ebpf.agent import ledger_corrections, nvml_reconcile, orphan_release
from fgpu_ebpf.agent.device_balance import CALM_LOOKS, LOOKS
from fgpu_ebpf.agent.nvml_reconcile import Reconciler
from fgpu_ebpf.agent.orphan_release import CONTEXT_REST_BYTES
from fgpu_ebpf.driver import device_sample
from fgpu_ebpf.linux import procfs
from tests.unit.agent.device_kit import Client, Handle, Managed, Operation, World
from tests.unit.agent.ledger_kit import CONTEXT
from tests.unit.orphan_kit import MIB

SIZE = 256 * MIB
REST = 32 * MIB  # bytes in use that are in no process's row; as many orphaned bytes may be released too early
MOST_CLIENTS = 3
sizes = st.integers(1, 4).map(lambda n: n * SIZE)
a_client = st.integers(0, MOST_CLIENTS - 1)
which = st.integers(0, 2)


@pytest.fixture(autouse=True)
def world_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sample, "APART_SECONDS", 0)
    monkeypatch.setattr(orphan_release, "SLACK_AFTER_NS", 1 << 62)
    monkeypatch.setattr(procfs, "cgroup_path", lambda _: None)
    monkeypatch.setattr(procfs, "ended", lambda _: False)
    monkeypatch.setattr(
        ledger_corrections, "_is_alive", ledger_corrections._is_alive
    )  # each Machine replaces this function, and monkeypatch restores it
    monkeypatch.setattr(nvml_reconcile, "_alive", nvml_reconcile._alive)
    # Each example makes a Reconciler, and a Wakeup never closes its descriptor.
    monkeypatch.setattr(nvml_reconcile, "Wakeup", lambda: SimpleNamespace(wake=lambda: None))


class Machine(RuleBasedStateMachine):
    """Processes of tenants on one device, and the reconcile thread.

    `running`: operations that have begun, each with its client and the managed memory that it allocates. `steps`: for
    each read of a reconciliation, the last read first, the number of the operation that continues before the read (0:
    none). Hidden memory is memory in no row of NVML. `disturbed`: hidden memory changed while there were orphans, so
    that the reconcile thread cannot distinguish the two. `is_hidden_newer`: hidden memory has changed since the last
    reconciliation that may have raised the estimate: no operation ran, no process was unmanaged, freed_and_changes()
    had not changed, and no process had a spare(). `seen`: freed_and_changes() at the last reconciliation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.between)
        self.running: list[tuple[Client, Operation, int]] = []
        self.steps: list[int] = []
        self.is_slow = False
        self.disturbed = False
        self.is_hidden_newer = False
        self.seen: dict[int, int] = {}
        self.reconciler = Reconciler(self.world.nvml, self.world.ledger, lambda _: ())
        ledger_corrections._is_alive = nvml_reconcile._alive = self.world.is_alive

    def between(self) -> None:
        """Continue the operation that `steps` names for this read."""
        if self.steps and self.running:
            step = self.steps.pop()
            if step:
                self.advance(step - 1)

    def advance(self, n: int) -> None:
        client, operation, _ = self.running[n % len(self.running)]
        self.disturb_hidden(client)
        try:
            next(operation)
        except StopIteration:
            self.running = [one for one in self.running if one[1] is not operation]

    def start(self, client: Client, operation: Operation, managed: int = 0) -> None:
        self.disturb_hidden(client)
        if self.is_slow:
            next(operation)
            self.running.append((client, operation, managed))
        else:
            list(operation)

    def living(self) -> list[Client]:
        return [client for client in self.world.device.clients if client.is_alive and not client.is_stranger]

    def strangers(self) -> list[Client]:
        return [client for client in self.world.device.clients if client.is_stranger]

    def some(self, n: int) -> Client | None:
        """Return a client that is not ending a context: such an end would free memory that another call adds."""
        found = [client for client in self.living() if not client.is_ending_context]
        return found[n % len(found)] if found else None

    def busy(self, client: Client) -> bool:
        return any(one[0] is client for one in self.running)

    def disturb(self) -> None:
        self.is_hidden_newer = True
        self.disturbed = self.disturbed or bool(self.world.ledger.kept)

    def disturb_hidden(self, client: Client) -> None:
        if not client.contexts or self.world.device.in_no_row(client):
            self.disturb()

    # -- processes

    @initialize(has_managed=st.booleans(), has_orphan=st.booleans())
    def populate(self, has_managed: bool, has_orphan: bool) -> None:
        """Start with an orphan that is still held, and other memory: most errors need both."""
        self.begin(False, True)
        self.begin(False, True)
        if has_managed:
            self.take_managed(0, 4 * SIZE)
        if has_orphan:
            self.kill(1, 1)

    @precondition(lambda self: len(self.living()) < MOST_CLIENTS)
    @rule(reuses=st.booleans(), makes_context=st.booleans())
    def begin(self, reuses: bool, makes_context: bool) -> None:
        dead = [client.pid for client in self.world.device.clients if not client.is_alive]
        living = {client.pid for client in self.world.device.clients if client.is_alive}
        free = [pid for pid in dead if pid not in living]
        client = self.world.begin(free[0] if reuses and free else None)
        if makes_context:
            list(self.world.make_context(client))

    @rule(n=a_client, keepers=st.sampled_from([0, 0, 1]))
    def kill(self, n: int, keepers: int) -> None:
        for client in self.living()[n : n + 1]:
            has_hidden = bool(client.managed or self.world.device.in_no_row(client))  # see Hidden: an unknown part
            self.disturbed = self.disturbed or self.is_hidden_newer or has_hidden
            client.never_seen = min(client.grown + client.pool, max(self.uncharged(client), self.missing()))
            managed = sum(one[2] for one in self.running if one[0] is client)
            self.running = [one for one in self.running if one[0] is not client]
            self.world.end(client, managed, keepers)

    @rule(n=a_client, keepers=st.sampled_from([0, 0, 1]))
    def execute(self, n: int, keepers: int) -> None:
        for client in self.living()[n : n + 1]:
            self.kill(n, keepers)
            list(self.world.make_context(self.world.begin(client.pid)))

    @rule(n=which)
    def clean(self, n: int) -> None:
        dead = [client for client in self.world.device.clients if not client.is_alive]
        if dead and not dead[n % len(dead)].keepers:
            self.world.device.clean(dead[n % len(dead)])

    @rule(n=which)
    def keeper_closes(self, n: int) -> None:
        kept = [client for client in self.world.device.clients if client.keepers]
        if kept:
            kept[n % len(kept)].keepers = 0

    # -- memory

    @rule(is_slow=st.booleans())
    def pace(self, is_slow: bool) -> None:
        """Set whether operations that begin later may be interrupted, or complete at once."""
        self.is_slow = is_slow

    @precondition(lambda self: self.running)
    @rule(n=which)
    def go_on(self, n: int) -> None:
        self.advance(n)

    @rule(n=a_client, bytes_=sizes, succeeds=st.booleans())
    def take(self, n: int, bytes_: int, succeeds: bool) -> None:
        client = self.some(n)
        if client and client.contexts:
            self.start(client, self.world.take(client, bytes_, succeeds))

    @rule(n=a_client)
    def free(self, n: int) -> None:
        client = self.some(n)
        if client and client.plain and not self.busy(client):
            self.start(client, self.world.free(client, client.plain[0]))

    @rule(n=a_client, bytes_=sizes)
    def admit(self, n: int, bytes_: int) -> None:
        client = self.some(n)
        if client:
            self.start(client, self.world.admit(client, bytes_))

    @rule(n=a_client, bytes_=sizes)
    def take_managed(self, n: int, bytes_: int) -> None:
        client = self.some(n)
        if client and client.contexts:
            self.start(client, self.world.take_managed(client, bytes_), bytes_)

    @rule(n=a_client, bytes_=sizes)
    def touch(self, n: int, bytes_: int) -> None:
        client = self.some(n)
        for managed in client.managed if client else ():
            self.disturb()
            managed.resident = min(managed.bytes, managed.resident + bytes_)

    @rule(n=a_client)
    def free_managed(self, n: int) -> None:
        client = self.some(n)
        if client and client.managed and not self.busy(client):
            self.disturb()
            self.start(client, self.world.free_managed(client, client.managed[0]))

    @rule(n=a_client)
    def make_context(self, n: int) -> None:
        client = self.some(n)
        if client and client.contexts < 2:
            self.start(client, self.world.make_context(client))

    @rule(n=a_client)
    def end_context(self, n: int) -> None:
        client = self.some(n)
        if client and client.contexts and not self.busy(client):
            self.disturb()
            self.start(client, self.world.end_context(client))

    @rule(n=a_client, bytes_=sizes)
    def admit_pool(self, n: int, bytes_: int) -> None:
        client = self.some(n)
        if client:
            self.disturb_hidden(client)
            self.world.admit_pool(client, bytes_)

    @rule(n=a_client, bytes_=sizes)
    def give_back_pool(self, n: int, bytes_: int) -> None:
        client = self.some(n)
        if client:
            self.disturb_hidden(client)
            self.world.give_back_pool(client, min(bytes_, self.world.ledger.entries[client.pid].pool - client.pool))

    @rule(n=a_client, part=st.integers(0, 4))
    def use_pool(self, n: int, part: int) -> None:
        client = self.some(n)
        if client and client.contexts:
            client.pool = self.world.ledger.entries[client.pid].pool * part // 4

    @rule(n=a_client, bytes_=st.integers(0, 4).map(lambda n: n * SIZE))
    def grow(self, n: int, bytes_: int) -> None:
        """Change the memory that only the driver counts. A single reconciliation may fail to detect the change."""
        client = self.some(n)
        if client and client.contexts and not self.busy(client):
            client.grown = bytes_

    # -- handles

    @rule(n=a_client, bytes_=sizes)
    def create(self, n: int, bytes_: int) -> None:
        client = self.some(n)
        if client:
            self.start(client, self.world.create(client, bytes_))

    def handle(self, n: int, fits: Callable[[Handle], object]) -> Handle | None:
        found = [handle for handle in self.world.device.handles if fits(handle)]
        return found[n % len(found)] if found else None

    @rule(n=which)
    def export(self, n: int) -> None:
        handle = self.handle(n, lambda one: one.maker and one.maker.is_alive and not self.busy(one.maker))
        if handle:
            handle.is_exported = True
            handle.descriptors += 1

    @rule(n=which)
    def release(self, n: int) -> None:
        handle = self.handle(n, lambda one: one.maker and one.maker.is_alive and not self.busy(one.maker))
        if handle and handle.maker:
            self.disturbed = self.disturbed or (handle.is_exported and self.is_hidden_newer)
            self.start(handle.maker, self.world.release(handle.maker, handle))

    @rule(n=which, importer=a_client)
    def import_(self, n: int, importer: int) -> None:
        client, handle = self.some(importer), self.handle(n, lambda one: one.descriptors)
        if client and handle and handle.maker is not client and client not in handle.importers:
            self.world.import_(client, handle)

    @rule(n=which)
    def close(self, n: int) -> None:
        handle = self.handle(n, lambda one: one.descriptors)
        if handle:
            handle.descriptors -= 1
            self.world.device.free_unused(handle)

    @rule(n=which)
    def drop(self, n: int) -> None:
        handle = self.handle(n, lambda one: one.importers and one.importers[0].is_alive)
        if handle:
            del handle.importers[0]
            self.world.device.free_unused(handle)

    # -- unmanaged processes

    @rule(n=st.integers(0, 1), bytes_=sizes, managed=st.sampled_from([0, SIZE, 4 * SIZE]))
    def stranger(self, n: int, bytes_: int, managed: int) -> None:
        """Start an unmanaged process, or change its memory."""
        found = self.strangers()
        stranger = found[n] if n < len(found) else self.world.begin(is_stranger=True)
        stranger.contexts, stranger.plain, stranger.managed = 1, [bytes_], [Managed(managed, managed)]

    @rule(n=st.integers(0, 1))
    def stranger_ends(self, n: int) -> None:
        found = self.strangers()
        if n < len(found):
            self.world.device.clean(found[n])

    # -- comparisons

    @rule(steps=st.lists(st.integers(0, 3), max_size=20), is_full=st.booleans())
    def look(self, steps: list[int], is_full: bool) -> None:
        self.steps = steps
        moved, before = {one[0].pid for one in self.running}, self.freed_and_changes()
        has_freed = any(before.get(key) != value for key, value in self.seen.items())
        has_spare = any(map(self.spare, self.living()))
        self.reconciler.look(is_full)
        is_newer = self.is_hidden_newer and bool(steps or self.running or self.strangers() or has_spare)
        self.is_hidden_newer = is_newer or has_freed or self.freed_and_changes() != before
        self.seen = before
        self.steps = []
        unseen = sum(client.grown + client.pool for client in self.living() if client.pid in moved)
        assert self.missing() <= REST + unseen, f"{self.missing() // MIB} MiB are held and not charged"

    def spare(self, client: Client) -> int:
        """Return the charge beyond what NVML shows, as of unused pool bytes. A pass counts it as in use."""
        entry = self.world.ledger.entries[client.pid]
        return max(0, entry.bytes - entry.managed - self.world.device.in_row(client))

    def freed_and_changes(self) -> dict[int, int]:
        """Return what reduces the estimate of hidden memory in a pass, if it has changed since the pass before.

        These are the freed managed bytes (key 0), and the changes of processes without a context, by pid. A correction
        is also such a change. Only the next pass without one can raise the estimate.
        """
        entries = self.world.ledger.entries
        changes = {client.pid: entries[client.pid].changes for client in self.living() if not client.contexts}
        return {0: self.world.ledger.freed, **changes}

    @rule(n=st.sampled_from([1, CALM_LOOKS, CALM_LOOKS + 1]))
    def looks(self, n: int) -> None:
        for _ in range(n):
            self.look([], False)

    def missing(self) -> int:
        """Return the bytes that tenants hold beyond their charges, except bytes that no reconciliation could detect."""
        device = self.world.device
        never_seen = sum(client.never_seen for client in device.clients)
        return device.of_tenants() - self.world.ledger.total() - never_seen

    @rule()
    def settle(self) -> None:
        """Reconcile until nothing changes."""
        while self.running:
            self.advance(0)
        for client in list(self.world.device.clients):
            if not client.is_alive and not client.keepers:
                self.world.device.clean(client)
        for _ in range(LOOKS + CALM_LOOKS):
            self.look([], False)
        self.all_is_released()

    def all_is_released(self) -> None:
        """Check that orphans have no more bytes than outlive their processes.

        Exceptions are REST, what the driver uses for contexts of ended processes, which NVML does not count, and bytes
        that hidden memory or a later process with the same pid may explain.
        """
        device, orphaned = self.world.device, self.world.ledger.orphaned()
        rest = REST + CONTEXT_REST_BYTES * sum(client.contexts for client in device.clients if not client.is_alive)
        unknown = sum(map(device.in_no_row, device.clients)) if self.is_hidden_unknown() else device.pools_in_no_row()
        assert orphaned <= device.kept() + rest + unknown + sum(map(self.unproven, self.living())), (
            f"{(orphaned - device.kept()) // MIB} MiB stay charged"
        )
        self.disturbed = self.disturbed and bool(self.world.ledger.kept)

    def unproven(self, client: Client) -> int:
        """Return the orphaned bytes that may be in a client's row.

        Probes witness only the memory of calls. One context also belongs to the client, if the ledger has charged its
        bytes. All other bytes (pools, contexts beyond the first, imported handles, and what only the driver counts) may
        also be those of an earlier process with the pid.
        """
        if not client.contexts:
            return 0
        entry, device = self.world.ledger.entries[client.pid], self.world.device
        kept = sum(orphan.bytes for orphan in self.world.ledger.kept.values() if orphan.tgid == client.pid)
        made = sum(handle.bytes for handle in device.handles if handle.maker is client)
        proven = sum(client.plain) + made + min(CONTEXT, entry.overhead + entry.pool)
        return max(0, min(kept, device.in_row(client) - proven))

    def uncharged(self, client: Client) -> int:
        entry, device = self.world.ledger.entries[client.pid], self.world.device
        return max(0, device.in_row(client) - entry.bytes + entry.managed)

    def is_hidden_unknown(self) -> bool:
        self.disturbed = self.disturbed or bool(self.strangers())
        return self.disturbed


def test_released_bytes_equal_the_bytes_that_the_device_freed_within_32_mib(
    scale: Callable[[int, int, int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Hypothesis also draws integers from constants of all loaded local modules. Without them a change of another module
    # does not change the sequence of examples.
    monkeypatch.setattr(providers, "_get_local_constants", providers.Constants)
    monkeypatch.setattr(providers, "CONSTANTS_CACHE", {})
    settings = hypothesis.settings(
        max_examples=scale(30, 300, 5000),
        stateful_step_count=60,
        deadline=None,
        phases=set(hypothesis.Phase) - {hypothesis.Phase.explain},
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=settings)


def test_a_context_that_a_call_has_freed_is_not_taken_from_the_orphans_of_its_pid() -> None:
    """The device holds the contexts of two programs that exec() replaced. The third program destroys its context."""
    machine = Machine()
    machine.populate(has_managed=False, has_orphan=True)
    machine.pace(is_slow=True)
    for _ in range(2):
        machine.look([], False)
        machine.execute(0, 0)
    machine.end_context(0)
    machine.look([1], False)
    machine.look([1, 0], False)


def test_a_context_that_an_ended_process_had_destroyed_is_not_taken_from_the_orphans_of_its_pid() -> None:
    """Another process keeps the memory of a program. The next program of that pid destroys its context, and ends."""
    machine = Machine()
    machine.populate(has_managed=False, has_orphan=False)
    machine.execute(keepers=1, n=0)
    machine.settle()
    machine.end_context(n=1)
    machine.kill(keepers=0, n=1)
    machine.settle()


def test_a_pool_that_is_not_in_use_takes_no_part_of_a_row_from_orphans() -> None:
    """The next program of the pid requests pool bytes, and ends its context after it has used some of them."""
    machine = Machine()
    machine.populate(has_managed=False, has_orphan=True)
    machine.execute(keepers=1, n=0)
    machine.admit_pool(bytes_=SIZE, n=0)
    machine.settle()
    machine.use_pool(n=0, part=1)
    machine.end_context(n=0)
    machine.settle()


def test_the_row_of_a_process_that_ends_belongs_to_its_orphans() -> None:
    """The process frees a handle and ends between two passes. Other programs of its pid had ended before."""
    machine = Machine()
    machine.populate(has_managed=False, has_orphan=False)
    machine.take_managed(bytes_=SIZE, n=0)
    machine.begin(makes_context=False, reuses=False)
    machine.execute(keepers=1, n=0)
    machine.execute(keepers=0, n=0)
    machine.kill(keepers=0, n=0)
    machine.create(bytes_=3 * SIZE, n=1)
    machine.settle()
    machine.release(n=0)
    machine.kill(keepers=0, n=1)
    machine.looks(n=1)


def test_programs_that_begin_and_end_between_two_passes_leave_their_row_to_their_orphans() -> None:
    """The device holds the contexts of two programs that exec() replaced. The third program ends its context."""
    machine = Machine()
    machine.populate(has_managed=False, has_orphan=True)
    machine.look([], False)
    machine.execute(keepers=1, n=0)
    machine.execute(keepers=1, n=0)
    machine.looks(n=CALM_LOOKS)
    machine.end_context(n=0)
    machine.kill(keepers=0, n=0)
    machine.look([], False)


def test_orphans_in_no_row_are_not_subtracted_from_the_charge_of_a_later_program() -> None:
    """The previous program exported a handle, and a descriptor keeps it. The driver's memory of the next grows."""
    machine = Machine()
    machine.populate(has_managed=False, has_orphan=True)
    machine.create(bytes_=SIZE, n=0)
    machine.export(n=0)
    machine.execute(keepers=0, n=0)
    machine.make_context(n=0)
    machine.grow(bytes_=SIZE, n=0)
    machine.settle()


def test_managed_memory_of_the_previous_program_is_in_no_row() -> None:
    """The next program has two contexts, and the ledger proves one. Another process has managed memory too."""
    machine = Machine()
    machine.populate(has_managed=True, has_orphan=False)
    machine.touch(bytes_=4 * SIZE, n=0)
    machine.take_managed(bytes_=SIZE, n=1)
    machine.execute(keepers=0, n=0)
    machine.make_context(n=1)
    machine.looks(n=1)


def test_hidden_memory_of_other_processes_raises_no_charge_of_a_later_program() -> None:
    """Another process keeps the memory of the previous program, which is in the row of the pid."""
    machine = Machine()
    machine.populate(has_managed=True, has_orphan=False)
    machine.touch(bytes_=4 * SIZE, n=0)
    machine.begin(makes_context=False, reuses=False)
    machine.create(bytes_=SIZE, n=2)
    machine.execute(keepers=1, n=1)
    machine.looks(n=CALM_LOOKS)
    assert machine.world.ledger.entries[machine.living()[-1].pid].bytes == CONTEXT


def test_an_imported_handle_stays_charged_after_the_last_context_of_the_importer() -> None:
    """The handle was in the row of the importer, so its orphan has been released."""
    machine = Machine()
    machine.populate(has_managed=False, has_orphan=False)
    machine.create(bytes_=SIZE, n=0)
    machine.export(n=0)
    machine.release(n=0)
    machine.import_(importer=0, n=0)
    machine.close(n=0)
    machine.looks(n=CALM_LOOKS + 1)
    machine.end_context(n=0)
    machine.settle()


def test_hidden_memory_is_estimated_in_the_first_pass() -> None:
    """There is an orphan in each later pass, and its memory could also be the hidden memory."""
    machine = Machine()
    machine.populate(has_managed=True, has_orphan=False)
    machine.touch(bytes_=SIZE, n=0)
    machine.looks(n=1)
    machine.kill(keepers=0, n=1)
    machine.settle()


@pytest.mark.parametrize("in_use", [None, 5 * MIB], ids=["bytes in use unknown", "row unknown"])
def test_without_a_sample_any_process_may_be_in_a_call(in_use: int | None) -> None:
    """No byte of a row is proved to belong to a live process if the rows or the bytes in use are unknown."""
    rows = {7: 5 * MIB if in_use is None else None, 8: MIB}
    nvml = SimpleNamespace(process_bytes=lambda _: rows, taken_bytes=lambda _: in_use)
    sample = device_sample.take(nvml, SimpleNamespace(), 0, dict.fromkeys((7, 8)))  # type: ignore[arg-type]
    assert sample
    assert (sample.taken, sample.busy) == ((), {7, 8})
