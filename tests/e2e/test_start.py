"""Limits that the agent cannot confirm are kept: a start with damaged files, or without room, changes no limit."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import ask, fgpu, metrics
from tests.support.host import GIB, LISTEN, MIB, REFUSED, ROOT, RUN_DIR
from tests.support.place import Place
from tests.support.service import Service
from tests.support.tenant import Client, Tenant
from tests.support.wait import eventually

LAST_GOOD = Path("/var/lib/fgpu/policies.json")
UNIT = ROOT / "deploy/systemd/fgpu-agent.service"
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: {name}}}
spec:
  selector: {{cgroup: ["{cgroup}"]}}
  {rest}
"""


def loaded_seconds() -> float:
    return metrics()["fgpu_config_last_reload_success_timestamp_seconds", frozenset()]


def readiness() -> tuple[int, str]:
    """Return status and text of the response to /readyz."""
    try:
        with urllib.request.urlopen(f"http://{LISTEN}/readyz", timeout=20) as page:
            return page.status, page.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def doctor_says(name: str) -> str:
    """Return the line of `fgpu doctor` about this check."""
    lines = fgpu("doctor", check=False).stdout.splitlines()
    return next(line for line in lines if f" {name}" in line[:20])


class Host:
    """The service with the files that a test damages, and the tenants on it."""

    def __init__(self, service: Service, place: Place) -> None:
        self.service, self.place = service, place
        self.policies = service.policies

    def policy(self, rest: str, cgroup: str = "", name: str = "test", file: str = "50.yaml") -> None:
        """Write a policy for the tenants of this place. Return when the policy is in force."""
        before = loaded_seconds()
        path = cgroup or f"{self.place.group.lstrip('/')}/*"
        (self.policies / file).write_text(POLICY.format(name=name, cgroup=path, rest=rest))
        eventually(lambda: loaded_seconds() > before, 5, "the policy in force")

    def stop(self) -> None:
        """Kill the agent and its gatekeeper with SIGKILL."""
        self.service.kill_agent()
        self.service.kill_gatekeeper()

    def restart(self) -> None:
        self.stop()
        self.service.start_agent()

    def at_its_limit(self, memory: int | None = None) -> tuple[Tenant, Client]:
        """Return a tenant with a program that has filled its limit."""
        tenant = self.place.tenant(memory)
        client = tenant.client()
        client.ok("context")
        client.ok(f"fill {2 * MIB} 0", 120)
        return tenant, client


@pytest.fixture
def host(service: Service, place: Place) -> Iterator[Host]:
    """Return the host. Afterwards the policies' folder is empty, and an agent runs that has read all files."""
    config = service.config.read_text()
    host = Host(service, place)
    yield host
    service.config.write_text(config)
    place.close()
    service.policies.mkdir(exist_ok=True)
    for file in service.policies.iterdir():
        file.unlink()
    if service.agent and service.agent.poll() is None:
        host.stop()
    service.start_agent()


def assert_same_limit(tenant: Tenant, client: Client, limit: int) -> None:
    """Check that neither the running program nor the next one in its cgroup gets more or less than the limit."""
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    assert client.ok("info")[1] == limit
    client.ok("drop 1")
    client.ok(f"alloc {2 * MIB}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    other = tenant.client()
    assert other.do("context") == REFUSED
    assert other.do(f"alloc {2 * GIB}") == REFUSED
    other.close()
    assert tenant.driver() <= limit
    assert tenant.memory()["limit_bytes"] == limit


def no_file(host: Host) -> None:
    (host.policies / "60.yaml").write_text("x: [")


def no_folder(host: Host) -> None:
    shutil.rmtree(host.policies)


# -- policies


@pytest.mark.places("cgroups")
@pytest.mark.parametrize("damage", [no_file, no_folder])
def test_unreadable_policies_at_a_start_are_replaced_by_the_last_valid_policies(
    host: Host, damage: Callable[[Host], None]
) -> None:
    host.policy("memory: {limit: 2GiB}\n  compute: {limit: 50%}")
    tenant, client = host.at_its_limit()
    host.stop()
    damage(host)
    host.service.start_agent()
    assert_same_limit(tenant, client, 2 * GIB)
    newcomer = host.place.tenant(None)
    assert newcomer.client().ok("info")[1] == 2 * GIB
    assert newcomer.view()["devices"][0]["compute"]["limit_ratio"] == 0.5
    eventually(lambda: readiness()[0] == 503, 5, "not ready")
    assert "last good set" in readiness()[1]
    assert "last good set" in fgpu("status").stdout
    assert "FAIL" in doctor_says("policies")
    told = fgpu("reload", check=False)
    assert told.returncode == 1
    assert str(host.policies) in told.stderr
    host.policies.mkdir(exist_ok=True)
    (host.policies / "60.yaml").unlink(missing_ok=True)
    (host.policies / "50.yaml").write_text(
        POLICY.format(name="test", cgroup=f"{host.place.group.lstrip('/')}/*", rest="memory: {limit: 3GiB}")
    )
    assert fgpu("reload").returncode == 0
    eventually(lambda: readiness()[0] == 200, 5, "ready")
    assert client.ok("info")[1] == 3 * GIB


@pytest.mark.places("cgroups")
def test_a_reboot_with_a_typo_in_a_policy_starts_with_the_last_valid_policies(host: Host) -> None:
    host.policy("memory: {limit: 2GiB}")
    fgpu("status")
    kept = LAST_GOOD.read_bytes()
    fgpu("detach")  # a boot finds neither pins nor /run/fgpu, and an unchanged /var
    assert host.service.agent
    host.service.agent.wait(10)
    LAST_GOOD.write_bytes(kept)
    no_file(host)
    host.service.start_agent()
    assert host.place.tenant(None).client().ok("info")[1] == 2 * GIB
    eventually(lambda: readiness()[0] == 503, 5, "not ready")


@pytest.mark.places("cgroups")
def test_pinned_limits_stay_without_valid_policies_and_show_no_policy(host: Host) -> None:
    host.policy("memory: {limit: 2GiB}\n  compute: {limit: 50%}")
    tenant, client = host.at_its_limit()
    host.stop()
    no_file(host)
    LAST_GOOD.unlink()
    said = host.service.log.stat().st_size
    host.service.start_agent()
    text = host.service.log.read_text()[said:]
    assert "policies are not enforced" in text
    assert " enforcing limits, " not in text
    assert_same_limit(tenant, client, 2 * GIB)
    assert tenant.view()["source"] == "kept"
    assert tenant.view()["devices"][0]["compute"]["limit_ratio"] == 0.5
    eventually(lambda: readiness()[0] == 503, 5, "not ready")
    assert "FAIL" in doctor_says("start")
    assert "kept" in fgpu("explain", tenant.path).stdout
    (host.policies / "60.yaml").unlink()
    assert fgpu("reload").returncode == 0
    assert tenant.view()["source"] == "policy"
    eventually(lambda: readiness()[0] == 200, 5, "ready")


def by_command(host: Host) -> str:
    """Return the message of `fgpu reload`, which fails."""
    told = fgpu("reload", check=False)
    assert told.returncode == 1
    return told.stderr


def by_systemctl(host: Host) -> str:
    """Return the output of `fgpu status` after `systemctl reload`, which runs the unit's command and prints nothing."""
    agent = host.service.agent
    assert agent
    (command,) = re.findall(r"^ExecReload=(.*)$", UNIT.read_text(), re.MULTILINE)
    subprocess.run(shlex.split(command.replace("$MAINPID", str(agent.pid))), check=True, timeout=10)
    time.sleep(1)  # until the agent's next tick

    def told() -> str:
        text = fgpu("status").stdout
        return text if "does not exist" in text else ""

    return eventually(told, 5, "the report of the missing folder")


@pytest.mark.places("cgroups")
@pytest.mark.parametrize("reload", [by_command, by_systemctl])
def test_a_reload_without_the_policy_folder_reports_that_and_changes_nothing(
    host: Host, reload: Callable[[Host], str]
) -> None:
    host.policy("memory: {limit: 2GiB}")
    tenant, client = host.at_its_limit()
    no_folder(host)
    for _ in range(2):
        assert "does not exist" in reload(host)
        assert_same_limit(tenant, client, 2 * GIB)


@pytest.mark.places("cgroups")
def test_a_policy_that_is_removed_without_an_agent_no_longer_applies(host: Host) -> None:
    host.policy("memory: {limit: 2GiB}")
    tenant, client = host.at_its_limit()
    host.stop()
    (host.policies / "50.yaml").unlink()
    host.service.start_agent()
    assert not [t for t in ask(verb="snapshot")["tenants"] if t["path"] == tenant.path]
    eventually(lambda: client.ok("info")[1] > 15 * GIB, 3, "the device's own size")
    eventually(lambda: readiness()[0] == 200, 5, "ready")


# -- state files


def empty(file: Path) -> None:
    file.write_text("")


def garbage(file: Path) -> None:
    file.write_text("[{")


def no_list(file: Path) -> None:
    file.write_text(json.dumps({"version": 9, "overrides": []}))


def gone(file: Path) -> None:
    file.unlink()


def folder_in_its_place(file: Path) -> None:
    file.unlink()
    file.mkdir()


def of_every_entry(**fields: object) -> Callable[[Path], None]:
    """Return a function that adds these fields to each entry of the file."""

    def change(file: Path) -> None:
        file.write_text(json.dumps([entry | fields for entry in json.loads(file.read_text())]))

    return change


LOST = {
    "empty": empty,
    "garbage": garbage,
    "newer": no_list,
    "gone": gone,
    "folder": folder_in_its_place,
    "wrong number": of_every_entry(memory_bytes="2GiB"),
    "below zero": of_every_entry(memory_bytes=-1),
    "unknown priority": of_every_entry(priority="urgent"),
    "unknown share": of_every_entry(share="8gib-50pct-high"),
}


@pytest.mark.places("cgroups")
@pytest.mark.parametrize("damage", LOST.values(), ids=LOST)
def test_a_limit_set_by_hand_survives_an_invalid_overrides_file(host: Host, damage: Callable[[Path], None]) -> None:
    tenant, client = host.at_its_limit(2 * GIB)
    host.stop()
    damage(RUN_DIR / "overrides.json")
    for _ in range(2):  # the second start reads the file that the first one has written
        host.service.start_agent()
        assert_same_limit(tenant, client, 2 * GIB)
        assert tenant.view()["source"] == "kept"
        assert "overrides.json" in " ".join(tenant.view()["notes"])
        eventually(lambda: readiness()[0] == 503, 5, "not ready")
        assert "overrides.json" in doctor_says("start")
        host.stop()
    host.service.start_agent()
    fgpu("set", tenant.path, "--memory", "3GiB")
    assert tenant.view()["source"] == "set"
    assert client.ok("info")[1] == 3 * GIB
    eventually(lambda: readiness()[0] == 200, 5, "ready")
    host.service.check()


@pytest.mark.places("cgroups")
def test_unset_removes_a_kept_limit(host: Host) -> None:
    tenant, client = host.at_its_limit(2 * GIB)
    host.stop()
    empty(RUN_DIR / "overrides.json")
    host.service.start_agent()
    fgpu("unset", tenant.path)
    eventually(lambda: client.ok("info")[1] > 15 * GIB, 3, "the device's own size")
    host.restart()
    assert client.ok("info")[1] > 15 * GIB


@pytest.mark.places("cgroups")
def test_unknown_fields_in_the_overrides_file_are_ignored(host: Host) -> None:
    tenant, client = host.at_its_limit(2 * GIB)
    host.stop()
    of_every_entry(colour="blue")(RUN_DIR / "overrides.json")
    host.service.start_agent()
    assert tenant.view()["source"] == "set"
    assert_same_limit(tenant, client, 2 * GIB)


@pytest.mark.places("cgroups")
@pytest.mark.parametrize("text", ["", "[{", "[]", '{"x": "much"}', '{"x": -1}', "9" * 10_000])
def test_a_start_with_a_damaged_cache_of_context_sizes_changes_no_limit(host: Host, text: str) -> None:
    tenant, client = host.at_its_limit(2 * GIB)
    host.stop()
    sizes = Path("/var/lib/fgpu/contexts.json")
    known = json.loads(sizes.read_text())
    sizes.write_text(text.replace("x", next(iter(known))))
    host.service.start_agent()
    assert_same_limit(tenant, client, 2 * GIB)
    assert json.loads(sizes.read_text()) == known
    host.service.check()


# -- room


def forbid_overcommit(host: Host) -> None:
    text = host.service.config.read_text()
    host.service.config.write_text(text.replace("overcommit: allow", "overcommit: forbid"))
    host.restart()


def limits(tenants: list[Tenant]) -> list[int]:
    return [tenant.memory()["limit_bytes"] for tenant in tenants]


@pytest.mark.places("cgroups")
def test_a_restart_grants_earlier_commitments_first(host: Host) -> None:
    """Tenants that have never used the device take no room from tenants that have used it."""
    forbid_overcommit(host)
    host.policy("memory: {limit: 6GiB}")
    idle = [host.place.tenant(None) for _ in range(4)]
    busy = [host.place.tenant(None) for _ in range(2)]
    clients = [tenant.client() for tenant in busy]
    for client in clients:
        client.ok(f"alloc {2 * GIB}")
    idle += [host.place.tenant(None) for _ in range(4)]
    for _ in range(3):
        host.restart()
        assert limits(busy) == [6 * GIB] * 2
        for client in clients:
            client.ok(f"alloc {64 * MIB}")
    assert not any(tenant.view()["denied"] for tenant in [*idle, *busy])
    assert idle[0].client().do("context") == REFUSED
    assert idle[0].view()["denied"]
    host.restart()
    assert limits([*busy, idle[0]]) == [6 * GIB, 6 * GIB, 0]


@pytest.mark.places("cgroups")
def test_a_limit_that_could_not_be_raised_stays_unchanged(host: Host) -> None:
    forbid_overcommit(host)
    host.policy("memory: {limit: 6GiB}")
    tenants = [host.place.tenant(None) for _ in range(2)]
    clients = [tenant.client() for tenant in tenants]
    for client in clients:
        client.ok(f"alloc {2 * GIB}")
    host.policy("memory: {limit: 12GiB}")
    for _ in range(2):
        assert limits(tenants) == [6 * GIB] * 2
        for client in clients:
            client.ok(f"alloc {64 * MIB}")
        host.restart()


@pytest.mark.places("cgroups")
def test_an_override_that_no_longer_fits_at_a_restart_is_kept(host: Host) -> None:
    tenants = [host.place.tenant(9 * GIB) for _ in range(2)]
    clients = [tenant.client() for tenant in tenants]
    for client in clients:
        client.ok("context")
        assert client.ok("info")[1] == 9 * GIB
    forbid_overcommit(host)
    assert limits(tenants) == [9 * GIB] * 2
    for client in clients:
        assert client.do(f"alloc {9 * GIB}") == REFUSED
    eventually(lambda: readiness()[0] == 503, 5, "not ready")
    assert "do not fit" in doctor_says("start")
    assert fgpu("set", tenants[0].path, "--memory", "10GiB", check=False).returncode == 1
    assert limits(tenants) == [9 * GIB] * 2
    fgpu("set", tenants[0].path, "--memory", "4GiB")
    host.restart()
    assert limits(tenants) == [4 * GIB, 9 * GIB]
    eventually(lambda: readiness()[0] == 200, 5, "ready")


@pytest.mark.places("cgroups")
def test_limits_set_by_hand_inside_a_limited_group_fit_after_a_restart(host: Host) -> None:
    forbid_overcommit(host)
    host.policy("memory: {limit: 12GiB}", cgroup=host.place.group.lstrip("/"))
    tenants = [host.place.tenant(6 * GIB) for _ in range(3)]
    clients = [tenant.client() for tenant in tenants]
    for client in clients:
        client.ok("context")
    for _ in range(2):
        host.restart()
        assert limits(tenants) == [6 * GIB] * 3
        assert {tenant.view()["source"] for tenant in tenants} == {"set"}
    eventually(lambda: readiness()[0] == 200, 5, "ready")


# -- settings that a call of `fgpu set` omits stay unchanged


@pytest.mark.places("cgroups")
def test_set_gives_no_memory_on_devices_that_the_policy_excludes(host: Host) -> None:
    host.policy("devices: [7]\n  memory: {limit: 2GiB}")
    tenant = host.place.tenant(None)
    for asked in (("--compute", "50%"), ("--memory", "4GiB")):
        fgpu("set", tenant.path, *asked)
        assert limits([tenant]) == [0]
        assert tenant.client().do("context") != "ok"
        host.restart()
    assert limits([tenant]) == [0]
