"""Processes older than fgpu are adopted, reported, and never killed. No memory is admitted until everything fits."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import ask, events, fgpu, metrics
from tests.support.host import CONTEXT, ENVIRONMENT, GIB, KINDS, MIB, REFUSED, SHIM, cgroup_root
from tests.support.service import Service
from tests.support.sim_driver import driver_books
from tests.support.tenant import Client
from tests.support.wait import eventually, remove_cgroup

NAME = "fgpu-before"
HELD = 1400 * MIB
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {name: install}
spec:
  selector: {cgroup: ["fgpu-before"]}
  memory: {limit: 1GiB}
  onBypass: kill
"""


class Before:
    """A cgroup, with the parts of a tenant that its programs need, with the shim or without."""

    name = NAME

    def __init__(self, folder: Path) -> None:
        self.folder, self.cgroup = folder, cgroup_root() / NAME
        self.cgroup.mkdir()

    def tell(self, line: str) -> None:
        name, command = line.split(" ", 1)
        enter = f'echo $$ >{self.cgroup}/cgroup.procs; exec {command} <"{name}.in" >"{name}.out" 2>"{name}.err"'
        preload = {"LD_PRELOAD": str(SHIM)} if name.startswith("shim") else {}
        subprocess.Popen(["sh", "-c", enter], cwd=self.folder, env=ENVIRONMENT | preload)

    def host_pid(self, inner: int) -> int:
        return inner

    def program(self, name: str) -> Client:
        return Client(self, name)  # type: ignore[arg-type]

    def end(self) -> None:
        for pid in (self.cgroup / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        remove_cgroup(self.cgroup)


@pytest.fixture
def before(service: Service, unharmed: None, tmp_path: Path) -> Iterator[Before]:
    """Return a host without fgpu. Afterwards fgpu runs, and no process is older than fgpu."""
    service.detach()
    place = Before(tmp_path)
    yield place
    place.end()
    (service.policies / "install.yaml").unlink(missing_ok=True)
    service.detach()
    service.start_agent()


def install(service: Service) -> None:
    """Start an agent, with a policy for the cgroup of these tests."""
    (service.policies / "install.yaml").write_text(POLICY)
    service.start_agent()
    key = "fgpu_tenant_enforcement", frozenset({("tenant", NAME), ("mode", "kernel")})
    eventually(lambda: metrics().get(key) == 1, 3, "enforcement")


def memory() -> dict[str, int]:
    """Return the tenant's figures for device 0."""
    return next(t for t in ask(verb="snapshot")["tenants"] if t["tenant"] == NAME)["devices"][0]


def uses(bytes_: int) -> bool:
    """Return whether this many bytes are charged and held by the driver."""
    holds = sum(one[f"{kind}_bytes"] for one in driver_books() for kind in KINDS)
    return memory()["used_bytes"] == holds == bytes_


def test_a_running_process_is_adopted_and_reported_and_further_memory_is_refused(
    service: Service, before: Before
) -> None:
    older = before.program("older")
    (pointer,) = older.ok(f"alloc {HELD}")
    install(service)
    eventually(lambda: uses(CONTEXT + HELD), 3, "the adoption")
    assert memory()["limit_bytes"] == GIB
    older_one = "fgpu_bypassing_processes", frozenset({("tenant", NAME), ("how", "older")})
    assert metrics()[older_one] == 1
    (told,) = eventually(lambda: events("adopted"), 3, "the event of the adoption")
    assert (told["tenant"], told["pid"], told["gpu"], told["bytes"]) == (NAME, older.pid, 0, CONTEXT + HELD)
    assert told["reason"] == "older than fgpu"
    assert "of 1GiB: nothing more is admitted" in told["text"]
    assert re.search(rf"^{NAME} .* 1GiB +1\.9GiB ", fgpu("status").stdout, re.MULTILINE)
    assert re.search(rf"^{NAME} +{older.pid} .* older$", fgpu("ps").stdout, re.MULTILINE)
    assert f"started before fgpu: pid {older.pid}" in fgpu("explain", f"/{NAME}").stdout
    younger = before.program("shim-younger")
    assert younger.do("context") == REFUSED
    older.ok(f"free {pointer}")
    eventually(lambda: uses(CONTEXT), 3, "the release of the freed memory")
    assert younger.do("context") == REFUSED  # two contexts do not fit
    older.close()
    eventually(lambda: uses(0), 3, "the release of the older process's memory")
    eventually(lambda: younger.do("context") == "ok", 3, "room")
    assert uses(CONTEXT)
    younger.close()


def test_memory_of_twenty_processes_older_than_fgpu_is_charged_to_the_byte(
    service: Service, before: Before, scale
) -> None:
    """Some processes have only a context, others have memory too. Half of them allocate more after the start."""
    for _ in range(scale(1, 1, 5)):
        older = [before.program(f"older{number}") for number in range(20)]
        held = 0
        for number, program in enumerate(older):
            program.ok("context")
            if number % 3:
                program.ok(f"alloc {number * 2 * MIB}")
                held += number * 2 * MIB
        install(service)
        for program in older[::2]:
            program.ok(f"alloc {10 * MIB}")
        held += 10 * 10 * MIB
        eventually(lambda: uses(20 * CONTEXT + held), 10, "the charge of all memory")  # noqa: B023
        assert memory()["drift_bytes"] == 0
        assert metrics()["fgpu_bypassing_processes", frozenset({("tenant", NAME), ("how", "older")})] == 20
        assert len(re.findall(rf"^{NAME} .* older$", fgpu("ps").stdout, re.MULTILINE)) == 20
        assert eventually(lambda: events("adopted"), 3, "an event (equal events are reported once a second)")
        for program in older:
            program.close()
        eventually(lambda: uses(0), 10, "the release of all memory")
        (service.policies / "install.yaml").unlink()
        service.detach()


def test_on_bypass_kill_spares_preexisting_processes_and_kills_later_ones(service: Service, before: Before) -> None:
    older = before.program("older")
    older.ok("context")
    install(service)
    assert "onBypass: kill is not applied" in fgpu("explain", f"/{NAME}").stdout
    older.ok(f"alloc {HELD}")
    service.kill_agent()
    service.start_agent()  # the next agent reads which processes are preexisting
    older.ok(f"alloc {100 * MIB}")
    eventually(lambda: uses(CONTEXT + HELD + 100 * MIB), 3, "the charge of all memory")
    assert events("killed") == []
    older.close()
    eventually(
        lambda: "kill is not applied" not in fgpu("explain", f"/{NAME}").stdout, 3, "the exit of the older process"
    )
    eventually(lambda: uses(0), 3, "the release of the older process's memory")
    younger = before.program("younger")
    younger.ok("context")
    younger.send(f"alloc {HELD}")
    eventually(lambda: events("killed"), 5, "the event of the kill")
    younger.close()
