"""Tagged answers, which no other process can have written, and requests that wait for orphaned memory."""

from __future__ import annotations

import os
import random
import time

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.ledger import HOST_PROCESSES
from fgpu_ebpf.linux import bpf
from tests.bpf.conftest import MIB, Client, Kernel, Level, entries, page_of, wait_until
from tests.bpf.events_kit import of, reasons

REFUSED, ADMITTED = abi.Verdict.REFUSED, abi.Verdict.ADMITTED
AT = abi.UsagePage.answers.offset
HOST_TAGS = 7


def ask(kernel: Kernel, client: Client, bytes_: int, patient: bool = False) -> int | None:
    """Make a request with the client's own tag."""
    return client(f"ask({client.entry(kernel).tag}, {bytes_}, {AT}, patient={patient})")


@pytest.fixture
def known(kernel: Kernel, level: Level, client: Client) -> Client:
    assert kernel.ledger.enter(client.pid, (level.cgroup,)) == client.entry(kernel)
    return client


# -- tags


def test_a_tagged_request_is_answered_only_at_the_tag(kernel, level, known):
    before = list(page_of(kernel, level).verdicts)
    assert ask(kernel, known, 10 * MIB) == ADMITTED
    assert ask(kernel, known, 1024 * MIB) == REFUSED
    assert list(page_of(kernel, level).verdicts) == before
    known(f"alloc(0x1000, {4 * MIB})")
    assert (level.usage().refused, level.used) == (1, 14 * MIB)


def test_an_untagged_request_gets_no_tagged_answer(kernel, level, known):
    before = list(page_of(kernel, level).answers)
    assert known(f"admit({10 * MIB})") == ADMITTED
    assert list(page_of(kernel, level).answers) == before


@pytest.mark.parametrize(("flags", "field"), [(abi.FREED, "freed_ns"), (abi.Kind.HELLO | abi.CALLED, "called_ns")])
def test_a_report_writes_its_time_to_the_own_level_and_changes_nothing_else(
    kernel, make_level, make_client, flags, field
):
    group = make_level(1024 * MIB)
    level = make_level(1024 * MIB, group)
    client = make_client(level)
    client(f"admit({10 * MIB})")
    client(f"alloc(0x1000, {10 * MIB})")
    before = page_of(kernel, level)
    assert getattr(before, field) == 0
    begun = time.monotonic_ns()
    assert client(f"admit({5 * MIB}, {flags})") is None
    after = page_of(kernel, level)
    assert begun < getattr(after, field) < time.monotonic_ns()
    setattr(before, field, getattr(after, field))
    assert bytes(after) == bytes(before)
    assert getattr(page_of(kernel, group), field) == 0


def test_a_request_that_lacks_room_is_reported_where_room_may_be_made(kernel, events, make_level, make_client):
    group = make_level(1024 * MIB)
    level = make_level(1024 * MIB, group)
    client = make_client(level)
    client(f"admit({10 * MIB})")
    report = f"admit({5 * MIB}, {abi.Kind.HELLO | abi.LACKS}, device=3)"
    group.limit(1024 * MIB, flags=abi.LimitFlag.WAITS)
    assert client(report) is None
    assert of(events, level) == of(events, group) == []
    level.limit(1024 * MIB, flags=abi.LimitFlag.WAITS)
    before = page_of(kernel, level)
    assert client(report) is None
    (event,) = of(events, level)
    assert (event.kind, event.tgid, event.bytes, event.device) == (abi.News.LACKS, client.pid, 5 * MIB, 3)
    after = page_of(kernel, level)
    after.event_second, after.event_count = before.event_second, before.event_count
    assert bytes(after) == bytes(before), "nothing is charged, and no verdict given"
    assert of(events, group) == []


def test_a_decision_about_room_is_written_to_the_page(kernel, level):
    kernel.ledger.parked.decide_on_room(level.cgroup, 2, 1.0)
    now, page = time.monotonic_ns(), page_of(kernel, level)
    assert now < page.room_ns[2] < now + 10**9
    assert page.room_ns[2] & abi.NO_ROOM == 0
    assert [*page.room_ns].count(0) == abi.DEVICES - 1
    kernel.ledger.parked.decide_on_room(level.cgroup, 2, 3600.0)
    until, now = page_of(kernel, level).room_ns[2], time.monotonic_ns()
    assert now + abi.ROOM_NS - 10**9 < until <= now + abi.ROOM_NS, "an agent that ends decides for no longer"
    before = time.monotonic_ns()
    kernel.ledger.parked.decide_on_room(level.cgroup, 2, None)
    decided = page_of(kernel, level).room_ns[2]
    assert decided & abi.NO_ROOM
    assert before < decided <= time.monotonic_ns() + 1
    kernel.ledger.parked.decide_on_room(987654321, 2, 1.0)  # a level that is gone


def test_only_a_program_that_reports_calls_is_recorded_as_one(kernel, level, make_client):
    client = make_client(level)
    assert client(f"admit({MIB}, {abi.Kind.HELLO})") == ADMITTED
    assert not client.entry(kernel).flags & abi.SEEN_CALLED, "a shim of an earlier version"
    assert client(f"admit({MIB}, {abi.Kind.HELLO | abi.CALLED})") is None
    assert client.entry(kernel).flags & abi.SEEN_CALLED


def test_each_process_gets_a_new_tag_at_its_start_and_at_an_exec(kernel, level, make_client):
    tags = []
    for _ in range(3):
        client = make_client(level)
        client(f"admit({MIB})")
        tags.append(client.entry(kernel).tag)
        client.send("os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])")
        client.begin(level.cgroup)
        client(f"admit({MIB})")
        tags.append(client.entry(kernel).tag)
    assert len(set(tags)) == 6
    assert 0 not in tags


def test_tags_wrap_around_without_0(kernel, level, make_client):
    host = bpf.pinned(kernel.pins / "maps/host")
    try:
        bpf.update(host, HOST_TAGS.to_bytes(4, "little"), (2 * (abi.TAG_BITS + 1) - 2).to_bytes(8, "little"))
    finally:
        os.close(host)
    clients = [make_client(level) for _ in range(3)]
    for client in clients:
        client(f"admit({MIB})")
    assert [client.entry(kernel).tag for client in clients] == [abi.TAG_BITS, 1, 1]


def test_no_request_of_another_process_forges_an_expected_answer(kernel, level, known, make_client, scale):
    """The attacker has the victim's tag and ticket, and uses the same page.

    The victim makes no request in this time.
    """
    attacker, tag, ticket = make_client(level), known.entry(kernel).tag, 0x123456789
    attacker(f"admit({MIB})")
    choose = random.Random(7)
    for _ in range(scale(200, 2000, 20_000)):
        said = choose.choice([ticket, tag << 32 | ticket & abi.TICKET_BITS, choose.getrandbits(64)])
        kind = choose.choice([abi.TAGGED, abi.TAGGED | abi.PATIENT, 0, choose.getrandbits(32)])
        attacker(
            f"shim.fgpu_admit({choose.choice([0, 0, 7, 99])}, u64({choose.choice([0, MIB])}), {kind}, u64({said}))"
        )
    page = page_of(kernel, level)
    found = {word >> abi.TAG_SHIFT for word in page.answers if word}
    assert found == {attacker.entry(kernel).tag}


def test_a_ticket_s_upper_bits_never_reach_the_tag(kernel, level, known):
    known(f"shim.fgpu_admit(0, u64({MIB}), {abi.TAGGED}, u64({(1 << 62) - 5}))")
    word = page_of(kernel, level).answers[(1 << 62) - 5 & (abi.VERDICTS - 1)]
    tag = known.entry(kernel).tag
    assert word == tag << abi.TAG_SHIFT | (((1 << 62) - 5) & abi.TICKET_BITS) << 2 | ADMITTED


def test_a_process_without_an_entry_gets_no_tagged_answer(kernel, level, make_level, make_client):
    outside = make_client(make_level(None), page_of=level)
    assert outside(f"ask(1, {MIB}, {AT})") is None
    assert not any(page_of(kernel, level).answers)


# -- entries that the gatekeeper asks for


def test_an_entry_is_created_once_and_keeps_its_tag(kernel, level, client):
    so_far = kernel.ledger._number("host", HOST_PROCESSES)
    entry = kernel.ledger.enter(client.pid, (level.cgroup,))
    assert entry == client.entry(kernel) == kernel.ledger.enter(client.pid, (level.cgroup,))
    assert client.entry(kernel).levels == (level.cgroup,)
    assert kernel.ledger._number("host", HOST_PROCESSES) == so_far + 1
    assert entries(kernel, level, abi.Shared.PROCESSES) == 1
    client(f"alloc(0x1000, {MIB})")
    assert (client.entry(kernel).tag, level.used) == (entry.tag, MIB)


# -- patience


@pytest.fixture
def full(level: Level, make_client) -> Level:
    """Return a level of 1024 MiB with 1000 MiB of orphaned memory."""
    one = make_client(level)
    one(f"alloc(0x1000, {1000 * MIB})")
    one.kill()
    return level


def test_a_patient_request_that_would_fit_without_orphans_is_refused_uncounted(kernel, events, full, known):
    list(events.read())
    assert ask(kernel, known, 1024 * MIB, patient=True) == REFUSED
    assert (full.usage().refused, reasons(kernel, full), of(events, full)) == (0, {}, [])
    assert ask(kernel, known, 1024 * MIB) == REFUSED
    assert (full.usage().refused, len(of(events, full))) == (1, 1)
    full.let_go()
    assert ask(kernel, known, 1024 * MIB, patient=True) == ADMITTED


def test_a_patient_request_that_would_not_fit_in_any_case_is_refused_and_counted(kernel, events, full, known):
    list(events.read())
    assert ask(kernel, known, 1024 * MIB + 1, patient=True) == REFUSED
    known(f"alloc(0x2000, {20 * MIB})")
    assert ask(kernel, known, 1005 * MIB, patient=True) == REFUSED
    assert full.usage().refused == 2
    assert [event.kind for event in of(events, full, abi.News.REFUSED)] == [abi.News.REFUSED] * 2


def test_orphans_of_a_neighbour_in_the_group_leave_a_patient_refusal_uncounted(kernel, make_level, make_client):
    group = make_level(100 * MIB)
    leaf, other = make_level(80 * MIB, group), make_level(80 * MIB, group)
    one, neighbour = make_client(leaf), make_client(other)
    neighbour(f"alloc(0x1000, {60 * MIB})")
    neighbour.kill()
    one(f"admit({MIB})")
    assert ask(kernel, one, 79 * MIB, patient=True) == REFUSED
    assert (leaf.usage().refused, group.usage().refused) == (0, 0)
    assert ask(kernel, one, 80 * MIB, patient=True) == REFUSED
    assert (leaf.usage().refused, group.usage().refused) == (1, 0), "only the group has orphans"


# -- the peak of a process


def test_a_mark_resets_the_peak_of_a_process(kernel, level, client):
    def peak() -> int:
        return client.entry(kernel).peak[0] // MIB

    client(f"alloc(0x1000, {8 * MIB})")
    client(f"alloc(0x2000, {4 * MIB})")
    client("free(0x1000)")
    assert peak() == 12
    generation = client.entry(kernel).generation
    assert kernel.ledger.mark(client.pid, generation, 0)
    assert peak() == 4
    client(f"alloc(0x1000, {2 * MIB})")
    client("free(0x1000)")
    assert peak() == 6
    assert not kernel.ledger.mark(client.pid, generation + 1, 0)
    client.kill()
    wait_until(lambda: not kernel.ledger.mark(client.pid, generation, 0))
