"""Memory that a program has freed in any way can be allocated again at once."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.host import BUILD, CONTEXT, GIB, MIB
from tests.support.wait import eventually

LIMIT = 4 * GIB
SHARE = 60  # percent of the free memory, in each round: two rounds together exceed the limit
WAYS = (
    "plain", "pitched", "managed", "async", "unwaited", "plain_async", "async_plain", "async_and_plain",
    "pool", "pool_first", "mapped_one", "mapped_four", "mapped_each", "created", "context", "array",
    "mipmapped", "graph_frees", "graph_freed", "module", "library", "reset", "released", "exported", "ipc",
    "imported", "pool_imported",
)  # fmt: skip


def test_the_test_program_implements_every_way_to_free(programs: None) -> None:
    assert subprocess.run([BUILD / "e2e/freed", "ways"], capture_output=True, text=True).stdout.split() == list(WAYS)


@pytest.mark.places("host")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_free_memory_makes_room_at_once(tenant, way: str) -> None:
    one = tenant(LIMIT)
    one.client().ok("context")
    one.assert_enforced()
    name, passed, rounds, total, before, after = one.run(f"{BUILD}/e2e/freed {SHARE} {way}", 60).split()
    assert (name, int(total)) == (way, LIMIT // MIB)
    assert passed == rounds
    if way != "pool_first":  # the driver returns memory that a destroyed pool had in use when a request needs it
        assert after == before


@pytest.mark.places("host", "runc")
def test_memory_that_one_process_closes_is_free_for_another_process_at_once(tenant) -> None:
    """No probe reports that memory of another process is closed. Its owner has freed it before.

    The agent charges it to the process that has opened it before it ends the charge of its owner: for a moment both are
    charged.
    """
    one = tenant(2 * CONTEXT + 100 * MIB)
    exporter, importer = one.client(), one.client()
    held = 2 * CONTEXT + 60 * MIB
    for client in (exporter, importer):
        client.ok("context")
    for _ in range(6):
        (pointer,) = exporter.ok(f"alloc {60 * MIB}")
        (opened,) = importer.ok(f"open {' '.join(map(str, exporter.ok(f'share {pointer}')))}")
        exporter.ok(f"free {pointer}")
        eventually(lambda: one.assert_exact() == held, 3, "it is charged to the process that has opened it")
        importer.ok(f"close {opened}")
        (pointer,) = exporter.ok(f"alloc {60 * MIB}")
        exporter.ok(f"free {pointer}")
    assert one.memory()["refused"] == 0
