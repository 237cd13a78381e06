"""The columns of the table of combinations in docs/faults.md: tenants under all features at once, and the loop
over its rows.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import pytest

from tests.e2e.held_kit import LIMIT, Held, filled
from tests.support.commands import fgpu, metrics
from tests.support.containers.docker import DOCKERD, Docker
from tests.support.host import GPUS, MIB, REFUSED
from tests.support.place import Cgroups
from tests.support.service import Service
from tests.support.tenant import Tenant
from tests.support.wait import eventually

inside = [
    pytest.mark.skipif(GPUS == "1", reason="is run by test_the_file_s_tests_pass_on_two_devices"),
    pytest.mark.skipif(not DOCKERD, reason="no dockerd: ./dev test unpacks it"),
    pytest.mark.timeout(900),
]
HEAD = "apiVersion: fgpu.dev/v1alpha1\nkind: GpuPolicy\n"
POLICIES = {
    "turns": "memory: {limit: 558MiB}, compute: {weight: 100}",
    "two": "memory: {limit: 558MiB}",
    "denied": "memory: {limit: 15GiB}",
    "observe": "mode: observe, memory: {limit: 558MiB}",
    "outer": "memory: {limit: 600MiB}",
    "outer/inner": "memory: {limit: 558MiB}",
    "orphaned": "memory: {limit: 558MiB}",
}
LABELS = 'selector: {cgroup: "docker/*", matchLabels: {tier: small}}, memory: {limit: 558MiB}'


COLUMNS = (
    "turns", "two GPUs", "two levels", "by hand", "by label", "observe", "orphaned memory", "`overcommit: forbid`"
)  # fmt: skip
# The paths of the tenants' cgroups, by feature.
PATHS = {
    "turns": "turns",
    "two GPUs": "two",
    "two levels": "outer/inner",
    "observe": "observe",
    "by hand": "hand",
    "orphaned memory": "orphaned",
    "overcommit: forbid": "denied",
}


class Timed(Held):
    """A tenant with a memory limit and a share of the device's time."""

    def check(self, lost: int = -1) -> None:
        """Check that the tenant keeps its share."""
        super().check(lost)
        eventually(lambda: self.tenant.memory()["compute"], 5, "counters of turns, written twice a second")


class Denied(Held):
    """A tenant whose limit does not fit next to the other limits. It gets no memory."""

    def check(self, lost: int = -1) -> None:
        """Check that neither its running program nor a new program gets memory."""
        assert (self.client.do("device 0"), self.tenant.driver()) == (REFUSED, 0), "a tenant that was denied its limit"
        eventually(
            lambda: re.search(
                "do not fit on device 0|did not fit when the previous agent", self.tenant.view()["denied"]
            ),
            5,
            "the reason of the denial",
        )


class Observed(Held):
    """A tenant in `observe` mode: nothing is refused, and everything is counted."""

    def check(self, lost: int = -1) -> None:
        """Check that memory beyond the tenant's limit is counted."""
        self.client.ok("device 0")
        (at,) = self.client.ok(f"alloc {64 * MIB}")
        eventually(lambda: self.ledger(lost)[0] == self.tenant.driver_by_device()[0] > LIMIT, 10, "the ledger")
        self.client.ok(f"free {at}")
        eventually(lambda: self.ledger(lost) == {0: self.bytes[0]}, 10, "the ledger")


class Orphaned(Held):
    """A tenant with a child that has the descriptors of its exited parent. The memory stays allocated and charged."""

    def check(self, lost: int = -1) -> None:
        """Check that the memory is charged to the tenant of that process, as orphaned."""
        memory = self.tenant.memory
        eventually(lambda: memory()["used_bytes"] == memory()["orphaned_bytes"] == LIMIT, 10, "orphaned memory")
        assert self.client.do("context") == REFUSED, "beside orphaned memory of the whole limit"


KINDS: dict[str, type[Held]] = {"turns": Timed, "observe": Observed}


@contextmanager
def made_places(service: Service, work: Path) -> Iterator[tuple[Cgroups, Docker]]:
    """Yield the places of the tenants; policies match their cgroups and labels."""
    (work / "docker").mkdir()
    group, docker = Cgroups(work), Docker(work / "docker", service.engine)
    texts = [f'selector: {{cgroup: "{group.group.lstrip("/")}/{path}"}}, {rest}' for path, rest in POLICIES.items()]
    files = [f"---\n{HEAD}metadata: {{name: p{n}}}\nspec: {{{text}}}\n" for n, text in enumerate([*texts, LABELS])]
    file = service.policies / "mix.yaml"
    file.write_text("".join(files))
    try:
        eventually(lambda: metrics()["fgpu_policies", frozenset()] == len(files), 5, "the policies")
        yield group, docker
    finally:
        docker.close()
        for pid in (pid for tenant in group.tenants if tenant.name == "orphaned" for pid in tenant.pids()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        group.close()
        file.unlink()


def started(group: Cgroups, docker: Docker) -> dict[str, Tenant]:
    """Start the tenant of each feature. Their programs do not use a device yet."""
    found = {feature: group.named(path) for feature, path in PATHS.items()}
    return found | {"by label": docker.container({"tier": "small"})}


def held(tenants: dict[str, Tenant]) -> dict[str, Held]:
    """Set the limit of the tenant `by hand`, and fill every tenant to its limit."""
    for feature, tenant in tenants.items():
        if feature not in ("by hand", "observe"):
            tenant.assert_enforced()
    fgpu("set", tenants["by hand"].path, "--memory", f"{LIMIT}B", "--device", "0")
    return {feature: column(feature, tenant) for feature, tenant in tenants.items()}


def column(feature: str, tenant: Tenant) -> Held:
    """Fill a tenant to its limit."""
    if feature == "overcommit: forbid":
        return Denied(tenant, tenant.client())
    if feature == "orphaned memory":
        return orphaned(tenant)
    devices = (0, 1) if feature == "two GPUs" else (0,)
    return filled(tenant, devices, KINDS.get(feature, Held))


def orphaned(tenant: Tenant) -> Held:
    """End a program of the tenant, but not its child."""
    first, other = filled(tenant).client, tenant.client()
    first.ok("linger")
    first.kill()
    first.close()
    return Orphaned(tenant, other)


@dataclass
class World:
    """The service, its tenants, and the means to cause a fault."""

    service: Service
    columns: dict[str, Held]
    order: Callable[[str], None]
    scale: Callable[..., int]
    lost: int = -1  # index of the lost device, whose memory is lost too

    def restart(self, how: int = signal.SIGKILL) -> None:
        """End the agent, and start another."""
        self.service.kill_agent(how)
        self.service.start_agent()

    def check(self) -> None:
        """Check every column."""
        for name, column in self.columns.items():
            try:
                column.check(self.lost)
            except AssertionError as error:
                raise AssertionError(f"column {name}") from error


SomeWorld = TypeVar("SomeWorld", bound=World)


@dataclass(frozen=True)
class Fault(Generic[SomeWorld]):
    """A row of the table.

    Attributes:
        cause: causes the fault, with the checks of this fault. Afterwards every column is checked.
        cells: the texts of cells that differ from `=`, by column.
    """

    cause: Callable[[SomeWorld], None]
    cells: Mapping[str, str] = field(default_factory=dict)

    def row(self, name: str) -> str:
        """Return the row for docs/faults.md."""
        assert self.cells.keys() <= {*COLUMNS}, name
        return "| " + " | ".join([name, *(self.cells.get(column, "=") for column in COLUMNS)]) + " |"


def assert_holds(world: SomeWorld, faults: Mapping[str, Fault[SomeWorld]]) -> None:
    """Cause the faults one after another, and check every column.

    State that a fault leaves behind affects the next one.
    """
    world.check()
    for name, fault in faults.items():
        begun = time.monotonic()
        try:
            fault.cause(world)
            world.check()
        except AssertionError as error:
            raise AssertionError(f"row {name}") from error
        print(f"{name}: holds, {time.monotonic() - begun:.0f} s")
