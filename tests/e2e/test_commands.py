"""The commands as documented: arguments, text, JSON, exit codes and metrics."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ask, fgpu, metrics, metrics_page, output
from tests.support.host import CONTEXT, ENVIRONMENT, FGPU, GIB, METRICS, MIB, REFUSED, ROOT
from tests.support.place import Place
from tests.support.service import Service
from tests.support.wait import Deadline, eventually

FAMILIES = {
    "fgpu_memory_limit_bytes": {"tenant", "gpu"},
    "fgpu_memory_used_bytes": {"tenant", "gpu"},
    "fgpu_memory_peak_bytes": {"tenant", "gpu"},
    "fgpu_memory_refused_total": {"tenant", "gpu", "operation", "reason"},
    "fgpu_memory_admitted_bytes_total": {"tenant", "gpu"},
    "fgpu_memory_witnessed_bytes_total": {"tenant", "gpu"},
    "fgpu_memory_drift_bytes": {"tenant", "gpu"},
    "fgpu_processes": {"tenant"},
    "fgpu_tenant_enforcement": {"tenant", "mode"},
    "fgpu_device_memory_capacity_bytes": {"gpu"},
    "fgpu_device_memory_used_bytes": {"gpu"},
    "fgpu_device_memory_committed_bytes": {"gpu"},
    "fgpu_device_memory_unmanaged_bytes": {"gpu"},
    "fgpu_device_unmanaged_processes": {"gpu"},
    "fgpu_device_healthy": {"gpu"},
    "fgpu_device_xids_total": {"gpu", "cause"},
}


@pytest.mark.places("host")
def test_metrics_show_the_memory_and_the_refusals_of_a_tenant(tenant) -> None:
    limit = CONTEXT + 40 * MIB
    one = tenant(limit)
    client = one.client()
    client.ok("context")
    with one.growing(40 * MIB):
        client.ok(f"fill {2 * MIB} 0")
    mine = {("tenant", one.name), ("gpu", "0")}

    def values() -> dict[str, float]:
        found = metrics(metrics_page())
        of_memory = {key: value for key, value in found.items() if key[0].startswith("fgpu_memory_")}
        return {name: value for (name, labels), value in of_memory.items() if labels >= mine}

    expected = {
        "fgpu_memory_limit_bytes": limit,
        "fgpu_memory_used_bytes": limit,
        "fgpu_memory_peak_bytes": limit,
        "fgpu_memory_refused_total": 1,
        "fgpu_memory_admitted_bytes_total": 40 * MIB,
        "fgpu_memory_witnessed_bytes_total": 40 * MIB,
        "fgpu_memory_drift_bytes": 0,
    }
    eventually(lambda: values() == expected, 5, f"{expected}, not {values()}")
    page = metrics(metrics_page())
    assert page["fgpu_processes", frozenset({("tenant", one.name)})] == 1
    for name, labels in FAMILIES.items():
        found = [set(dict(have)) for family, have in page if family == name]
        assert found, name
        assert all(have == labels for have in found), (name, found)
    uuids = [dict(have)["gpu_uuid"] for family, have in page if family == "fgpu_device_info"]
    assert re.fullmatch(r"GPU-[0-9a-f-]{36}", uuids[0])


@pytest.mark.places("host")
def test_status_and_ps_show_the_same_bytes_and_metrics_have_the_tenant(tenant) -> None:
    one = tenant(CONTEXT + 40 * MIB)
    client = one.client()
    with one.growing():
        client.ok(f"alloc {20 * MIB}")
    used = one.assert_exact()
    status = output("status")
    shown = next(t for t in status["tenants"] if t["tenant"] == one.name)
    assert shown["kind"] == "tenant"
    assert shown["enforcement"] == "kernel"
    assert shown["path"] == one.path
    assert shown["cgroup"] == one.cgroup.stat().st_ino
    own = {"pid": client.pid, "gpu": 0, "bytes": used, "how": "", "why": "", "loader": "", "parked_bytes": 0}
    assert shown["processes"] == [own]
    assert shown["devices"][0]["used_bytes"] == used
    rows = output("ps")
    assert [(r["pid"], r["tenant"], r["bytes"]) for r in rows if r["tenant"] == one.name] == [
        (client.pid, one.name, used)
    ]
    table = fgpu("status").stdout
    assert re.search(rf"^{one.name} .*538MiB", table, re.MULTILINE), table
    assert str(client.pid) in fgpu("ps").stdout
    device = status["devices"][0]
    assert device["capacity_bytes"] == 16 * GIB
    assert device["unmanaged_bytes"] == 0
    assert f'tenant="{one.name}"' in fgpu("metrics").stdout


@pytest.mark.places("runc")
def test_ps_lists_unmanaged_processes_only_with_an_option(place: Place, tenant) -> None:
    managed, free = tenant(CONTEXT + 40 * MIB), place.tenant(None)
    client, stranger = managed.client(), free.client()
    with managed.growing():
        client.ok("context")
    assert client.do(f"alloc {GIB}") == REFUSED, "the limit is not enforced"
    stranger.ok(f"alloc {GIB}")

    def rows(*words: str) -> dict[int, dict[str, Any]]:
        return {row["pid"]: row for row in json.loads(fgpu("ps", "--json", *words).stdout)}

    whole = CONTEXT + GIB
    eventually(lambda: rows("--all").get(stranger.pid, {}).get("bytes") == whole, 3, "NVML's row with all memory")
    row = rows("--all")[stranger.pid]
    assert (row["tenant"], row["gpu"], row["bytes"], row["how"]) == (None, 0, CONTEXT + GIB, "unmanaged")
    assert row["why"] == free.path
    assert rows("--all").keys() - rows().keys() == {stranger.pid}
    table = fgpu("ps", "--all").stdout
    assert re.search(rf"^- +{stranger.pid} .* unmanaged \({re.escape(free.path)}\)$", table, re.MULTILINE), table


@pytest.mark.places("host")
def test_set_unset_and_reload_print_their_effect(tenant) -> None:
    one = tenant(CONTEXT + 40 * MIB)
    client = one.client()
    with one.growing():
        client.ok(f"alloc {40 * MIB}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED, "the limit is not enforced"
    limit = CONTEXT + 20 * MIB
    said = fgpu("set", one.name, "--memory", f"{limit}B").stdout.splitlines()
    assert said[0] == f"{one.name}: {limit}B"
    assert said[1].endswith("on gpu 0: no more memory is admitted until 20MiB are freed")
    assert "0B left, refused once: no more memory is admitted until 20MiB are freed" in fgpu("explain", one.name).stdout
    wrong = fgpu("unset", one.name[:-1] + "x", check=False)
    assert wrong.returncode == 4
    assert f"did you mean {one.name}?" in wrong.stderr
    assert fgpu("unset", one.name).stdout == f"{one.name}: limits set by hand are removed; no limit is in force\n"
    assert fgpu("reload").stdout == "reloaded: 0 policies in force\n"


@pytest.mark.places("host")
def test_events_follow_continues_across_an_agent_restart(service: Service, unharmed: None, tenant) -> None:
    one = tenant(CONTEXT + 40 * MIB)
    one.assert_enforced()
    fgpu("set", one.name, "--memory", "2GiB")
    followed = [*FGPU, "events", "-f", "--json", "--tenant", one.name]
    with subprocess.Popen(followed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as feed:
        assert feed.stdout
        assert feed.stderr
        assert json.loads(feed.stdout.readline())["bytes"] == 2 * GIB
        service.kill_agent()
        assert "no agent answers" in feed.stderr.readline()
        service.start_agent()
        fgpu("set", one.name, "--memory", "1GiB")
        event = json.loads(feed.stdout.readline())
        assert (event["what"], event["tenant"], event["bytes"]) == ("set", one.name, GIB)
        feed.terminate()


def test_the_metrics_page_at_the_loopback_address_is_plain_text(service: Service) -> None:
    assert METRICS.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(METRICS, timeout=20) as page:
        assert page.headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["status"], 0),
        (["nonsense"], 2),
        (["set", "/no/such/cgroup", "--memory", "1GiB"], 4),
        (["set", "pid/999999999", "--memory", "1GiB"], 4),
        (["set", "/../etc", "--memory", "1GiB"], 4),
        (["set", "no-such-tenant", "--memory", "1GiB"], 4),
        (["unset", "/no/such/cgroup"], 4),
        (["set", "/"], 2),
        (["set", "/fgpu", "--memory", "8GB"], 2),
        (["set", "/fgpu", "--memory", "-1"], 2),
        (["set", "/fgpu", "--memory", "much"], 2),
        (["set", "/fgpu", "--memory", "6"], 2),
        (["set", "/fgpu", "--memory", "101%"], 2),
        (["run", "--memory", "6", "--", "true"], 125),
        (["set", "/fgpu", "--memory", f"{2**64}B"], 2),
        (["run", "--memory", "8GB", "--", "true"], 125),
        (["run", "--memory", "1GiB"], 125),
        (["run", "--priority", "highest", "--", "true"], 125),
        (["run", "--memory", "1GiB", "--name", "../x", "--", "true"], 125),
        (["run", "--memory", "1GiB", "--", "/no/such/program"], 127),
        (["run", "--memory", "1GiB", "--", "/etc/passwd"], 126),
        (["run", "--memory", "1GiB", "--", "true"], 0),
        (["run", "--memory", "1GiB", "--", "false"], 1),
    ],
)
def test_commands_return_the_documented_exit_codes(service: Service, words: list[str], code: int) -> None:
    root = service and fgpu("run", "--memory", "1GiB", "--", "true")  # so that /fgpu exists
    assert root.returncode == 0
    done = fgpu(*words, check=False)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    if code not in (0, 1):
        assert done.stderr.strip(), "the command failed without a message"
    if code in (4, 126, 127) or (code == 125 and "Usage" not in done.stderr):
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("uid", "gid", "said"),
    [
        *[("65534", "65534", "65534"), ("", "", "0"), ("0", "0", "0"), ("\u00b2", "1", "0")],
        *[("4294967294", "1", "are not the ids of a user"), ("65534", "9" * 30, "are not the ids of a user")],
    ],
)
def test_run_under_sudo_uses_the_calling_user_s_id_and_refuses_invalid_ids(
    service: Service, uid: str, gid: str, said: str
) -> None:
    environment = {**ENVIRONMENT, "SUDO_UID": uid, "SUDO_GID": gid}
    done = fgpu("run", "--memory", "1GiB", "--", "id", "-u", env=environment, check=False)
    assert "Traceback" not in done.stderr
    assert said in (done.stderr if done.returncode else done.stdout)
    assert done.returncode == (125 if said == "are not the ids of a user" else 0)


# -- without the permission to ask

OUTSIDER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def as_outsider(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user that is neither root nor in the group `fgpu`."""
    command = [*OUTSIDER, *FGPU, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=ENVIRONMENT, cwd="/", check=False)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        *[([word], 3) for word in ("status", "ps", "top", "events", "metrics", "reload", "detach")],
        (["set", "/fgpu", "--memory", "1GiB"], 3),
        (["run", "--memory", "1GiB", "--", "true"], 125),
    ],
    ids=str,
)
def test_commands_tell_a_user_without_permission_that_the_agent_runs(
    service: Service, words: list[str], code: int
) -> None:
    done = as_outsider(*words)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1
    assert "the agent runs, but this user has no access to it" in done.stderr
    assert "use sudo" in done.stderr
    assert "start it" not in done.stderr
    assert fgpu("status").returncode == 0, "the agent has stopped"


def test_doctor_tells_a_user_without_permission_that_the_agent_runs(service: Service) -> None:
    (found,) = [one for one in json.loads(as_outsider("doctor", "--json").stdout) if one["name"] == "agent"]
    assert not found["ok"]
    assert "the agent runs" in found["found"]
    assert "use sudo" in found["fix"]


def test_a_command_reports_no_agent_at_the_socket_of_an_exited_agent(service: Service, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for folder in (tmp_path, run_dir):
        folder.chmod(0o755)
    (run_dir / "agent.lock").touch()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(run_dir / "control.sock"))
        (run_dir / "control.sock").chmod(0o600)
        done = as_outsider("--run-dir", str(run_dir), "status")
    assert done.returncode == 3
    assert "no agent answers" in done.stderr
    assert "start the agent with `" in done.stderr


GARBAGE = [
    b"{}\n",
    b"[1]\n",
    b"\xff\xfe\n",
    b"[" * 60000 + b"\n",
    b'{"verb": "events", "since": "abc"}\n',
    b'{"verb": "events", "since": [1]}\n',
    b'{"verb": ["snapshot"]}\n',
    b'{"verb": "explain", "target": 7}\n',
    b'{"verb": "put", "target": "/", "memory": {"a": 1}}\n',
    b'{"verb": "put", "target": "/", "weight": 1e400}\n',
    b"x" * (1 << 17),
]


@pytest.mark.parametrize("said", GARBAGE, ids=[str(said[:40]) for said in GARBAGE])
def test_the_agent_answers_an_invalid_request_with_an_error(service: Service, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect("/run/fgpu/control.sock")
        answer = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the agent does not read more than it needs
            sock.sendall(said)
        with contextlib.suppress(ConnectionResetError):
            while more := sock.recv(1 << 16):
                answer += more
    assert json.loads(answer)["error"]
    assert ask(verb="snapshot")["failures"] == 0


@pytest.mark.timed
def test_a_slow_client_delays_no_other_client(service: Service) -> None:
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect("/run/fgpu/control.sock")
        for letter in b'{"verb"':
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the agent may have closed it by now
                slow.send(bytes([letter]))
            deadline = Deadline(1)
            assert ask(verb="ping")["pid"]
            assert not deadline.is_over()
            time.sleep(0.1)
        slow.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert slow.recv(1) == b"", "the agent has not closed the slow connection"


def test_set_suggests_8gib_for_8gb(service: Service) -> None:
    assert "did you mean 8GiB?" in fgpu("set", "/", "--memory", "8GB", check=False).stderr


def test_an_unprivileged_user_cannot_connect_to_the_control_socket(service: Service) -> None:
    """The control socket belongs to root and to a group that the user of this process is not in."""
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", ASK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.stdout.strip() == "refused", done


ASK = """
import socket
with socket.socket(socket.AF_UNIX) as sock:
    try:
        sock.connect("/run/fgpu/control.sock")
        print("connected")
    except PermissionError:
        print("refused")
"""


def test_run_refuses_root_of_another_user_namespace(service: Service) -> None:
    words = ["unshare", "--user", "--map-root-user", *FGPU, "run", "--memory", "1GiB", "--", "true"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False, env=ENVIRONMENT)
    assert done.returncode == 125
    assert "needs root on the host" in done.stderr


@pytest.mark.slow
def test_the_demo_enforces_both_limits(service: Service) -> None:
    command = [sys.executable, ROOT / "examples/demo.py", "--sim", "--metrics", METRICS]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, check=False, env={**os.environ, **ENVIRONMENT}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^(?:alice|bob): .* held$", done.stdout, re.MULTILINE)) == 2, done.stdout
    assert METRICS in done.stdout
    assert "4096MiB" in done.stdout


def test_dev_help_lists_every_command_of_dev() -> None:
    said = subprocess.run([ROOT / "dev", "help"], capture_output=True, text=True, timeout=60, check=True).stdout
    verbs = re.findall(r"^([a-z]+)(?: \|.*)?\) ", (ROOT / "dev").read_text(), re.MULTILINE)
    assert {"setup", "build", "demo", "sim", "test", "check", "bench", "docs"} <= set(verbs)
    for verb in verbs:
        assert re.search(rf"^  {verb}\b", said, re.MULTILINE), verb
    wrong = subprocess.run([ROOT / "dev", "nonsense"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode
    assert "no command nonsense" in wrong.stderr
