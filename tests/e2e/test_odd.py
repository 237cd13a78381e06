"""Rare actions of programs. The ledger equals the driver after each of them."""

from __future__ import annotations

import os
import time

import pytest

from tests.support.commands import ask, events, fgpu, metrics
from tests.support.host import CONTEXT, GIB, MIB
from tests.support.place import Place
from tests.support.sim_driver import driver_books
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually, steadily

LEDGER_SECONDS = 1.5  # three comparisons with the driver


def anomalies(kind: str) -> float:
    """Return how often the kernel counted an anomaly of this kind."""
    return metrics()["fgpu_anomalies_total", frozenset({("kind", kind)})]


def stays_exact(one: Tenant, bytes_: int, seconds: float = LEDGER_SECONDS) -> None:
    """Check that the ledger is exact, and that it stays exact while the agent reads the driver a few times."""
    assert one.assert_exact() == bytes_
    time.sleep(seconds)
    assert one.assert_exact() == bytes_


# -- threads


@pytest.mark.places("host", "runc")
def test_the_ledger_stays_exact_while_threads_get_pointers_that_other_threads_just_freed(tenant, scale) -> None:
    one = tenant(CONTEXT + 64 * MIB)
    client = one.client()
    client.ok("context")
    one.assert_enforced()
    before = {kind: anomalies(kind) for kind in ("stale", "release")}
    times = scale(1_000, 12_000, 50_000)  # of each thread, on the host and in a container
    again, failures = client.ok(f"reuse {256 << 10} {times}", 120)
    assert again > times / 100, "hardly any pointer was reused: nothing was tested"
    assert failures == 0
    assert one.assert_exact() == CONTEXT
    assert {kind: anomalies(kind) for kind in before} == before


@pytest.mark.places("host", "runc")
def test_a_call_that_is_left_by_longjmp_stays_charged_until_nvml_shows_nothing(tenant) -> None:
    one = tenant(CONTEXT + 64 * MIB)
    client = one.client()
    client.ok("context")
    for _ in range(20):
        with one.growing(4 * MIB):
            pointer = client.ok(f"alloc {4 * MIB}")[0]
        assert client.do(f"leap {40 * MIB}") == "ok"
        client.ok(f"free {pointer}")  # afterwards the thread is in no call
        # No probe showed whether the driver allocated the admitted bytes. They are charged until NVML shows that it did
        # not.
        assert one.assert_exact() == CONTEXT
        assert client.do(f"brieflyleap {40 * MIB}") == "ok"
        assert one.assert_exact() == CONTEXT
    stays_exact(one, CONTEXT)
    client.ok(f"alloc {64 * MIB}")


@pytest.mark.places("host", "runc")
def test_zombies_hold_no_memory(tenant) -> None:
    """The first thread of every second zombie exited long before the other threads."""
    one = tenant(8 * GIB)
    parent = one.client()
    before = set(one.pids())
    assert parent.ok(f"brood 6 {4 * MIB}") == [6]
    children = set(one.pids()) - before
    assert one.memory()["used_bytes"] == 6 * (CONTEXT + 4 * MIB), "the memory was not charged at once"
    stays_exact(one, 6 * (CONTEXT + 4 * MIB))
    for pid in children:
        os.kill(pid, 9)
    eventually(lambda: one.memory()["used_bytes"] == 0, 1, "the release of the memory")
    eventually(lambda: not driver_books(), 1, "an empty driver")
    begun = time.monotonic()
    while time.monotonic() - begun < LEDGER_SECONDS:
        assert one.memory()["used_bytes"] == 0, "a zombie was charged"
        assert not one.view()["processes"]
    assert all(os.path.exists(f"/proc/{pid}") for pid in children), "a child was reaped"
    assert parent.ok("reap") == [6]


# -- memory


@pytest.mark.places("host", "runc")
def test_memory_stays_charged_after_its_handle_and_is_released_with_its_mapping(tenant) -> None:
    one = tenant(CONTEXT + 64 * MIB)
    client = one.client()
    client.ok("context")
    for _ in range(5):
        with one.growing(64 * MIB):
            at = client.ok(f"vmm {64 * MIB}")[0]  # create, map, release
        assert client.do(f"alloc {2 * MIB}") != "ok"
        stays_exact(one, CONTEXT + 64 * MIB, 0.6)
        client.ok(f"unmap {at} {64 * MIB}")
        assert one.memory()["used_bytes"] == CONTEXT
    stays_exact(one, CONTEXT)


@pytest.mark.places("host", "runc")
def test_creating_and_destroying_a_second_context_keeps_the_ledger_exact(tenant) -> None:
    one = tenant(2 * CONTEXT + 64 * MIB)
    client = one.client()
    client.ok("context")
    with one.growing(60 * MIB):
        pointer = client.ok(f"alloc {60 * MIB}")[0]
    for _ in range(10):
        made = client.ok("newcontext")[0]
        assert one.assert_exact() == 2 * CONTEXT + 60 * MIB
        client.ok(f"endcontext {made}")
        assert one.memory()["used_bytes"] == CONTEXT + 60 * MIB, "the context was not released at once"
        assert one.assert_exact() == CONTEXT + 60 * MIB
    stays_exact(one, CONTEXT + 60 * MIB)
    client.ok(f"free {pointer}")
    assert one.assert_exact() == CONTEXT


@pytest.mark.places("host", "runc")
def test_managed_memory_is_released_with_its_context_while_another_context_exists(tenant) -> None:
    """NVML never shows this memory, and the kernel has no record of the context that it belongs to."""
    one = tenant(3 * CONTEXT + 200 * MIB)
    client = one.client()
    client.ok("context")
    with one.growing(40 * MIB):
        client.ok(f"managed {40 * MIB}")
    for times in (1, 23):
        (kept,), (made,) = client.ok(f"newmanaged {MIB} 7"), client.ok(f"newmanaged {2 * MIB} {times}")
        assert one.assert_exact() == 3 * CONTEXT + (47 + 2 * times) * MIB
        client.ok(f"endcontext {made}")
        assert one.memory()["used_bytes"] == 2 * CONTEXT + 47 * MIB, "the memory was not released at once"
        assert one.assert_exact() == 2 * CONTEXT + 47 * MIB
        assert client.do(f"endcontext {made}") != "ok"
        client.ok(f"endcontext {kept}")
        assert one.assert_exact() == CONTEXT + 40 * MIB


# -- memory of one process in another


def export_pointer(exporter: Client, importer: Client, bytes_: int = 20 * MIB) -> str:
    """Allocate and share memory. Return the command that closes it on the other side."""
    pointer = exporter.ok(f"alloc {bytes_}")[0]
    words = exporter.ok(f"share {pointer}")
    at = importer.ok(f"open {' '.join(map(str, words))}")[0]
    return f"close {at}"


def export_handle(exporter: Client, importer: Client, bytes_: int = 20 * MIB) -> str:
    """Share memory by a descriptor of a handle. Return the command that releases it on the other side."""
    _, descriptor = exporter.ok(f"export {bytes_}")
    handle = importer.ok(f"import {exporter.inner_pid} {descriptor}")[0]
    return f"release {handle}"


@pytest.mark.places("host", "runc")
@pytest.mark.parametrize("export", [export_pointer, export_handle])
def test_memory_of_an_exited_exporter_is_charged_to_the_importer(tenant, export, scale) -> None:
    one = tenant(4 * GIB)
    importer = one.client()
    importer.ok("context")
    held = []
    for i in range(scale(2, 4, 20)):
        exporter = one.client()
        exporter.ok("context")
        held.append(export(exporter, importer))
        assert one.assert_exact() == 2 * CONTEXT + (i + 1) * 20 * MIB
        exporter.kill()
        left = CONTEXT + (i + 1) * 20 * MIB
        eventually(lambda left=left: one.driver() == left, 5, "the driver's books without it")
        assert one.assert_exact() == left
    for letting_go in held:
        importer.ok(letting_go)
    stays_exact(one, CONTEXT)


@pytest.mark.places("host")
@pytest.mark.parametrize("export", [export_pointer, export_handle])
def test_an_importer_is_not_reported_as_a_bypass(tenant, export) -> None:
    """The importer's row in NVML includes memory of exited exporters, so it may exceed a program's code and data."""
    one = tenant(6 * GIB)
    importer = one.client()
    importer.ok("context")
    for i in range(3):
        exporter = one.client()
        exporter.ok("context")
        export(exporter, importer, 700 * MIB)
        exporter.kill()
        left = CONTEXT + (i + 1) * 700 * MIB
        eventually(lambda left=left: one.driver() == left, 5, "the driver's books without it")
        assert one.assert_exact() == left
    steadily(lambda: [p["how"] for p in one.view()["processes"]] == [""], 2)
    assert importer.pid not in [event["pid"] for event in events("adopted")]


@pytest.mark.places("host")
def test_memory_whose_event_was_lost_is_released(tenant) -> None:
    """A level reports twenty events a second. Its refusals come first, then memory that other processes may share."""
    one = tenant(4 * GIB)
    client = one.client()
    client.ok("context")
    lost = "fgpu_events_lost_total", frozenset({("reason", "rate")})
    before = metrics()[lost]
    for _ in range(5):
        pointer = client.ok(f"alloc {20 * MIB}")[0]
        client.ok(f"share {pointer}")
        client.ok(f"ask {8 * GIB} 101")
        client.ok(f"free {pointer}")
    assert one.assert_exact(5) == CONTEXT
    assert metrics()[lost] >= before + 5 * 50
    stays_exact(one, CONTEXT)


# -- limits


def balance(path: str) -> tuple[int, int]:
    """Return a level's bytes, and the sum of its processes' bytes."""
    level = next(t for t in ask(verb="snapshot")["tenants"] if t["path"] == path)
    return level["devices"][0]["used_bytes"], sum(p["bytes"] for p in level["processes"])


@pytest.mark.timeout(600)
@pytest.mark.places("cgroups")
def test_a_level_set_over_working_programs_holds_the_sum_of_their_bytes(place: Place, tenant, scale) -> None:
    """The level appears or disappears during charges and releases."""
    tenants = [tenant(8 * GIB) for _ in range(2)]
    clients = [one.client() for one in tenants for _ in range(2)]
    for client in clients:
        client.ok("context")
        client.send(f"ask {2 * MIB} 0")
    before = anomalies("release")
    try:
        for _ in range(scale(5, 5, 300)):
            fgpu("set", place.group, "--memory", "16GiB")
            fgpu("unset", place.group)
        fgpu("set", place.group, "--memory", "16GiB")
        for client in clients:
            client.send("context")
            got, refused, other = client.numbers(client.receive(), "ask")
            assert (refused, other, client.receive()) == (0, 0, "ok")
            assert got > 0
        whole, parts = balance(place.group)
        assert whole == parts, f"{whole - parts} bytes are charged without a process"
    finally:
        fgpu("unset", place.group)
    for one in tenants:
        assert one.assert_exact() == 2 * CONTEXT
        assert balance(one.path)[0] == 2 * CONTEXT
    assert anomalies("release") == before
