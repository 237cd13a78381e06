"""Agent and gatekeeper have exactly the listed rights, need each of them, and execute no program after their start.

Each right is checked with one scenario: a container whose programs belong to another user is found, and its limit
holds. It has a libcuda that only this user may read, and this file is probed. A killed gatekeeper is replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.bypass_kit import RAW, Bypass
from tests.support.commands import fgpu, metrics
from tests.support.host import CONTEXT, FGPU, MIB, REFUSED, ROOT, RUN_DIR, SIM, cgroup_root
from tests.support.kernel import is_probed
from tests.support.place import Container
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import Timeout, eventually, remove_cgroup

GATEKEEPER = {"dac_read_search": 2, "sys_ptrace": 19, "sys_admin": 21}
AGENT = GATEKEEPER | {"chown": 0, "kill": 5, "sys_nice": 23}
NOBODY = 65534
FITS = 40 * MIB
full = pytest.mark.skipif(os.environ.get("FGPU_TEST_SCALE") != "full", reason="only in a full run: starts agents")


def mask(capabilities: dict[str, int]) -> int:
    return sum(1 << number for number in capabilities.values())


def rights(pid: int) -> list[dict[str, str]]:
    """Return the fields of /proc/PID/task/TID/status, for each thread of the process."""
    found = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(dict(re.findall(r"^(\w+):\s*(.*)$", (thread / "status").read_text(), re.MULTILINE)))
    return found


def assert_has_just(pid: int, capabilities: dict[str, int]) -> None:
    wanted = mask(capabilities)
    with contextlib.suppress(Timeout):  # it may have just started
        eventually(lambda: all(int(thread["CapPrm"], 16) == wanted for thread in rights(pid)))
    for thread in rights(pid):
        held = {name: int(thread[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapAmb")}
        assert held == {"CapPrm": wanted, "CapEff": wanted, "CapInh": 0, "CapAmb": 0}, thread["Name"]
        assert thread["NoNewPrivs"] == "1"
        bounding = int(thread["CapBnd"], 16)  # without SETPCAP a gatekeeper cannot reduce what the agent left to it
        assert bounding in (wanted, mask(AGENT))


class Nobodys(Container):
    """Containers whose programs run as an unprivileged user, with a libcuda that only this user may read."""

    def _bundle(self, bundle: Path, name: str, folder: Path) -> None:
        super()._bundle(bundle, name, folder)
        own = bundle / "rootfs/own"
        own.mkdir()
        shutil.copy(SIM / "lib/libcuda.so.1", own / "libcuda.so.1")
        for path, mode in ((own / "libcuda.so.1", 0o400), (own, 0o700), (folder, 0o700)):
            path.chmod(mode)
            os.chown(path, NOBODY, NOBODY)
        spec = json.loads((bundle / "config.json").read_text())
        spec["process"]["user"] = {"uid": NOBODY, "gid": NOBODY}
        (bundle / "config.json").write_text(json.dumps(spec))


@pytest.fixture
def nobodys(unharmed: None, tmp_path: Path) -> Iterator[Nobodys]:
    """Return a place for such containers.

    Their programs read commands from a root-owned file that every user may open.
    """
    before = os.umask(0)
    place = Nobodys(tmp_path, "runc")
    yield place
    place.close()
    os.umask(before)


def limit_holds(one: Tenant) -> None:
    client = one.client()
    client.ok("context", 30)
    client.ok(f"alloc {FITS}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED
    one.assert_exact()
    client.kill()
    client.close()


def own_libcuda_is_probed(one: Tenant) -> None:
    client = one.client(before=f"env LD_LIBRARY_PATH=/own:{SIM}/lib")
    assert " /own/libcuda.so.1\n" in Path(f"/proc/{client.pid}/maps").read_text()
    client.ok("context", 30)  # the hello is answered once the files of the process are probed
    assert is_probed(one.place.work / f"{one.name}.bundle/rootfs/own/libcuda.so.1")
    client.kill()
    client.close()


def gatekeeper_comes_again(service: Service, one: Tenant) -> None:
    service.kill_gatekeeper()
    eventually(service.gatekeepers, 20, "another gatekeeper")
    limit_holds(one)


def comes_first(service: Service) -> None:
    assert service.agent
    pids = [service.agent.pid, *service.gatekeepers()]
    assert all(os.getpriority(os.PRIO_PROCESS, pid) == -10 for pid in pids), "a nice level is not -10"


def first_failure(service: Service, place: Nobodys) -> str:
    """Return the first step of the scenario that fails, or an empty string."""
    try:
        service.start_agent()
    except AssertionError:
        return "start"
    try:
        one = place.tenant(CONTEXT + FITS)
    except AssertionError:
        return "set"
    steps = {
        "priority": lambda: comes_first(service),
        "limit": lambda: limit_holds(one),
        "probe": lambda: own_libcuda_is_probed(one),
        "gatekeeper": lambda: gatekeeper_comes_again(service, one),
    }
    for name, step in steps.items():
        try:
            step()
        except (AssertionError, Timeout):
            return name
    return ""


def end_agent(service: Service) -> None:
    """End the agent. Its pins stay, so that the next start is fast."""
    assert service.agent
    service.agent.terminate()
    service.agent.wait(20)


@contextlib.contextmanager
def agents_with(service: Service, capabilities: set[str]) -> Iterator[None]:
    """Stop the agent. The next agent has these capabilities and cannot get any others."""
    listed = ",".join(f"+{name}" for name in sorted(capabilities))
    end_agent(service)
    service.command = ["setpriv", f"--bounding-set=-all,{listed}", "--inh-caps=-all", "--no-new-privs", *FGPU]
    try:
        yield
    finally:
        service.command = FGPU
        end_agent(service)
        service.start_agent()


def test_agent_and_gatekeeper_started_as_root_keep_exactly_their_capabilities(service: Service, unharmed: None) -> None:
    assert service.agent
    assert_has_just(service.agent.pid, AGENT)
    (first,) = service.gatekeepers()
    assert_has_just(first, GATEKEEPER)
    service.kill_gatekeeper()
    (second,) = eventually(service.gatekeepers, 20, "another gatekeeper")
    assert_has_just(second, GATEKEEPER)


def test_fgpu_run_creates_the_first_tenant_on_a_host_without_a_cgroup_fgpu(service: Service, unharmed: None) -> None:
    end_agent(service)
    folder = cgroup_root() / "fgpu"
    for left in [*filter(Path.is_dir, folder.glob("*")), folder]:
        if left.exists():
            left.rmdir()
    service.start_agent()
    assert service.agent
    assert_has_just(service.agent.pid, AGENT)
    assert fgpu("run", "--memory", "1GiB", "echo", "began").stdout == "began\n"
    assert fgpu("run", "--memory", "1GiB", "echo", "again").stdout == "again\n"


@pytest.mark.slow
def test_the_listed_capabilities_are_sufficient(service: Service, nobodys: Nobodys) -> None:
    service.detach()  # so that the loader runs too
    with agents_with(service, set(AGENT)):
        assert first_failure(service, nobodys) == ""
        nobodys.close()


# The step that fails without the capability.
MISSED = {"sys_admin": "set", "sys_ptrace": "set", "dac_read_search": "probe", "sys_nice": "priority"}


@full
@pytest.mark.parametrize("name", MISSED)
def test_the_scenario_fails_without_each_capability(service: Service, nobodys: Nobodys, name: str) -> None:
    with agents_with(service, set(AGENT) - {name}):
        assert first_failure(service, nobodys) == MISSED[name]
        nobodys.close()


def test_the_tests_cover_every_capability() -> None:
    assert {*MISSED, "chown", "kill"} == set(AGENT)  # the next tests check the other two


@full
@pytest.mark.parametrize("has", [True, False])
def test_the_agent_needs_chown_to_give_its_socket_to_the_group(service: Service, unharmed: None, has: bool) -> None:
    with tempfile.NamedTemporaryFile("w", suffix="group") as groups:
        groups.write(Path("/etc/group").read_text() + "fgpu:x:65533:\n")
        groups.flush()
        with agents_with(service, set(AGENT) if has else set(AGENT) - {"chown"}):
            alone = ["unshare", "--mount", "sh", "-c", f'mount --bind {groups.name} /etc/group && exec "$@"', "sh"]
            service.command = [*alone, *service.command]
            if not has:
                with pytest.raises(AssertionError, match="the agent ended"):
                    service.start_agent()
                return
            service.start_agent()
            assert (RUN_DIR / "control.sock").stat().st_gid == 65533


KILLING = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: kills}
spec:
  selector: {cgroup: ["fgpu-e2e/*"]}
  memory: {limit: 1GiB}
  onBypass: kill
"""


def is_killed(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(") ")[2].startswith("Z")


@full
@pytest.mark.parametrize("has", [True, False])
def test_the_agent_needs_kill_for_a_process_that_no_probe_reports(
    service: Service, nobodys: Nobodys, has: bool
) -> None:
    with agents_with(service, set(AGENT) if has else set(AGENT) - {"kill"}):
        policy = service.policies / "kills.yaml"
        policy.write_text(KILLING)
        try:
            service.start_agent()
            one = nobodys.tenant(None)
            unseen = Bypass(one, "raw", RAW)
            unseen.send(f"alloc {2 << 30}")
            try:
                eventually(lambda: is_killed(unseen.pid), 5, "the kill")
            except Timeout:
                assert not has
            else:
                assert has, "the agent killed a process without CAP_KILL"
            unseen.kill()
            unseen.close()
        finally:
            policy.unlink()
            nobodys.close()


# -- the programs that agent and gatekeeper execute

POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: a}
spec: {selector: {cgroup: nowhere}, memory: {limit: 1GiB}}
"""


class Watch:
    """A separate cgroup for the agent, and a list of the programs that are executed in it."""

    def __init__(self) -> None:
        self.folder = cgroup_root() / f"fgpu-e2e-watch-{os.getpid()}"
        self.folder.mkdir()
        command = ["/usr/bin/python3", Path(__file__).with_name("exec_kit.py"), str(self.folder.stat().st_ino)]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 # as long as the watch
        self._kit: Any = subprocess.Popen([*command, ROOT / "bpf"], stdin=subprocess.PIPE, stdout=self._said)
        eventually(lambda: self.began() == ["ready"], 30, "the watch")

    def began(self) -> list[str]:
        return os.pread(self._said.fileno(), 1 << 16, 0).decode().splitlines()

    def enter(self) -> list[str]:
        """Return the start of a command line that runs its program in the cgroup."""
        return ["sh", "-c", f'echo $$ >{self.folder}/cgroup.procs && exec "$@"', "sh"]

    def close(self) -> None:
        self._kit.communicate()
        self._said.close()
        remove_cgroup(self.folder, 20)


@pytest.fixture
def watch(service: Service, unharmed: None) -> Iterator[Watch]:
    """Run an agent in a watched cgroup until the test's end."""
    service.detach()
    watch = Watch()
    try:
        service.command = [*watch.enter(), *FGPU]
        service.start_agent()
        yield watch
    finally:
        service.command = FGPU
        service.detach()
        watch.close()
        service.start_agent()


@pytest.mark.slow
def test_no_program_except_a_gatekeeper_is_executed_after_the_start(
    service: Service, watch: Watch, nobodys: Nobodys
) -> None:
    """The run includes tenants, limits, probes, policies, every request, and a dead gatekeeper."""
    assert len(watch.began()) > 2, "the watch does not report the loader and the gatekeeper"
    start = len(watch.began())
    one = nobodys.tenant(CONTEXT + FITS)
    limit_holds(one)
    own_libcuda_is_probed(one)
    for words in (["status"], ["ps"], ["metrics"], ["events"], ["explain", one.path], ["doctor"]):
        fgpu(*words, check=False)
    policy = service.policies / "a.yaml"
    policy.write_text(POLICY)
    policy.chmod(0o644)  # the agent refuses a file that others may write
    eventually(lambda: metrics()["fgpu_policies", frozenset()] == 1, 20, "the policy")
    policy.unlink()
    assert watch.began()[start:] == []
    gatekeeper_comes_again(service, one)
    again = eventually(lambda: watch.began()[start:], 5, "the report of the gatekeeper")
    assert len(again) == 1, again
    assert again[0].startswith("python"), again
