"""Tests of the texts that commands print, with an agent whose answers each test defines."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.cli import tables
from fgpu_ebpf.cli.event_feed import EventFeed
from fgpu_ebpf.cli.help_texts import Sections
from fgpu_ebpf.cli.main import Main, main
from fgpu_ebpf.snapshot import PoliciesView, Snapshot, plain
from fgpu_ebpf.tenancy.event_log import MOST, EventLog
from tests.unit.cli.cli_kit import agent, fgpu

GIB = 1 << 30


def level(used: int, limit: int, by: str = "set", tenant: str = "alice") -> dict[str, Any]:
    over = max(0, used - limit)
    device = {"gpu": 0, "limit_bytes": limit, "used_bytes": used, "excess_bytes": over}
    return {"tenant": tenant, "by": by, "devices": [device]}


def tenants(*names: str) -> dict[str, Any]:
    return {"tenants": [{"tenant": name} for name in names]}


# -- set, unset, reload, detach


def test_set_explains_a_limit_below_the_bytes_in_use(tmp_path: Path) -> None:
    with agent(tmp_path, put={"tenant": "alice", "level": level(5 * GIB // 2, GIB)}):
        done = fgpu(tmp_path, "set", "alice", "--memory", "1GiB")
    assert done.stdout.splitlines() == [
        "alice: 1GiB",
        "alice holds 2.5GiB of 1GiB on gpu 0: no more memory is admitted until 1.5GiB are freed",
    ]
    with agent(tmp_path, put={"tenant": "alice", "level": level(GIB, GIB)}):
        assert fgpu(tmp_path, "set", "alice", "--memory", "1GiB").stdout == "alice: 1GiB\n"


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (None, "no limit is in force"),
        (level(0, 8 * GIB, "notebooks"), "in force now: 8GiB (source: notebooks, tenant: alice)"),
        (level(0, abi.NO_LIMIT, "batch", "team"), "in force now: no memory limit (source: batch, tenant: team)"),
    ],
)
def test_unset_prints_the_remaining_limit(left: Any, said: str, tmp_path: Path) -> None:
    with agent(tmp_path, drop={"tenant": "alice", "path": "/a", "level": left}):
        assert fgpu(tmp_path, "unset", "alice").stdout == f"alice: limits set by hand are removed; {said}\n"


def test_reload_and_clear_print_their_effect(tmp_path: Path) -> None:
    with agent(tmp_path, reload={"policies": 1}, clear={"device": 3}):
        assert fgpu(tmp_path, "reload").stdout == "reloaded: 1 policy in force\n"
        assert fgpu(tmp_path, "device", "clear", "3").stdout == "gpu 3: shares are offered again\n"


def test_detach_prints_how_many_tenants_have_lost_their_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgpu_ebpf.workloads.cgroups.remove_run_folder", lambda: None)
    for count, said in ((2, "2 tenants have lost their limits"), (1, "1 tenant has lost its limit")):
        with agent(tmp_path, detach={"tenants": count}) as asked:
            assert fgpu(tmp_path, "detach").stdout == f"detached: {said}\n"
        assert [request["verb"] for request in asked] == ["detach"], "confirmation was requested without a terminal"


@pytest.mark.parametrize(
    ("words", "typed", "verbs"),
    [
        (["detach"], "n\n", ["snapshot"]),
        (["detach"], "y\n", ["snapshot", "detach"]),
        (["detach", "--yes"], "", ["detach"]),
    ],
    ids=["no", "yes", "--yes"],
)
def test_detach_asks_for_confirmation_on_a_terminal_unless_yes_is_given(
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


def test_a_tenant_s_own_name_is_not_suggested(tmp_path: Path) -> None:
    """The cgroup of a tenant of kind `gone` was removed, so the tenant is no target."""
    refused = {"error": "the cgroup of job-481 was removed", "code": 4}
    with agent(tmp_path, explain=refused, snapshot=tenants("job-481")):
        assert fgpu(tmp_path, "explain", "job-481").stderr == "fgpu: the cgroup of job-481 was removed\n"


NAMES = ("[/x]", "[red]y[bold]", "a:cat:b", "a\nb", "\x1b[2J", "n" * 300)


@pytest.mark.parametrize("name", NAMES)
def test_tables_show_names_that_tenants_choose_literally_and_on_one_line(name: str) -> None:
    row = tables.ProcessRow("t", 7, 0, 1 << 30, "no_shim", name, "", None, name, "root", 1.0)
    for said in (tables.processes([row]), tables.usage(f"label:{name}", [(name, "s", *"123456")])):
        heading, line, *more = said.splitlines()
        assert not more
        shown = "".join(c if c.isprintable() else "?" for c in name)
        assert shown in line
        assert "\x1b" not in heading + line


FORGED = "/user.slice/x\x1b[2J\x1b[H\x9b2J"
SHOWN = "/user.slice/x?[2J?[H?2J"


def test_no_command_prints_control_characters_of_a_cgroup_s_name(tmp_path: Path) -> None:
    """The kernel permits them in the name of a cgroup, which a tenant may choose."""
    event = {"time_seconds": 1.0, "what": "no room", "tenant": FORGED, "pid": 0, "gpu": None, "operation": "",
             "bytes": 0, "reason": "", "text": f"in {FORGED}", "more": 0}  # fmt: skip
    answers: dict[str, Any] = {
        "explain": {"path": FORGED, "lines": [FORGED, f"  note: {FORGED}"]},
        "events": {"events": [event], "last": 1, "forgotten": 0},
        "drop": {"tenant": None, "path": FORGED, "level": None},
        "put": {"error": f"'x' is ambiguous ({FORGED}): name\none of these cgroups", "code": 4},
        "snapshot": tenants(),
    }
    with agent(tmp_path, **answers):
        assert fgpu(tmp_path, "explain", "x").stdout == f"{SHOWN}\n  note: {SHOWN}\n"
        assert f" no room {SHOWN} in {SHOWN}\n" in fgpu(tmp_path, "events").stdout
        assert fgpu(tmp_path, "unset", "x").stdout.startswith(f"{SHOWN}: limits set by hand are removed")
        refused = f"fgpu: 'x' is ambiguous ({SHOWN}): name\none of these cgroups"
        assert fgpu(tmp_path, "set", "x", "--memory", "1GiB").stderr.startswith(refused)
        assert json.loads(fgpu(tmp_path, "explain", "x", "--json").stdout) == {"path": FORGED}


def test_a_program_that_is_run_gets_all_of_its_own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr("fgpu_ebpf.containers.run.run", lambda _, command: ran.append(command) or 0)
    for words in (["--"], []):
        with agent(tmp_path, run={"folder": "/x", "preload": "/r/p"}) as asked:
            command = ["python3", "t.py", "--memory", "1GiB", "--name", "a", "-h"]
            done = fgpu(tmp_path, "run", "--memory", "8GiB", *words, *command)
        assert (done.exit_code, asked[0]["memory"], asked[0]["name"], ran.pop()) == (0, "8GiB", "", tuple(command))
    with agent(tmp_path) as asked:
        done = fgpu(tmp_path, "run", "--memory", "8GiB", "--memroy", "9", "--", "true")
    assert (done.exit_code, asked) == (125, [])
    assert "--memroy" in done.stderr


@pytest.mark.parametrize("command", ["set", "unset", "explain"])
def test_the_help_of_a_command_with_a_target_lists_the_forms_of_a_target(command: str, tmp_path: Path) -> None:
    said = fgpu(tmp_path, command, "--help").stdout
    for form in ("NAME ", "ID ", "pod/NAMESPACE/NAME ", "unit/NAME ", "/PATH ", "pid/N "):
        assert f"\n    {form}" in said, form


# -- help


def leaves(group: Sections, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.all_commands().items():
        if isinstance(command, Sections):
            yield from leaves(command, (*words, name))
        else:
            yield (*words, name), command


LEAVES = dict(leaves(main))


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_every_command_has_two_valid_examples(words: tuple[str, ...], tmp_path: Path) -> None:
    typed = re.findall(r"^    (.*fgpu.*)$", fgpu(tmp_path, *words, "--help").stdout.split("Examples:")[1], re.M)
    assert len(typed) == 2
    for line in typed:
        line = re.sub(r'^eval "\$\((.*)\)"$', r"\1", line)
        for part in re.split(r"\s(?:\||&&|>)", line):
            first, *rest = shlex.split(part)
            if first != "fgpu":
                continue
            said = next(known for n in (2, 1) if (known := tuple(rest[:n])) in LEAVES)
            LEAVES[said].make_context(" ".join(said), rest[len(said) :])
    assert any(line.replace('eval "$(', "").startswith("fgpu " + " ".join(words)) for line in typed)


def test_help_lists_every_command_in_one_section_and_cuts_no_line(tmp_path: Path) -> None:
    listed = [name for names in Main.sections.values() for name in names]
    assert sorted(listed) == sorted(main.all_commands())
    for words in ((), ("policy",), ("cdi",), ("device",)):
        said = fgpu(tmp_path, *words, "--help").stdout
        assert "..." not in said.split("Options:")[1]
        assert max(map(len, said.splitlines())) <= 80
    assert re.findall(r"^(\w+):$", fgpu(tmp_path, "--help").stdout, re.M)[1:] == [*Main.sections]


# -- events


def log(*events: tuple[int, float, str], of: str | None = None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that answers as an agent with these events: (number, seconds before now, tenant)."""
    fields = {"pid": 0, "gpu": None, "operation": "", "reason": "", "bytes": 0, "text": "", "more": 0}
    rows = [
        {"number": number, "time_seconds": time.time() - ago, "what": "refused", "tenant": tenant, **fields}
        for number, ago, tenant in events
    ]
    last = rows[-1]["number"] if rows else 0
    return lambda asked: {"events": [row for row in rows if row["number"] > asked["since"]], "last": last, "log": of}


def test_events_of_a_cgroup_with_a_name_that_is_not_utf_8_are_printed(tmp_path: Path) -> None:
    with agent(tmp_path, events=log((1, 30, "/\udcff"))):
        done = fgpu(tmp_path, "events")
    assert (done.exit_code, "/\\udcff" in done.stdout) == (0, True)


def test_events_selects_by_time_and_tenant_and_refuses_unknown_values(tmp_path: Path) -> None:
    with agent(tmp_path, events=log((1, 900, "alice"), (2, 30, "bob"), (3, 20, "alice")), snapshot=tenants("carol")):

        def found(*words: str) -> list[int]:
            done = fgpu(tmp_path, "events", "--json", *words)
            return [json.loads(line)["number"] for line in done.stdout.splitlines()]

        assert found() == [1, 2, 3]
        assert found("--since", "10m") == [2, 3]
        assert found("--tenant", "alice") == [1, 3]
        assert found("--tenant", "alice", "--since", "1m") == [3]
        assert found("--tenant", "carol") == []
        wrong = fgpu(tmp_path, "events", "--tenant", "carl")
        assert (wrong.exit_code, wrong.stdout) == (4, "")
        assert wrong.stderr == "fgpu: no tenant and no event has the name 'carl'; did you mean carol?\n"
        assert fgpu(tmp_path, "events", "--since", "ten").exit_code == 2


def test_events_follow_continues_with_the_next_agent(tmp_path: Path) -> None:
    said: list[str] = []
    feed = EventFeed(tmp_path)
    with agent(tmp_path, events=log((1, 30, "a"), (2, 20, "b"))):
        assert [event["tenant"] for event in feed.begin()] == ["a", "b"]
        assert feed.more(said.append) == []
    assert feed.more(said.append) == feed.more(said.append) == []
    assert len(said) == 1, "the missing agent was not reported exactly once"
    with agent(tmp_path, events=log((1, 25, "old"), (2, 10, "c"), (3, 5, "d"))):
        assert [event["tenant"] for event in feed.more(said.append)] == ["c", "d"]
    with agent(tmp_path, events=log((1, 1, "e"))):
        assert [event["tenant"] for event in feed.more(said.append)] == ["e"], "events were lost between the two agents"


def test_events_follow_misses_no_event_of_an_agent_that_starts_between_two_requests(tmp_path: Path) -> None:
    """No request fails, and the next agent has more events than the feed has seen."""
    said: list[str] = []
    feed = EventFeed(tmp_path)
    with agent(tmp_path, events=log((1, 30, "a"), (2, 20, "b"), of="x")):
        assert [event["tenant"] for event in feed.begin()] == ["a", "b"]
    with agent(tmp_path, events=log((1, 15, "c"), (2, 10, "d"), (3, 5, "e"), of="y")):
        assert [event["tenant"] for event in feed.more(said.append)] == ["c", "d", "e"]
        assert feed.more(said.append) == said == []


def test_events_follow_reports_events_that_the_agent_no_longer_keeps(tmp_path: Path) -> None:
    history, said = EventLog(), list[str]()
    feed = EventFeed(tmp_path)
    with agent(tmp_path, events=lambda asked: history.since(asked["since"])):
        history.add("set", tenant="a")
        assert len(feed.begin()) == 1
        for _ in range(MOST + 7):
            history.add("set", tenant="a")
        assert len(feed.more(said.append)) == MOST
        assert feed.more(said.append) == []
    assert said == ["7 events are missing here: the agent no longer keeps them"]


def test_events_follow_reports_no_loss_after_a_request_that_failed(tmp_path: Path) -> None:
    """The agent has more events than it keeps. The feed has seen all of them, and the same agent answers again."""
    history, said = EventLog(), list[str]()
    feed = EventFeed(tmp_path)
    with agent(tmp_path, events=lambda asked: history.since(asked["since"])):
        for _ in range(MOST + 7):
            history.add("set", tenant="a")
        assert len(feed.begin()) == MOST
    assert feed.more(said.append) == []
    with agent(tmp_path, events=lambda asked: history.since(asked["since"])):
        history.add("set", tenant="b")
        assert [event["tenant"] for event in feed.more(said.append)] == ["b"]
    assert [text.partition(";")[2] for text in said] == [" waiting for the agent"]


# -- status


@pytest.mark.parametrize(
    ("policies", "said"),
    [
        (0, "Nothing is managed: no program and no container has a limit."),
        (1, "Nothing is managed: no workload matches the 1 policy in force."),
    ],
)
def test_an_empty_status_prints_the_next_step(policies: int, said: str, tmp_path: Path) -> None:
    found = json.loads(json.dumps(Snapshot(1.0, policies=PoliciesView(True, 1.0, policies, ())), default=plain))
    with agent(tmp_path, snapshot=found):
        shown = fgpu(tmp_path, "status").stdout
    assert shown.startswith("TENANT ")
    assert said in shown
    assert ("fgpu run --memory" in shown) != ("fgpu policy list" in shown)
