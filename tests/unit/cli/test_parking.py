"""`fgpu wake --all`, and `fgpu detach` while tenants are parked: all are woken first, or nothing is removed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fgpu_ebpf import daemon
from fgpu_ebpf.agent import parker_client, waking
from fgpu_ebpf.cli import service
from fgpu_ebpf.ledger import ledger
from tests.unit.cli.cli_kit import agent, fgpu

AWAY = {"state": "parked", "seconds": 60.0, "why": ""}


def tenant(name: str, parking: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "tenant": name,
        "path": f"/{name}",
        "parking": parking,
        "devices": [{"parked_bytes": 1 << 20, "used_bytes": 0}],
    }


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parker listens, no limits are pinned, and the time limit is short."""
    monkeypatch.setattr(parker_client, "missing", lambda _: "")
    monkeypatch.setattr(ledger, "PINS", tmp_path / "pins")
    monkeypatch.setattr(waking, "LEAST_SECONDS", 0.3)


def test_every_parked_tenant_is_woken_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def snapshot(_: object) -> dict[str, Any]:
        return {"tenants": [tenant(n, None if f"/{n}" in asked else AWAY) for n in ("a", "b")] + [tenant("c", None)]}

    def wake(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request["target"])
        return {}

    with agent(tmp_path, snapshot=snapshot, wake=wake):
        done = fgpu(tmp_path, "wake", "--all")
    assert (done.exit_code, done.stdout, asked) == (0, "no tenant is parked\n", ["/a", "/b"])


def test_a_tenant_that_is_not_woken_in_time_is_named(tmp_path: Path) -> None:
    with agent(tmp_path, snapshot={"tenants": [tenant("a", AWAY)]}, wake={}):
        done = fgpu(tmp_path, "wake", "--all")
    assert (done.exit_code, done.stdout) == (5, "")
    assert "still parked: a is parked, for 60 s, 1MiB in host memory" in done.stderr


def test_the_time_limit_includes_memory_that_is_being_parked(tmp_path: Path) -> None:
    device = {"parked_bytes": 0, "used_bytes": 60 << 30}
    parking, end = {**AWAY, "state": "parking"}, time.monotonic() + 1.0

    def snapshot(_: object) -> dict[str, Any]:
        is_away = time.monotonic() < end
        return {"tenants": [{**tenant("a", parking if is_away else None), "devices": [device]}]}

    with agent(tmp_path, snapshot=snapshot, wake={}):
        assert fgpu(tmp_path, "wake", "--all").exit_code == 0


def test_without_a_parker_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parker_client, "missing", lambda _: "the parker does not run")
    with agent(tmp_path, snapshot={"tenants": [tenant("a", AWAY)]}, wake={}) as asked:
        done = fgpu(tmp_path, "wake", "--all")
    assert (done.exit_code, [request["verb"] for request in asked]) == (5, ["snapshot"])
    assert "still parked: a: the parker does not run" in done.stderr


def test_without_an_agent_the_command_itself_wakes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fgpu(tmp_path, "wake", "--all").stdout == "no tenant is parked\n"
    assert not list(tmp_path.iterdir()), "a host without limits is left as it is"
    (tmp_path / "pins").mkdir()
    said = ["alice: no room", ""]
    monkeypatch.setattr(waking, "wake_all", lambda *_: said.pop(0))
    done = fgpu(tmp_path, "wake", "--all")
    assert (done.exit_code, "still parked: alice: no room" in done.stderr) == (5, True)
    assert fgpu(tmp_path, "wake", "--all").exit_code == 0


def test_detach_has_the_agent_wake_parked_tenants_first(tmp_path: Path) -> None:
    asked: list[str] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request["verb"])
        is_parked = "wake" not in asked
        if request["verb"] == "detach":
            return {"error": "parked: a", "code": 5} if is_parked else {"tenants": 1}
        return {"tenants": [tenant("a", AWAY if is_parked else None)]}

    with agent(tmp_path, detach=answer, snapshot=answer, wake=answer):
        done = fgpu(tmp_path, "detach", "--yes")
    assert done.stdout == "detached: 1 tenant has lost its limit\n"
    assert asked == ["detach", "snapshot", "wake", "snapshot", "detach"]


def test_detach_fails_if_the_agent_parks_what_it_does_not_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "STARTING_SECONDS", 0.3)
    asked: list[str] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request["verb"])
        return {"error": "parked: a", "code": 5} if request["verb"] == "detach" else {"tenants": []}

    with agent(tmp_path, detach=answer, snapshot=answer):
        done = fgpu(tmp_path, "detach", "--yes")
    assert (done.exit_code, done.stderr) == (5, "fgpu: parked: a\n")
    assert len(asked) < 20


def test_detach_without_an_agent_removes_nothing_while_a_tenant_is_parked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[object] = []
    monkeypatch.setattr(daemon.detach, "take_away", lambda *of: removed.append(of))
    said = ["alice: no room", ""]
    monkeypatch.setattr(waking, "wake_all", lambda *_: said.pop(0))
    done = fgpu(tmp_path, "detach", "--yes")
    assert (done.exit_code, removed) == (5, [])
    assert "nothing was removed, still parked: alice: no room" in done.stderr
    assert fgpu(tmp_path, "detach", "--yes").exit_code == 0
    assert len(removed) == 1


def test_nothing_is_removed_while_processes_of_another_layout_are_parked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No agent of this version would find these processes afterwards."""
    monkeypatch.setattr(ledger, "PINS", tmp_path / "fgpu" / "v3")
    monkeypatch.setattr(daemon.detach, "take_away", lambda *_: pytest.fail("removed"))
    (tmp_path / "fgpu" / "v2" / "maps").mkdir(parents=True)
    (tmp_path / "fgpu" / "v2" / "maps" / "parked").touch()
    for words in (["detach", "--yes"], ["wake", "--all"]):
        done = fgpu(tmp_path, *words)
        assert (done.exit_code, "another version of fgpu has parked processes" in done.stderr) == (5, True)


@pytest.mark.parametrize("words", [["wake"], ["wake", "--all", "alice"]])
def test_a_target_and_all_exclude_each_other(tmp_path: Path, words: list[str]) -> None:
    assert fgpu(tmp_path, *words).exit_code == 2
