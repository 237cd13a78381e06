"""Rows in the requested order, and the rows that a filter matches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fgpu_ebpf.api import ranking
from fgpu_ebpf.api.ranking import BY_KEY, BY_WORD, Order
from fgpu_ebpf.cli import tables, views
from tests.unit import top_kit as kit


def names(word: str, is_reversed: bool = False) -> list[str]:
    found = ranking.rows(kit.latest(*kit.ALL).snapshot)
    return [row.tenant["tenant"] for row in ranking.ranked(found, Order(BY_WORD[word], is_reversed))]


@pytest.mark.parametrize(
    ("word", "order"),
    [
        ("tenant", "alice batch bob carol"),
        ("limit", "bob batch alice carol"),
        ("used", "batch bob alice carol"),
        ("peak", "batch bob alice carol"),
        ("share", "bob alice batch carol"),
        ("entitled", "bob alice batch carol"),
        ("waited", "alice bob carol batch"),
        ("refused", "alice batch bob carol"),
        ("held", "alice bob carol batch"),
        ("gpu", "alice batch bob carol"),
    ],
)
def test_a_column_sorts_names_upwards_numbers_downwards_and_unmeasured_values_last(word: str, order: str) -> None:
    assert names(word) == order.split()


@pytest.mark.parametrize(
    ("word", "order"),
    [
        ("tenant", "carol bob batch alice"),
        ("limit", "alice batch bob carol"),
        ("share", "alice bob batch carol"),
        ("refused", "batch bob carol alice"),
    ],
)
def test_reversed_order_leaves_unmeasured_values_last(word: str, order: str) -> None:
    assert names(word, is_reversed=True) == order.split()


def test_a_tenant_has_no_entitlement_on_a_device_that_it_does_not_use() -> None:
    idle = kit.tenant("alice", kit.on(0, 0, time=kit.compute(0.0, 0.0)))
    snapshot = kit.latest(idle, kit.BOB).snapshot
    entitled = {row.tenant["tenant"]: BY_WORD["entitled"].text(row) for row in ranking.rows(snapshot)}
    assert entitled == {"alice": "-", "bob": "75.0%"}
    assert [line.split()[3] for line in tables.status(snapshot).splitlines()[-2:]] == ["-", "75.0%"]


def test_status_has_a_line_for_each_device_with_the_committed_memory_and_the_rest() -> None:
    devices = (
        replace(kit.device(0), usable_bytes=159 * kit.GIB),
        kit.device(1, unmanaged=3 * kit.GIB),
        replace(kit.device(2, unmanaged=None), committed_bytes=200 * kit.GIB),
    )
    lines = tables.status(kit.latest(kit.BOB, devices=devices).snapshot).splitlines()
    assert lines[1].split()[0] == "bob"
    assert lines[2:6] == [
        "",
        "gpu 0: 100GiB of 159GiB committed, 59GiB left",
        "gpu 1: 100GiB of 160GiB committed, 60GiB left; 3GiB held by processes outside tenants",
        "gpu 2: 200GiB of 160GiB committed, 0B left",
    ]


def test_a_tenant_has_a_row_for_each_of_its_devices() -> None:
    both = kit.tenant("alice", kit.on(1, 5), kit.on(0, 5))
    found = ranking.rows(kit.latest(both, devices=(kit.device(0), kit.device(1))).snapshot)
    assert [row.device["gpu"] for row in ranking.ranked(found, Order())] == [0, 1]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "alice bob carol batch"),
        ("LIC", "alice"),
        ("/batch/b", "bob batch"),
        ("group", "batch"),
        ("observe", "batch"),
        ("notebooks", "alice bob carol batch"),
        ("nobody", ""),
    ],
)
def test_a_filter_matches_names_paths_policies_kinds_and_enforcement(text: str, found: str) -> None:
    rows = ranking.rows(kit.latest(*kit.ALL).snapshot, text)
    assert [row.tenant["tenant"] for row in rows] == found.split()


def test_a_second_choice_of_a_column_reverses_the_order() -> None:
    by_peak = Order().by(BY_WORD["peak"])
    assert (by_peak.column.word, by_peak.is_reversed) == ("peak", False)
    assert by_peak.by(BY_WORD["peak"]).is_reversed
    assert not by_peak.by(BY_WORD["peak"]).by(BY_WORD["used"]).is_reversed


def test_each_column_has_its_own_word_and_key() -> None:
    assert tuple(BY_WORD) == views.SORTS
    letters = {word[0]: word for word in BY_WORD if word != "held"}
    assert {key: column.word for key, column in BY_KEY.items()} == letters | {"m": "used", "b": "held"}
    assert len(set(BY_KEY)) == len(BY_WORD) + 1
    assert not set(BY_KEY) & set("qjk/ h?")
