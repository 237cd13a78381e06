"""Simultaneous requests: exactly one of two gets the last bytes, and a request that fits is never refused."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.host import CONTEXT, GIB, MIB
from tests.support.place import group
from tests.support.tenant import Client, Program, Tenant

PLACES = ("pidns", "runc")


def prepare_track(folder: Path, *tenants: Tenant) -> None:
    """Create a page that all racers map, at the path that each of them opens."""
    track = folder / "track"
    track.write_bytes(bytes(4096))
    for tenant in tenants:
        (tenant.folder / "track").hardlink_to(track)


def race(racers: list[Client], rounds: int) -> None:
    """Let all racers request the last 2 MiB in every round, and check that exactly one of them gets it."""
    for racer in racers:
        racer.send(f"race {2 * MIB} {len(racers)} {rounds}")
    results = [racer.numbers(racer.receive(120), "race") for racer in racers]
    assert [bad for _, bad in results] == [0] * len(racers)
    assert sum(wins for wins, _ in results) == rounds


@pytest.mark.places(*PLACES)
def test_exactly_one_of_two_processes_gets_the_last_bytes(tenant, tmp_path: Path, scale) -> None:
    one = tenant(2 * CONTEXT + 100 * MIB)
    prepare_track(tmp_path, one)
    racers = [one.client(), one.client()]
    for racer in racers:
        racer.ok("context")
    with one.growing(98 * MIB):
        racers[0].ok(f"alloc {98 * MIB}")
    rounds = scale(200, 250, 10_000)
    race(racers, rounds)
    assert one.assert_exact() == 2 * CONTEXT + 98 * MIB
    memory = one.memory()
    assert memory["refused"] == rounds
    assert memory["peak_bytes"] == memory["limit_bytes"]


@pytest.mark.places(*PLACES)
def test_exactly_one_of_two_tenants_gets_the_last_bytes_of_their_group(place, tenant, tmp_path: Path, scale) -> None:
    both = [tenant(2 * GIB), tenant(2 * GIB)]
    prepare_track(tmp_path, *both)
    with group(place, 2 * CONTEXT + 100 * MIB) as whole:
        racers = [one.client() for one in both]
        for racer in racers:
            racer.ok("context")
        with both[0].growing(98 * MIB):
            racers[0].ok(f"alloc {98 * MIB}")
        rounds = scale(200, 250, 10_000)
        race(racers, rounds)
        assert sum(one.assert_exact() for one in both) == whole()["used_bytes"] == 2 * CONTEXT + 98 * MIB
        assert whole()["refused"] == rounds
        assert whole()["peak_bytes"] == whole()["limit_bytes"]


RETAINS = """
import ctypes, threading
L, begin, results = ctypes.CDLL("libcuda.so.1"), threading.Barrier(16), []
def retain():
    begin.wait()
    results.append(L.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0))
assert L.cuInit(0) == 0
threads = [threading.Thread(target=retain) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sum(results), len(results), flush=True)
input()
"""


@pytest.mark.places(*PLACES)
def test_threads_that_retain_the_primary_context_at_the_same_time_need_room_for_one(tenant, scale) -> None:
    for _ in range(scale(3, 10, 100)):
        one = tenant(2 * CONTEXT - MIB)
        one.assert_enforced()
        (one.folder / "retains.py").write_text(RETAINS)
        program = Program(one, "retains", f"{sys.executable} {one.folder}/retains.py")
        assert program.receive() == "0 16"
        assert one.assert_exact() == CONTEXT
        program.close()


@contextlib.contextmanager
def hopeless(askers: list[Client]) -> Iterator[None]:
    """Let each program request more than the limit allows, without pause, and check that no request succeeds."""
    for asker in askers:
        asker.ok("context")
    for asker in askers:
        asker.send(f"ask {16 * GIB} 0")
    yield
    for asker in askers:
        asker.send("context")
    for asker in askers:
        got, refused, other = asker.numbers(asker.receive(), "ask")
        assert (got, other) == (0, 0)
        assert refused > 0
        assert asker.receive() == "ok"


@pytest.mark.places(*PLACES)
def test_a_request_that_fits_is_admitted_beside_hopeless_requests(tenant, scale) -> None:
    one = tenant(9 * CONTEXT + 2 * MIB)
    fitting, *askers = [one.client() for _ in range(9)]
    fitting.ok("context")
    one.assert_enforced()
    times = scale(5_000, 25_000, 1_000_000)
    with hopeless(askers):
        got = fitting.ok(f"ask {MIB} {times}", 900)
    memory = one.memory()
    assert got == [times, 0, 0], memory
    assert one.assert_exact() == 9 * CONTEXT
    memory = one.memory()
    assert memory["witnessed_bytes"] == memory["admitted_bytes"] == times * MIB


@pytest.mark.slow
@pytest.mark.places(*PLACES)
def test_a_request_that_fits_is_admitted_beside_hopeless_requests_of_its_group(place, tenant, scale) -> None:
    one, other = tenant(2 * GIB), tenant(12 * GIB)
    with group(place, 9 * CONTEXT + 2 * MIB) as whole:
        fitting = one.client()
        fitting.ok("context")
        one.assert_enforced()
        times = scale(5_000, 25_000, 1_000_000)
        with hopeless([other.client() for _ in range(8)]):
            assert fitting.ok(f"ask {MIB} {times}", 900) == [times, 0, 0]
        assert one.assert_exact() + other.assert_exact() == whole()["used_bytes"] == 9 * CONTEXT
