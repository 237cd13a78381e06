"""Tests of the word for the enforcement of a tenant's limits, and of every output that shows this word."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fgpu_ebpf
from fgpu_ebpf.api import metrics, ranking
from fgpu_ebpf.api.ranking import Mark, Row
from fgpu_ebpf.api.status_page import Asked, html
from fgpu_ebpf.cli import tables
from fgpu_ebpf.snapshot import Fields, ProcessView, Snapshot, TenantView
from fgpu_ebpf.tenancy.enforcement import UNHELD, Enforcement, enforcement, sentence
from tests.unit import top_kit as kit

COUNTED = ("no_admission", "no_shim", "unwitnessed", "older")


@pytest.mark.parametrize(
    ("unenforced", "observe", "kill", "bypassing", "word"),
    [
        ("", False, False, (), "kernel"),
        *[("", False, False, (how,), "counted") for how in COUNTED],
        ("", False, False, ("unprobed", "no_shim"), "counted"),
        ("", False, True, ("no_shim", "no_admission"), "kernel"),
        ("", False, True, ("unwitnessed",), "counted"),
        ("", False, True, ("unprobed",), "cooperative"),
        ("", False, False, ("unprobed",), "cooperative"),
        ("", False, False, ("standalone", "outside_turns"), "cooperative"),
        ("", False, False, ("outside_turns", "empty_turns"), "kernel"),
        ("", True, False, ("no_shim",), "observe"),
        ("probes are missing", True, True, ("unprobed",), "none"),
    ],
)
def test_the_weakest_process_decides_the_enforcement(
    unenforced: str, observe: bool, kill: bool, bypassing: tuple[str, ...], word: str
) -> None:
    assert enforcement(unenforced, observe, kill, bypassing) == word


def test_an_unknown_kind_of_bypass_is_shown_as_counted() -> None:
    """A bypass that the rule does not contain is never shown as `kernel`."""
    assert {enforcement("", False, kill, ["a new way"]) for kill in (False, True)} == {Enforcement.COUNTED}


def test_every_exported_kind_of_bypass_has_the_expected_enforcement() -> None:
    assert {how: str(enforcement("", False, False, [how])) for how in metrics._HOW} == {
        **dict.fromkeys(COUNTED, "counted"),
        **dict.fromkeys(("unprobed", "standalone"), "cooperative"),
        **dict.fromkeys(("outside_turns", "empty_turns"), "kernel"),
    }


def seen(one: TenantView) -> dict[str, Any]:
    """Return a snapshot of the agent with this tenant, in its JSON form."""
    return dict(kit.latest(one).snapshot)


def test_all_outputs_show_that_a_tenant_is_only_counted() -> None:
    process = ProcessView(4711, 0, 5, "no_admission", "not_mounted")
    one = replace(kit.tenant("alice", kit.on(0, 5, 2)), enforcement=Enforcement.COUNTED, processes=(process,))
    whole = Snapshot(1.0, (kit.device(),), (one,))
    snapshot = Fields(whole)
    (row,) = ranking.rows(snapshot)
    assert ranking.mark(row) is Mark.UNHELD
    assert "pid 4711" in tables.status(snapshot)
    page = html(snapshot, Asked.of(""), "host")
    assert Enforcement.COUNTED.words in page
    assert 'class="unheld"' in page
    families = {family.name: family for family in metrics.families(whole)}
    assert [s.labels["mode"] for s in families["fgpu_tenant_enforcement"].samples] == ["counted"]


def test_only_counted_tenants_are_named_below_the_table() -> None:
    for word in Enforcement:
        (tenant,) = seen(kit.tenant("alice", kit.on(0, 5, 2), enforcement=word))["tenants"]
        assert bool(sentence(tenant)) == (word is Enforcement.COUNTED)


@pytest.mark.parametrize(("used", "mark"), [(0, Mark.IDLE), (5, Mark.USUAL), (10, Mark.FULL), (11, Mark.OVER)])
def test_the_mark_of_a_tenant_depends_on_used_memory_and_limit(used: int, mark: Mark) -> None:
    (tenant,) = seen(kit.tenant("alice", kit.on(0, used, 10)))["tenants"]
    assert ranking.mark(Row(tenant, tenant["devices"][0])) is mark


def test_every_enforcement_under_which_a_limit_may_be_exceeded_except_observe_is_unheld() -> None:
    assert {word for word in Enforcement if word.words} - UNHELD == {Enforcement.OBSERVE}


def test_only_one_module_contains_the_word_cooperative() -> None:
    """The module `enforcement` alone decides the word, so no other module contains this word."""
    folder = Path(fgpu_ebpf.__file__).parent
    spelled = {
        path.stem
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == Enforcement.COOPERATIVE
    }
    assert spelled == {"enforcement"}
