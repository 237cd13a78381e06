"""A program ran without a limit in a cgroup that is empty now and gets a policy. The next program there is limited."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.commands import ask, metrics
from tests.support.host import BUILD, ENVIRONMENT, GIB, REFUSED, SHIM, cgroup_root
from tests.support.service import Service
from tests.support.sim_driver import driver_books
from tests.support.wait import eventually, remove_cgroup

LIMIT = 2 * GIB
POLICY = """
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: late}}
spec:
  selector: {{cgroup: ["{cgroup}"]}}
  memory: {{limit: 2GiB}}
"""


def run(cgroup: Path, *commands: str) -> list[str]:
    """Run one program in that cgroup, from its first call to its exit. Return its answer to each command."""
    enter = ["sh", "-c", f"echo $$ >{cgroup}/cgroup.procs && exec {BUILD}/e2e/client"]
    done = subprocess.run(
        enter, input="".join(f"{command}\n" for command in commands), env={**ENVIRONMENT, "LD_PRELOAD": str(SHIM)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    ready, *said = done.stdout.splitlines()
    assert ready.startswith("ready "), done
    return said


@pytest.fixture
def known(unharmed: None) -> Iterator[Path]:
    """Return a cgroup without processes, two levels below the root. The kernel has recorded that it has no limit."""
    outer = cgroup_root() / f"fgpu-e2e-{os.getpid()}-before"
    inner = outer / "inner"
    eventually(lambda: not driver_books(), 20, "no memory of an earlier test")
    inner.mkdir(parents=True)
    try:
        (said,) = run(inner, f"alloc {8 * GIB}")
        assert said.startswith("ok "), f"the cgroup has a limit: {said}"
        eventually(lambda: not driver_books(), 20, "an empty driver")
        assert not (inner / "cgroup.procs").read_text()
        yield inner
    finally:
        remove_cgroup(inner)
        remove_cgroup(outer)


@contextlib.contextmanager
def here(service: Service) -> Iterator[None]:
    """Keep the agent running."""
    yield


@contextlib.contextmanager
def stopped(service: Service) -> Iterator[None]:
    """Stop the agent until the end of the block."""
    assert service.agent
    service.agent.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        service.agent.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def killed(service: Service) -> Iterator[None]:
    """Kill the agent, and start it again at the end of the block."""
    service.kill_agent()
    try:
        yield
    finally:
        service.start_agent()


def is_in_force(cgroup: Path) -> bool:
    """Return whether the cgroup is a tenant with the limit LIMIT, and the kernel enforces this limit."""
    path = f"/{cgroup.relative_to(cgroup_root())}"
    found = [tenant for tenant in ask(verb="snapshot")["tenants"] if tenant["path"] == path]
    if not found or found[0]["devices"][0]["limit_bytes"] != LIMIT:
        return False
    labels = frozenset({("tenant", found[0]["tenant"]), ("mode", "kernel")})
    return metrics().get(("fgpu_tenant_enforcement", labels)) == 1


@pytest.mark.parametrize("level", ["itself", "above"])
@pytest.mark.parametrize("agent", [here, stopped, killed])
def test_the_next_program_of_a_formerly_unmanaged_cgroup_is_limited_from_the_first_byte(
    service: Service, known: Path, agent: Callable[[Service], AbstractContextManager[None]], level: str
) -> None:
    cgroup = known if level == "itself" else known.parent
    policy = service.policies / "late.yaml"
    policy.write_text(POLICY.format(cgroup=cgroup.relative_to(cgroup_root())))
    try:
        eventually(lambda: is_in_force(cgroup), 5, "the policy in force")
        with agent(service):
            assert run(known, f"alloc {8 * GIB}", f"alloc {3 * GIB}") == [REFUSED, REFUSED]
        free, total = (int(word) for word in run(known, "info")[0].split()[1:])
        assert free < total == LIMIT
    finally:
        policy.unlink()
        eventually(lambda: not is_in_force(cgroup), 5, "no policy in force")
