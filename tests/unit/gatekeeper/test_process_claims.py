"""Tests of arbitrary status pages: all figures that the gatekeeper reads are within bounds, and counts never shrink."""

from __future__ import annotations

import ctypes
from dataclasses import astuple
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from fgpu_ebpf import abi
from fgpu_ebpf.abi import ControlPage, StatusPage
from fgpu_ebpf.gatekeeper import process_claims
from fgpu_ebpf.gatekeeper.process_gates import ProcessGates, let_gang_through, observe_processes
from fgpu_ebpf.gatekeeper.turn_rows import counts_of
from fgpu_ebpf.ledger import compute_maps
from fgpu_ebpf.scheduling.claim_trust import MOST_FLIGHT_NS
from fgpu_ebpf.scheduling.fair_queue import Share
from fgpu_ebpf.scheduling.reports import Seen
from fgpu_ebpf.scheduling.turns import Turns

US, MS, S = 1_000, 1_000_000, 1_000_000_000
WORD = 2**64 - 1
START_NS = 100 * S
any_word = st.one_of(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**63 - 1, WORD]), st.integers(0, WORD))
near = st.integers(-25_000, 25_000).map(lambda us: us * US)  # a time near the present


def page_of(**fields: int) -> StatusPage:
    """Return a status page with these values for device 0."""
    page = StatusPage()
    for part in (page.devices[0], page.flights[0], page.spans[0]):
        for name, _ in part._fields_:
            setattr(part, name, fields.get(name, 0))
    return page


@given(st.lists(any_word, min_size=8, max_size=8), st.integers(-(2**62), 2**62), st.integers(0, 2**62))
def test_the_figures_of_any_page_are_within_bounds(some, ahead_ns, now_ns):
    words = process_claims.Words(*(some * 64)[: process_claims.Words._length_])
    for device in range(abi.DEVICES):
        said = process_claims.read(words, process_claims.row_of(device), ahead_ns, now_ns)
        assert all(0 <= number < 2**63 for number in said)
        assert max(said.wanted_ns, said.begun_ns, said.ended_ns) <= now_ns
        assert said.busy_until_ns <= now_ns + MOST_FLIGHT_NS


def test_an_honest_page_is_read_unchanged():
    page = page_of(
        waiting=2, drained=7, launches=9, in_flight=3, busy_until_ns=1_400, wanted_ns=900, idle_ns=50,
        begun_ns=800, ended_ns=1_000
    )  # fmt: skip
    said = process_claims.read(process_claims.Words.from_buffer_copy(page), process_claims.row_of(0), 0, 1_000)
    assert said == (True, 7, 9, 3, 1_400, 900, 50, 800, 1_000)


@given(st.integers(-(2**70), 2**70))
def test_a_count_beyond_a_word_is_written_as_the_nearest_value(number):
    written = []
    book = compute_maps.ComputeMaps({"turns": 3}, lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute_maps.bpf, "replace", lambda *words: written.append(words))
        book.set_turns(7, 0, compute_maps.TurnCounts(wait_ns=number))
    assert abi.Turn.from_buffer_copy(written[0][2]).wait_ns == min(max(0, number), WORD)


# -- sequences


class Program:
    """A process of a tenant. The test writes its status page."""

    def __init__(self) -> None:
        self.status = SimpleNamespace(page=StatusPage())  # no memory file: hypothesis creates thousands of programs
        client = SimpleNamespace(control=SimpleNamespace(page=ControlPage()), status=self.status, ahead_ns=0)
        self.desk = ProcessGates(client)
        self.desk.set_shared([0, 1])

    def write(self, page: StatusPage) -> None:
        ctypes.memmove(ctypes.addressof(self.status.page), ctypes.addressof(page), ctypes.sizeof(page))


class Host:
    """Turns of simulated programs. A step makes the calls of the time slicer, in the same order.

    After each step all counts are compared with the previous ones.
    """

    def __init__(self, shares: list[Share]) -> None:
        self.turns, self.now_ns = Turns(), START_NS
        self.programs = {tenant: Program() for tenant, _ in enumerate(shares)}
        self.turns.share_out(dict(enumerate(shares)), self.now_ns)
        self.counted: dict[int, tuple[int, ...]] = {}

    def step(self, tenants: set[int]) -> None:
        told, is_new = set(tenants), True
        while is_new:
            told |= set(self.turns.in_question())
            self.turns.step({tenant: self.seen(tenant) for tenant in told}, self.now_ns)
            is_new = self.turns.look_again()
        for tenant in self.turns.to_meet(self.now_ns):
            let_gang_through([self.programs[tenant].desk], self.now_ns)
        assert self.turns.due_ns(self.now_ns) > self.now_ns
        self.check()

    def seen(self, tenant: int) -> Seen:
        desk, place = self.programs[tenant].desk, self.turns.places[tenant]
        desk.has_begun_to_use()
        opened_ns = place.turn.opened_ns if place.turn else 0
        return observe_processes([desk], desk.used, place.number, opened_ns, self.now_ns)

    def check(self) -> None:
        assert self.turns.resets == 0
        for tenant, place in self.turns.places.items():
            counts = tuple(astuple(place.counts[0]))
            before = self.counted.get(tenant, (0,) * len(counts))
            assert all(new >= old >= 0 for new, old in zip(counts, before, strict=True)), (before, counts)
            self.counted[tenant] = counts
            assert all(0 <= number <= WORD for number in astuple(counts_of(place, 0, 0, 0)))
            assert place.busy_ns >= 0
        for of in self.turns.devices.values():
            assert min(of.switches, of.overruns, of.drain_ns, *of.drains) >= 0


words = st.one_of(st.tuples(st.just("near"), near), st.tuples(st.just("any"), any_word))
counts = st.one_of(st.integers(0, 3), any_word)
says = st.fixed_dictionaries(
    {
        "device": st.integers(0, 1),
        "waiting": st.integers(0, 1),
        "drained": st.one_of(st.sampled_from(["now", "before"]), st.integers(0, 2**32 - 1)),
        "launches": counts,
        "in_flight": counts,
        **dict.fromkeys(("busy_until_ns", "wanted_ns", "begun_ns", "ended_ns"), words),
        "idle_ns": any_word,
    }
)
acts = st.lists(st.tuples(st.integers(0, 40_000), st.sets(st.integers(0, 2)), says), min_size=1, max_size=40)
SHARES = [Share(), Share(limit_millionths=250_000), Share(rank=0, quantum_ns=2 * MS)]


def written(host: Host, tenant: int, said: dict) -> StatusPage:
    page, number = StatusPage(), host.turns.places[tenant].number
    turn = {"now": number, "before": (number - 1) & 0xFFFFFFFF}
    for part in (page.devices[said["device"]], page.flights[said["device"]], page.spans[said["device"]]):
        for name, _ in part._fields_:
            word = said[name]
            if isinstance(word, tuple):
                word = max(0, host.now_ns + word[1]) if word[0] == "near" else word[1]
            setattr(part, name, turn.get(word, word) if isinstance(word, str) else word)
    return page


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(acts)
def test_no_sequence_of_pages_makes_a_count_negative_or_smaller(made):
    host = Host(SHARES)
    for later_us, tenants, said in made:
        host.now_ns += later_us * US
        for tenant in tenants:
            host.programs[tenant].write(written(host, tenant, said))
        host.step(tenants)


@settings(phases=(Phase.explicit, Phase.generate), deadline=None)
@example(1_200, 500)
@given(st.integers(0, 3_000), st.integers(0, 3_000))
def test_a_drain_before_the_reported_end_of_work_makes_no_count_negative_or_smaller(ahead_us, rings_us):
    """One tenant reports at the end of its turn that it is busy longer, and drains at once. The other has no work."""
    host = Host([Share(), Share()])
    for tenant in (0, 1):
        host.programs[tenant].write(page_of(waiting=1))
    host.step({0, 1})
    first = next(t for t, place in host.turns.places.items() if place.turn)
    other = 1 - first
    until_ns = host.now_ns + 20 * MS
    while host.turns.places[other].turn is None and host.now_ns < START_NS + S:
        host.now_ns = min(max(host.turns.due_ns(host.now_ns), host.now_ns + 1), host.now_ns + MS)
        busy = {"in_flight": 1, "busy_until_ns": host.now_ns + ahead_us * US, "wanted_ns": host.now_ns}
        host.programs[first].write(page_of(launches=1 + (host.now_ns - START_NS) // MS, **busy))
        host.step({first})
    assert host.now_ns >= until_ns - MS
    turn = host.turns.places[first].number
    host.programs[first].write(page_of(waiting=1, drained=turn, launches=5))
    host.step({first})
    host.programs[other].write(page_of())
    for later_us in (rings_us, 100, 3_000, 20_000):
        host.now_ns += later_us * US
        host.step({first, other})
