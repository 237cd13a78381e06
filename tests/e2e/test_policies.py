"""Changes of policy files at run time: new tenants, changed limits, `observe`, and `onBypass: kill`."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.bypass_kit import RAW, Bypass
from tests.e2e.policies_kit import GROUP, Write, is_good
from tests.support.commands import ask, events, fgpu, metrics
from tests.support.host import CONTEXT, ENVIRONMENT, GIB, MIB, REFUSED, RUN_DIR, cgroup_root
from tests.support.service import Service
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually


@pytest.fixture
def container(write: Write, place, tenant) -> Callable[[], object]:
    """Return a function that makes a container without a limit by `fgpu set`."""
    return lambda: tenant(None)


@pytest.mark.places("runc")
def test_a_container_that_a_policy_matches_is_a_tenant_before_its_first_call(write: Write, container) -> None:
    write("memory: {limit: 2GiB}", name="notebooks")
    one = container()
    one.assert_enforced()
    client = one.client()
    assert client.ok("info")[1] == 2 * GIB
    with one.growing():
        client.ok(f"fill {2 * MIB} 0")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert one.assert_exact() == one.memory()["limit_bytes"] == 2 * GIB
    view = one.view()
    assert (view["policy"], view["source"]) == ("notebooks", "policy")
    infos = [dict(labels) for family, labels in metrics() if family == "fgpu_tenant_info"]
    assert any(i["policy"] == "notebooks" and i["tenant"] == one.name for i in infos)


@pytest.mark.places("runc")
def test_a_changed_policy_file_applies_to_running_programs(write: Write, container) -> None:
    write("memory: {limit: 2GiB}")
    one = container()
    client = one.client()
    assert client.ok("info")[1] == 2 * GIB
    write("memory: {limit: 3GiB}")
    assert client.ok("info")[1] == 3 * GIB
    write("memory: {limit: 600MiB}")
    assert client.ok("info")[1] == 600 * MIB
    assert client.do(f"alloc {200 * MIB}") == REFUSED


@pytest.mark.places("runc")
def test_a_limit_of_0_gives_no_memory(service: Service, write: Write, container) -> None:
    write("memory: {limit: 0, contexts: 1}")
    one = container()
    client = one.client()
    assert client.do("context") == REFUSED
    assert re.findall(r"(\d+)MiB / +(\d+)MiB", one.run("nvidia-smi")) == [("0", "0")]
    for _ in range(2):
        assert (one.memory()["limit_bytes"], one.view()["denied"], one.view()["enforcement"]) == (0, "", "kernel")
        level = ask(verb="explain", target=one.path)["levels"][0]["devices"][0]
        assert (level["limit_bytes"], level["counts"]) == (0, True)
        assert ask(verb="snapshot")["devices"][0]["committed_bytes"] == 0
        assert {metrics()[key] for key in metrics() if key[0] == "fgpu_memory_limit_bytes"} == {0}
        service.kill_agent()
        service.start_agent()
    assert " 0B " in fgpu("status").stdout
    assert " 0B " in fgpu("top", "--once").stdout
    assert "0B of 0B used, 0B left" in fgpu("explain", one.path).stdout
    write("memory: {limit: 2GiB}")
    client.ok("context")
    write("memory: {limit: 0}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED


@pytest.mark.places("runc")
def test_an_invalid_policy_file_changes_no_limit_and_is_reported(service: Service, write: Write, container) -> None:
    write("memory: {limit: 2GiB}")
    one = container()
    client = one.client()
    (service.policies / "60.yaml").write_text("spec: {memory: {limit: 8GB}}")
    eventually(lambda: not is_good(), 5, "a failed reload in the metrics")
    assert client.ok("info")[1] == 2 * GIB
    told = fgpu("events").stdout
    assert "60.yaml" in told
    assert "policies refused" in told
    done = fgpu("policy", "check", service.policies, check=False)
    assert done.returncode == 1
    assert "60.yaml:1" in done.stdout + done.stderr


@pytest.mark.places("runc")
def test_a_tenant_that_no_policy_matches_any_more_becomes_unmanaged_and_unlimited(write: Write, container) -> None:
    write("memory: {limit: 2GiB}")
    one = container()
    client = one.client()
    client.ok(f"alloc {100 * MIB}")
    one.assert_exact()
    write("memory: {limit: 2GiB}", selector='{cgroup: ["elsewhere/*"]}')
    assert not [t for t in ask(verb="snapshot")["tenants"] if t["path"] == one.path]
    eventually(lambda: client.ok("info")[1] > 15 * GIB, 3, "the device's own size")
    eventually(lambda: client.do(f"alloc {4 * GIB}").startswith("ok"), 3, "memory beyond the old limit")


# -- modes


@pytest.mark.places("runc")
def test_mode_observe_refuses_nothing_and_counts_refusals(write: Write, container) -> None:
    write("mode: observe\n  memory: {limit: 1GiB}")
    one = container()
    client = one.client()
    free, total = client.ok("info")
    assert total > 15 * GIB
    client.ok(f"alloc {2 * GIB}")
    assert one.view()["enforcement"] == "observe"
    assert one.assert_exact() > 2 * GIB
    refusals = one.memory()["refusals"]
    assert {(r["operation"], r["reason"]) for r in refusals} == {("memory", "observed")}
    assert one.memory()["refused"] == 0
    write("memory: {limit: 1GiB}")
    eventually(lambda: client.do(f"alloc {2 * MIB}") == REFUSED, 2, "enforcement")
    assert free


def bypassing_client(folder: Path, cgroup: Path, name: str) -> Client:
    """Start a CUDA program without the shim in the tenant's cgroup."""

    class Outside:
        """A stand-in for a tenant, with the attributes that a program needs."""

        def __init__(self) -> None:
            self.folder, self.name, self.cgroup = folder, name, cgroup

        def tell(self, line: str) -> None:
            name, command = line.split(" ", 1)
            enter = f'echo $$ >{cgroup}/cgroup.procs; exec {command} <"{name}.in" >"{name}.out" 2>"{name}.err"'
            subprocess.Popen(["sh", "-c", enter], cwd=folder, env=ENVIRONMENT)

        def host_pid(self, inner: int) -> int:
            return inner

    return Client(Outside(), name)  # type: ignore[arg-type]


def is_told(what: str, one: Tenant, client: Client) -> bool:
    """Return whether there is an event of that kind about the tenant's program."""
    return any((event["pid"], event["tenant"]) == (client.pid, one.name) for event in events(what))


@pytest.mark.timed
@pytest.mark.places("runc")
def test_a_bypass_is_charged_and_named_within_a_second(write: Write, container) -> None:
    write("memory: {limit: 2GiB}")
    one = container()
    one.assert_enforced()
    client = bypassing_client(one.folder, one.cgroup, "outside")
    client.ok(f"alloc {100 * MIB}")
    key = "fgpu_bypassing_processes", frozenset({("tenant", one.name), ("how", "no_admission")})
    eventually(lambda: metrics().get(key) == 1, 1, "the bypass")
    eventually(lambda: is_told("bypass", one, client), 5, "the event of the bypass")
    assert "no_admission" in fgpu("ps").stdout
    assert f"without the shim: pid {client.pid}" in fgpu("explain", one.path).stdout
    assert one.assert_exact() == CONTEXT + 100 * MIB
    client.ok(f"alloc {4 * GIB}")  # the process is reported, not killed
    client.close()


@pytest.mark.places("runc")
def test_on_bypass_kill_ends_a_process_before_the_driver_is_called(write: Write, container) -> None:
    write("memory: {limit: 1GiB}\n  onBypass: kill")
    one = container()
    one.assert_enforced()
    behaved = one.client()
    behaved.ok("context")
    client = bypassing_client(one.folder, one.cgroup, "outside")
    client.send(f"alloc {2 * GIB}")
    eventually(lambda: not os.path.exists(f"/proc/{client.pid}") or _is_zombie(client.pid), 5, "the kill")
    eventually(lambda: is_told("killed", one, client), 5, "the event of the kill")
    assert one.memory()["peak_bytes"] <= 1 * GIB
    assert behaved.do(f"alloc {2 * GIB}") == REFUSED  # a program that requests admission is refused, not killed
    behaved.ok(f"alloc {2 * MIB}")
    client.close()


@pytest.mark.places("runc")
def test_on_bypass_kill_ends_a_process_that_no_probe_reports(write: Write, container) -> None:
    write("memory: {limit: 1GiB}\n  onBypass: kill")
    one = container()
    one.assert_enforced()
    unseen = Bypass(one, "raw", RAW)
    unseen.ok(f"alloc {100 * MIB}")
    assert one.assert_exact(5) >= 100 * MIB
    assert not _is_zombie(unseen.pid), "a process was killed although the tenant is within its limit"
    unseen.send(f"alloc {2 * GIB}")
    eventually(lambda: _is_zombie(unseen.pid), 5, "the kill")
    expected = unseen.pid, "onBypass"
    eventually(lambda: expected in {(e["pid"], e["reason"]) for e in events("killed")}, 5, "the event of the kill")
    unseen.close()
    eventually(lambda: one.client().do("context").startswith("ok"), 5, "room for another program")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return True


# -- by hand


@pytest.mark.places("runc")
def test_an_override_takes_precedence_until_it_is_unset(service: Service, write: Write, container) -> None:
    write("memory: {limit: 2GiB}")
    one = container()
    client = one.client()
    assert client.ok("info")[1] == 2 * GIB
    fgpu("set", one.path, "--memory", "1GiB")
    assert client.ok("info")[1] == GIB
    write("memory: {limit: 3GiB}")
    assert client.ok("info")[1] == GIB
    service.kill_agent()
    service.start_agent()
    assert client.ok("info")[1] == GIB
    fgpu("unset", one.path)
    assert client.ok("info")[1] == 3 * GIB
    assert fgpu("unset", one.path, check=False).returncode == 4


@pytest.mark.places("runc")
def test_explain_names_the_policy_and_why_other_policies_do_not_match(write: Write, container) -> None:
    write("memory: {limit: 8GiB}", name="services", selector="{unit: ['*.service']}", file="10.yaml")
    write("memory: {limit: 2GiB}", name="containers")
    one = container()
    said = fgpu("explain", one.path).stdout
    assert "policy containers" in said
    assert "policy services does not match: the workload has no unit" in said
    assert "enforcement: kernel" in said
    answer = json.loads(fgpu("explain", "--json", one.path).stdout)
    assert answer["policy"] == "containers"
    assert answer["levels"][0]["devices"][0]["limit_bytes"] == 2 * GIB
    assert "no policy matches" in fgpu("explain", "/").stdout
    assert fgpu("explain", "nobody", check=False).returncode == 4


@pytest.mark.places("runc")
def test_a_workload_s_request_applies_up_to_the_policy_s_maximum(write: Write, container) -> None:
    write("memory: {limit: 1GiB, max: 4GiB}")
    one = container()
    client = one.client()
    assert client.ok("info")[1] == GIB
    os.setxattr(one.cgroup, "user.fgpu.memory", b"3GiB")
    ask(verb="reload")
    eventually(lambda: client.ok("info")[1] == 3 * GIB, 3, "the requested limit")
    os.setxattr(one.cgroup, "user.fgpu.memory", b"9GiB")
    ask(verb="reload")
    eventually(lambda: client.ok("info")[1] == 4 * GIB, 3, "the maximum")
    assert "allows 4GiB" in fgpu("explain", one.path).stdout


# -- moves and groups


@pytest.mark.places("runc")
def test_charges_follow_a_process_that_is_moved_to_another_cgroup(write: Write, container) -> None:
    write("memory: {limit: 3GiB}")
    one, two = container(), container()
    client = one.client()
    client.ok(f"alloc {200 * MIB}")
    assert one.assert_exact() == CONTEXT + 200 * MIB
    (two.cgroup / "cgroup.procs").write_text(str(client.pid))
    eventually(
        lambda: (one.memory()["used_bytes"], two.memory()["used_bytes"]) == (0, CONTEXT + 200 * MIB), 2, "the move"
    )
    (pointer,) = client.ok(f"alloc {100 * MIB}")
    assert two.assert_exact() == CONTEXT + 300 * MIB
    client.ok(f"free {pointer}")
    assert two.assert_exact() == CONTEXT + 200 * MIB
    (cgroup_root() / "cgroup.procs").write_text(str(client.pid))
    eventually(lambda: two.memory()["used_bytes"] == 0, 2, "the move to the root")
    client.kill()


@pytest.mark.places("runc")
def test_a_group_s_limit_applies_to_the_sum_of_its_tenants(write: Write, container) -> None:
    write("memory: {limit: 2GiB}", name="whole", selector=f'{{cgroup: ["{GROUP}"]}}', file="10.yaml")
    write("memory: {limit: 2GiB}", name="each")
    one, two = container(), container()
    first, second = one.client(), two.client()
    first.ok(f"alloc {600 * MIB}")
    second.ok("context")
    assert second.do(f"alloc {1 * GIB}") == REFUSED
    views = {t["path"]: t for t in ask(verb="snapshot")["tenants"]}
    assert views[f"/{GROUP}"]["kind"] == "group"
    assert views[f"/{GROUP}"]["devices"][0]["used_bytes"] == one.assert_exact() + two.assert_exact()
    assert views[f"/{GROUP}"]["devices"][0]["refused"] == 1


# -- room


@pytest.mark.places("runc")
def test_limits_whose_sum_exceeds_the_device_are_refused(strict: Service, write: Write, container) -> None:
    write("memory: {limit: 9GiB}")
    first = container().client()
    assert first.ok("info")[1] == 9 * GIB
    two = container()  # the agent may find the containers in either order
    second = two.client()
    assert second.do("context") == REFUSED
    assert "9GiB for" in fgpu("explain", two.path).stdout
    done = fgpu("run", "--memory", "9GiB", "--", "true", check=False)
    assert done.returncode == 125
    assert "9GiB of 15.9GiB are committed" in done.stderr
    assert fgpu("set", two.path, "--memory", "9GiB", check=False).returncode == 1
    fgpu("set", two.path, "--memory", "4GiB")
    eventually(lambda: second.do("context").startswith("ok"), 3, "room")
    assert metrics()["fgpu_device_memory_committed_bytes", frozenset({("gpu", "0")})] == 13 * GIB
    assert strict.agent


@pytest.mark.places("runc")
def test_out_of_memory_on_the_device_is_not_counted_as_a_refusal_by_the_limit(write: Write, container) -> None:
    write("memory: {limit: 15GiB}")
    one, two = container(), container()
    first, second = one.client(), two.client()
    first.ok(f"alloc {12 * GIB}")
    assert second.do(f"alloc {6 * GIB}") == REFUSED
    refusals = {(r["operation"], r["reason"]) for r in two.memory()["refusals"]}
    assert refusals == {("memory", "device_full")}
    assert two.memory()["refused"] == 0


# -- the control socket


@pytest.mark.places("runc")
def test_root_of_another_user_namespace_may_read_and_not_write(write: Write, container) -> None:
    write("memory: {limit: 2GiB}")
    one = container()
    counted = metrics()["fgpu_control_refused_total", frozenset()]
    script = (
        "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
        "s.sendall(sys.argv[2].encode()+b'\\n'); print(s.recv(65536).decode()[:200])"
    )

    def tell(request: dict[str, object]) -> str:
        command = ["unshare", "-Ur", "/usr/bin/python3", "-c", script, RUN_DIR / "control.sock", json.dumps(request)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout

    assert '"ok"' in tell({"verb": "ping"})
    assert "needs root on the host" in tell({"verb": "put", "target": one.path, "memory": "9GiB"})
    assert one.memory()["limit_bytes"] == 2 * GIB
    assert metrics()["fgpu_control_refused_total", frozenset()] == counted + 1
