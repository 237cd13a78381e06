"""Settings of the page on recipes, in real engines: the promised limits are in force."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.commands import output
from tests.support.containers import engines
from tests.support.host import BUILD, CONTEXT, ENVIRONMENT, GIB, REFUSED, ROOT, SHIM, free_port
from tests.support.place import Cgroups
from tests.support.service import Service, compile_programs
from tests.support.tenant import Tenant
from tests.support.wait import eventually

PAGE = (ROOT / "docs/recipes.md").read_text()
FILES = dict(re.findall(r'^```\w+ title="(.+?)"\n(.*?)^```', PAGE, re.MULTILINE | re.DOTALL))
LIMITS = {"nproc": 100, "nofile": 1024}


class Shared(Service):
    """A host with the page's shares, and the default shares that the page names."""

    def __init__(self, work: Path, asked: Sequence[str]) -> None:
        super().__init__(work, asked)
        shares = yaml.safe_load(FILES["/etc/fgpu/agent.yaml"])["shares"]
        with self.config.open("a") as config:
            config.write(f"shares: {[*shares, '4gib', '12gib']}\n")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The simulated driver (16 GiB, one device) and the agent."""
    compile_programs()
    with Shared.running(tmp_path_factory.mktemp("service"), "docker") as service:
        yield service


@contextlib.contextmanager
def cgroups(service: Service, work: Path, group: str, policy: str) -> Iterator[Cgroups]:
    """Yield cgroups inside one of the host's. Their programs have the page's variable and a policy of the page."""
    place = Cgroups(work)
    place.group = group
    with engines.policy(service, policy, FILES[f"/etc/fgpu/policy.d/{policy}"]):
        yield place
        place.close()


@pytest.fixture
def users(service: Service, tmp_path: Path) -> Iterator[Cgroups]:
    """Yield sessions of users."""
    with cgroups(service, tmp_path, "/user.slice", "20-users.yaml") as place:
        yield place


def slice_of(one: Tenant) -> dict[str, Any]:
    """Return the line of `fgpu status` for the slice of a session's user."""
    path = os.path.dirname(one.path)
    return eventually(lambda: next((t for t in output("status")["tenants"] if t["path"] == path), None), 5, path)


def test_a_recipe_limits_all_programs_of_a_user_together(users: Cgroups) -> None:
    first, second = (users.named(f"user-1000.slice/session-{number}.scope") for number in (1, 2))
    other = users.named("user-1001.slice/session-3.scope")
    one, two, neighbour = first.client(), second.client(), other.client()
    assert one.ok("info")[1] == 8 * GIB
    assert slice_of(first)["enforcement"] == "kernel"
    one.ok(f"alloc {5 * GIB}")
    assert two.do(f"alloc {3 * GIB}") == REFUSED
    two.ok(f"alloc {GIB}")
    neighbour.ok(f"alloc {5 * GIB}")
    assert slice_of(first)["devices"][0]["used_bytes"] == 2 * CONTEXT + 6 * GIB
    assert slice_of(other)["devices"][0]["compute"]["weight"] == 100


def test_a_recipe_ends_only_the_program_without_the_variable_that_exceeds_the_limit(users: Cgroups) -> None:
    one = users.named("user-1000.slice/session-1.scope")
    honest, without = one.client(), one.client(before="env -u LD_PRELOAD")
    honest.ok(f"alloc {6 * GIB}")
    without.send(f"alloc {2 * GIB}")
    eventually(lambda: without.pid not in one.pids(), 5, "the end of the program without the shim")
    assert slice_of(one)["devices"][0]["used_bytes"] <= 8 * GIB
    honest.ok("info")


def test_a_recipe_of_slurm_limits_the_tasks_of_a_job_together(service: Service, tmp_path: Path) -> None:
    assert FILES["/etc/environment"].strip() in FILES["/etc/slurm/fgpu.sh"]
    with cgroups(service, tmp_path, "/system.slice/slurmstepd.scope", "30-slurm.yaml") as jobs:
        first, second = (jobs.named(f"job_7/step_0/user/task_{number}") for number in (0, 1))
        one, two, other = first.client(), second.client(), jobs.named("job_8/step_0/user/task_0").client()
        limit = one.ok("info")[1]
        assert 3 * GIB < limit <= 4 * GIB  # a quarter of the memory that tenants can get
        one.ok(f"alloc {2 * GIB}")
        assert two.do(f"alloc {2 * GIB}") == REFUSED
        other.ok(f"alloc {2 * GIB}")


@pytest.fixture
def with_etc(tmp_path: Path) -> Callable[[str, str], str]:
    """Return a function that makes a prefix of a command.

    The prefix gives the command a changed copy of /etc as its /etc.
    """
    etc = tmp_path / "etc"
    shutil.copytree("/etc", etc, symlinks=True)
    (etc / "ld.so.preload").unlink(missing_ok=True)

    def prefix(change: str, then: str) -> str:
        script = tmp_path / "with-etc"
        inside = tmp_path / "inside"
        script.write_text(f'#!/bin/sh\nexec unshare --mount {inside} "$@"\n')
        inside.write_text(f"#!/bin/sh\nset -e\nmount --bind {etc} /etc\n{change}\nexec {then}\n")
        for file in (script, inside):
            file.chmod(0o755)
        return str(script)

    return prefix


def test_a_recipe_limits_a_user_by_a_preload_list_of_all_programs(
    users: Cgroups, with_etc: Callable[[str, str], str]
) -> None:
    (command,) = re.findall(r"`sudo (ln -s \S+ /etc/ld\.so\.preload)`", PAGE)
    one = users.named("user-1000.slice/session-1.scope")
    client = one.client(before=with_etc(command, 'env -u LD_PRELOAD "$@"'))
    assert client.ok("info")[1] == 8 * GIB
    client.ok(f"alloc {5 * GIB}")
    assert client.do(f"alloc {3 * GIB}") == REFUSED
    assert slice_of(one)["enforcement"] == "kernel"
    without = one.client(before="env -u LD_PRELOAD")
    without.ok(f"alloc {GIB}")
    eventually(lambda: bypassing().get(without.pid) == "no_admission", 5, "the report of a program without the shim")
    assert bypassing()[client.pid] == ""


def bypassing() -> dict[int, str]:
    return {row["pid"]: row["how"] for row in output("ps")}


def test_a_recipe_limits_programs_of_a_login(users: Cgroups, with_etc: Callable[[str, str], str]) -> None:
    """The test logs in by `su`, which reads /etc/environment by PAM."""
    line = FILES["/etc/environment"].strip().replace("/var/lib/fgpu/shim/current/libfgpu.so", str(SHIM))
    library = ENVIRONMENT["LD_LIBRARY_PATH"]
    login = f'su --login daemon --shell /bin/sh --command "env LD_LIBRARY_PATH={library} $*"'
    one = users.named("user-1000.slice/session-1.scope")
    client = one.client(before=with_etc(f"unset LD_PRELOAD; echo {line} >/etc/environment", login))
    assert client.ok("info")[1] == 8 * GIB
    client.ok(f"alloc {7 * GIB}")
    assert client.do(f"alloc {GIB}") == REFUSED
    assert slice_of(one)["enforcement"] == "kernel"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load(FILES["compose.yaml"])["services"])


def test_a_recipe_of_compose_gives_each_service_its_limit(docker: engines.Engine, compose: dict[str, Any]) -> None:
    """Engines get the names of `devices` as Compose passes them on."""
    limits = {"train": 8 * GIB, "notebook": 2 * GIB}
    assert compose.keys() == limits.keys()
    for name, one in compose.items():
        devices = [word for device in one["devices"] if device != "nvidia.com/gpu=all" for word in ("--device", device)]
        assert len(devices) == 2
        with docker.filled(name, *devices) as held:
            assert held + CONTEXT == limits[name]


def filled_by(logs: str) -> dict[str, int]:
    """Return the bytes that the program of each service got, with its context, from the logs of Compose."""
    return {name: int(got) + CONTEXT for name, got in re.findall(r"^(\w+)-1 .*admitted (\d+) bytes", logs, re.M)}


@pytest.mark.skipif(os.environ.get("FGPU_TEST_SCALE") != "full", reason="downloads a package of Debian's sid")
def test_a_recipe_runs_with_compose(docker: engines.Engine, compose: dict[str, Any], tmp_path: Path) -> None:
    """The file is the page's, except for the image, the program and NVIDIA's devices, which do not exist here."""
    for one in compose.values():
        one["devices"].remove("nvidia.com/gpu=all")
        one |= {"image": "plain:1", "command": ["sh", "-c", engines.FILL], "network_mode": "none", "ulimits": LIMITS}
        one["volumes"] = [f"{BUILD}:/opt/build:ro", "/run/fgpu-sim:/run/fgpu-sim"]
        one["environment"] = {"LD_LIBRARY_PATH": "/opt/build/sim/lib"}
    file = tmp_path / "compose.yaml"
    file.write_text(yaml.safe_dump({"services": compose}))
    command = [*docker.cave.prefix, engines.compose(), "--project-name", "recipe", "--file", file]
    environment = {**docker.environment, "DOCKER_HOST": f"unix://{docker.work}/docker.sock"}

    def called(*words: str) -> str:
        done = subprocess.run(
            [*command, *words], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        called("up", "--detach")
        held = eventually(
            lambda: len(found := filled_by(called("logs"))) == len(compose) and found, 20, "both services"
        )
        assert held == {"train": 8 * GIB, "notebook": 2 * GIB}
    finally:
        called("down", "--timeout", "1")


# What JupyterHub reads after the page's file. Here are no proxy, no network and no NVIDIA: the hub itself answers as
# the server of each user, and the user's container runs the program that fills its limit.
HUB = """
import dockerspawner, jupyterhub.proxy

class Routes(jupyterhub.proxy.Proxy):
    should_start, known = False, {}

    async def add_route(self, routespec, target, data):
        self.known[routespec] = {"routespec": routespec, "target": target, "data": data}

    async def delete_route(self, routespec):
        self.known.pop(routespec, None)

    async def get_all_routes(self):
        return self.known

class Spawner(dockerspawner.DockerSpawner):
    async def get_ip_and_port(self):
        return "127.0.0.1", HERE["port"]

def here(spawner):
    ours, nvidias = limits(spawner)["device_requests"]
    assert nvidias["Capabilities"] == [["gpu"]]
    return {"device_requests": [ours], "pids_limit": -1, "ulimits": HERE["ulimits"]}

c.JupyterHub.update(spawner_class=Spawner, proxy_class=Routes, authenticator_class="dummy", db_url="sqlite://")
c.JupyterHub.hub_bind_url = f"http://127.0.0.1:{HERE['port']}"
c.JupyterHub.services = [{"name": "test", "api_token": HERE["token"]}]
c.JupyterHub.load_roles = [{"name": "test", "scopes": ["admin:users", "admin:servers", "groups"], "services": ["test"]}]
c.JupyterHub.load_groups = {"staff": {"users": ["ada"]}, "students": {"users": ["bob"]}}
c.JupyterHub.tornado_settings = {"slow_spawn_timeout": 60, "slow_stop_timeout": 60}
c.Authenticator.allowed_users = {"ada", "bob", "eve"}
c.DockerSpawner.update(image="plain:1", network_name="none", cmd=HERE["cmd"], extra_host_config=here)
c.DockerSpawner.update(volumes=HERE["volumes"], environment={"LD_LIBRARY_PATH": "/opt/build/sim/lib"})
"""


class Hub:
    """A JupyterHub with the page's settings. `ada` is in the group `staff`, `bob` in `students`, `eve` in none."""

    def __init__(self, docker: engines.Engine, work: Path) -> None:
        here = {
            "port": free_port(), "token": secrets.token_hex(16),
            "cmd": ["sh", "-c", f"trap exit TERM; {engines.HOLD} 600 & wait"],
            "volumes": {str(BUILD): {"bind": "/opt/build", "mode": "ro"}, "/run/fgpu-sim": "/run/fgpu-sim"},
            "ulimits": [{"Name": name, "Soft": value, "Hard": value} for name, value in LIMITS.items()],
        }  # fmt: skip
        self._docker, self._log = docker, work / "hub.log"
        self._api, self._token = f"http://127.0.0.1:{here['port']}/hub/api", here["token"]
        (work / "jupyterhub_config.py").write_text(f"HERE = {here!r}\n{FILES['jupyterhub_config.py']}{HUB}")
        environment = {**os.environ, "DOCKER_HOST": f"unix://{docker.work}/docker.sock"}
        with open(self._log, "wb") as log:
            command = [sys.executable, "-m", "jupyterhub"]
            self._process = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=log)
        eventually(self._answers, 20, "JupyterHub")

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        with contextlib.suppress(OSError):  # also a connection that the hub has closed
            return bool(self.ask("GET", ""))
        return False

    def ask(self, method: str, path: str, given: object = None) -> str:
        """Send a request to the API, and return the answer."""
        request = urllib.request.Request(f"{self._api}/{path}", method=method)
        request.add_header("Authorization", f"token {self._token}")
        data = json.dumps(given).encode() if given else None
        try:
            with urllib.request.urlopen(request, data, timeout=60) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            error.add_note(self._log.read_text()[-3000:])
            raise

    def filled(self, user: str) -> int:
        """Start a user's server. Return the bytes that it got, with its context."""
        self.ask("POST", f"users/{user}/server")
        said = self.ask("GET", f"users/{user}/server/progress")
        assert '"ready": true' in said, said
        name = f"jupyter-{user}"
        found = eventually(lambda: engines.ANSWER.search(self._docker.call("logs", name).stdout), 20, name)
        return int(found[1]) + CONTEXT

    def end(self, user: str) -> None:
        """End a user's server. Return after Docker has removed its container, which the hub does not wait for."""
        self.ask("DELETE", f"users/{user}/server")
        name = f"jupyter-{user}"
        eventually(lambda: name not in self._docker.call("ps", "--all").stdout, 20, f"no container {name}")

    def close(self) -> None:
        """End the hub, which removes the containers."""
        self._process.terminate()
        self._process.wait(60)


def test_a_recipe_of_jupyterhub_gives_groups_their_shares(docker: engines.Engine, tmp_path: Path) -> None:
    hub = Hub(docker, tmp_path)
    try:
        assert hub.filled("ada") == 12 * GIB
        assert hub.filled("bob") == 2 * GIB
        hub.end("ada")
        hub.ask("POST", "groups/students/users", {"users": ["ada"]})
        hub.ask("DELETE", "groups/staff/users", {"users": ["ada"]})
        assert hub.filled("ada") == 2 * GIB, "a new container has the share of the new group"
        assert hub.filled("eve") == 4 * GIB
    finally:
        hub.close()


def test_the_recipe_of_a_workstation_is_an_example_of_the_package() -> None:
    example = yaml.safe_load((ROOT / "examples/policy.d/20-users.yaml").read_text())
    assert yaml.safe_load(FILES["/etc/fgpu/policy.d/20-users.yaml"]) == example
