"""Tests of what the commands say, with an agent that answers as each test says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fgpu_ebpf import abi
from tests.unit.cli_kit import agent, fgpu

GIB = 1 << 30


def level(used: int, limit: int, by: str = "set", tenant: str = "alice") -> dict[str, Any]:
    over = max(0, used - limit)
    device = {"gpu": 0, "limit_bytes": limit, "used_bytes": used, "excess_bytes": over}
    return {"tenant": tenant, "by": by, "devices": [device]}


def tenants(*names: str) -> dict[str, Any]:
    return {"tenants": [{"tenant": name} for name in names]}


# -- set, unset, reload, detach


def test_a_limit_below_what_is_held_is_explained(tmp_path: Path) -> None:
    with agent(tmp_path, put={"tenant": "alice", "level": level(5 * GIB // 2, GIB)}):
        done = fgpu(tmp_path, "set", "alice", "--memory", "1GiB")
    assert done.stdout.splitlines() == [
        "alice: 1GiB",
        "alice holds 2.5GiB of 1GiB on gpu 0: it gets nothing more until it has freed 1.5GiB",
    ]
    with agent(tmp_path, put={"tenant": "alice", "level": level(GIB, GIB)}):
        assert fgpu(tmp_path, "set", "alice", "--memory", "1GiB").stdout == "alice: 1GiB\n"


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (None, "no limit is in force"),
        (level(0, 8 * GIB, "notebooks"), "in force now: 8GiB (notebooks of alice)"),
        (level(0, abi.NO_LIMIT, "batch", "team"), "in force now: no limit of memory (batch of team)"),
    ],
)
def test_unset_says_what_is_left(left: Any, said: str, tmp_path: Path) -> None:
    with agent(tmp_path, drop={"tenant": "alice", "path": "/a", "level": left}):
        assert fgpu(tmp_path, "unset", "alice").stdout == f"alice: limits set by hand are removed; {said}\n"


def test_reload_and_clear_say_what_they_did(tmp_path: Path) -> None:
    with agent(tmp_path, reload={"policies": 1}, clear={"device": 3}):
        assert fgpu(tmp_path, "reload").stdout == "reloaded: 1 policy in force\n"
        assert fgpu(tmp_path, "device", "clear", "3").stdout == "gpu 3: offered again\n"


def test_detach_says_how_many_tenants_have_lost_their_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgpu_ebpf.workloads.cgroups.remove_run_folder", lambda: None)
    for count, said in ((2, "2 tenants have lost their limits"), (1, "1 tenant has lost its limit")):
        with agent(tmp_path, detach={"tenants": count}) as asked:
            assert fgpu(tmp_path, "detach").stdout == f"detached: {said}\n"
        assert [request["verb"] for request in asked] == ["detach"], "only a terminal is asked"


@pytest.mark.parametrize(
    ("words", "typed", "verbs"),
    [
        (["detach"], "n\n", ["snapshot"]),
        (["detach"], "y\n", ["snapshot", "detach"]),
        (["detach", "--yes"], "", ["detach"]),
    ],
    ids=["no", "yes", "--yes"],
)
def test_detach_asks_a_terminal(
    words: list[str], typed: str, verbs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fgpu_ebpf.workloads.cgroups.remove_run_folder", lambda: None)
    monkeypatch.setattr("fgpu_ebpf.cli.service._is_terminal", lambda: True)
    with agent(tmp_path, snapshot=tenants("alice", "bob"), detach={"tenants": 2}) as asked:
        done = fgpu(tmp_path, *words, input=typed)
    assert [request["verb"] for request in asked] == verbs
    assert done.exit_code == (0 if "detach" in verbs else 1)
    assert ("2 tenants lose their limits. Detach?" in done.stderr) == ("snapshot" in verbs)


# -- targets


@pytest.mark.parametrize("command", ["explain", "unset"])
def test_a_similar_name_is_suggested(command: str, tmp_path: Path) -> None:
    refused = {"error": "no tenant 'alcie'", "code": 4}
    with agent(tmp_path, explain=refused, drop=refused, snapshot=tenants("bob", "alice")):
        done = fgpu(tmp_path, command, "alcie")
        assert (done.exit_code, done.stderr) == (4, "fgpu: no tenant 'alcie'; did you mean alice?\n")
        assert fgpu(tmp_path, command, "nobody").stderr == "fgpu: no tenant 'alcie'\n"


@pytest.mark.parametrize("command", ["set", "unset", "explain"])
def test_every_command_with_a_target_lists_its_forms(command: str, tmp_path: Path) -> None:
    said = fgpu(tmp_path, command, "--help").stdout
    for form in ("NAME ", "ID ", "pod/NAMESPACE/NAME ", "unit/NAME ", "/PATH ", "pid/N "):
        assert f"\n    {form}" in said, form
