"""Tests of the view of a tenant: its drift, if every process was compared, and the processes that bypass the shim."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fgpu_ebpf.abi import Seen
from fgpu_ebpf.agent import snapshot_builder
from fgpu_ebpf.agent.bypasses import Bypasses
from fgpu_ebpf.agent.nvml_reconcile import Truth
from fgpu_ebpf.agent.turn_audit import Verdict
from fgpu_ebpf.driver.bypass_reason import Reasons, Then, search

NOW = 1009.0


@pytest.mark.parametrize(
    ("own", "answered", "shown"),
    [
        ([7, 8], {0: NOW - 1}, 101),
        ([7], {0: NOW - 1}, -2),
        ([], {0: NOW - 1}, None),
        ([7, 9], {0: NOW - 1}, None),
        ([7, 8], {1: NOW - 1}, None),
        ([7, 8], {0: NOW - 6}, None),
    ],
    ids=["all", "one", "none", "one was not compared", "no answer for this device", "long ago"],
)
def test_drift_is_known_for_all_processes_or_for_none(
    own: list[int], answered: dict[int, float], shown: int | None
) -> None:
    truth = Truth(answered, drift={(7, 0): -2, (8, 0): 103, (9, 1): 5})
    look = SimpleNamespace(truth=truth, now_ns=int(NOW * 1e9))
    assert snapshot_builder._drift(look, own, 0) == shown  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("flags", "bytes_", "how"),
    [(0, 5, "unwitnessed"), (Seen.CALL, 5, "no_shim"), (Seen.CALL, 0, ""), (Seen.SHIM | Seen.CALL, 5, "")],
)
def test_each_living_process_has_its_kind_of_bypass_and_an_ended_process_has_none(
    flags: int, bytes_: int, how: str
) -> None:
    known = Bypasses((), (), (), (), Verdict(), Reasons())
    process = SimpleNamespace(flags=flags, bytes=(bytes_,))
    ended = subprocess.Popen(["true"])
    ended.wait()
    me = os.getpid()
    assert known.how(me, process) == how  # type: ignore[arg-type]
    assert known.how(ended.pid, process) == ""  # type: ignore[arg-type]
    outside = replace(known, turns=Verdict(outside=frozenset({me})))
    assert outside.how(me, process) == (how or "outside_turns")  # type: ignore[arg-type]
    empty = replace(known, turns=Verdict(empty=frozenset({me})))
    assert empty.how(me, process) == (how or "empty_turns")  # type: ignore[arg-type]
    unwitnessed = replace(known, unwitnessed={me})
    assert unwitnessed.how(me, process) == (how or "unwitnessed")  # type: ignore[arg-type]
    standalone = replace(known, standalone={me})
    assert standalone.how(me, process) == ("standalone" if bytes_ and not flags & Seen.SHIM else how)  # type: ignore[arg-type]
    older = replace(standalone, preexisting=(me, ended.pid))
    assert older.how(me, process) == ("older" if bytes_ else "")  # type: ignore[arg-type]
    assert older.how(ended.pid, process) == ""  # type: ignore[arg-type]


def at_once(pid: int, then: Then) -> bool:
    then(*search(pid))
    return True


@pytest.mark.parametrize(
    ("how", "flags", "told"), [("no_admission", 0, True), ("no_admission", Seen.SHIM, False), ("older", 0, False)]
)
def test_the_reason_is_shown_for_processes_without_a_shim(how: str, flags: int, told: bool) -> None:
    process, known = SimpleNamespace(flags=flags, generation=1), Bypasses((), (), (), (), Verdict(), Reasons(at_once))
    assert bool(known.why(os.getpid(), process, how)) == told  # type: ignore[arg-type]
    assert known.why(1 << 22, process, how) == "", "an exited process has a reason"  # type: ignore[arg-type]
