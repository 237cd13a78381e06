"""Upgrades in place from versions of this repository's history, and back: nothing changes for the tenants.

The older version is built from its commit, with its own shim and its own BPF programs, which the system's BCC compiles.
It runs on the present simulated driver. docs/operations.md has the table of the effects of each change of versions.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.held_kit import LIMIT, STEP, filled
from tests.e2e.layout_kit import Version
from tests.e2e.release_kit import THIS, release
from tests.support import host
from tests.support.commands import fgpu
from tests.support.host import CONTEXT, MIB, REFUSED, RUN_DIR
from tests.support.place import Cgroups
from tests.support.service import Service
from tests.support.tenant import Client, Tenant, answered
from tests.support.wait import eventually, steadily

IS_FULL = os.environ.get("FGPU_TEST_SCALE") == "full"
FIRST = "98d377c"  # it does not charge orphaned memory, and does not answer the shim of a later version
KNOWS_KEPT = "8309c35"  # earlier versions cannot read a file of overrides that has a kept limit
COMMITS = (FIRST, "72d2c3a", KNOWS_KEPT) if IS_FULL else (KNOWS_KEPT,)
SHARED = 20 * MIB
POLICY = """---
apiVersion: fgpu.dev/v1alpha1
kind: GpuPolicy
metadata: {{name: {name}}}
spec:
  selector: {{cgroup: "{group}/{name}"}}
  memory: {{limit: {bytes}B}}
"""
BY_POLICY = dict.fromkeys(("full", "ending", "orphaned", "busy", "pools"), LIMIT) | {
    "sharing": 2 * CONTEXT + 2 * SHARED
}


@dataclass
class Older:
    """A version before this one, and where it runs. `store` is the folder of published shims of both versions."""

    commit: str
    version: Version
    service: Service
    store: Path

    @property
    def is_first(self) -> bool:
        """Return whether it is the oldest of the versions."""
        return self.commit == FIRST

    @property
    def knows_kept(self) -> bool:
        """Return whether it keeps limits that may have been set by hand when their file is unreadable."""
        return self.commit == KNOWS_KEPT

    def fgpu(self, *arguments: str) -> None:
        """Run its command `fgpu`."""
        subprocess.run([*self.version.command, *arguments], env=host.ENVIRONMENT, check=True, timeout=30)

    def change(self, to: Version, damages: bool = False) -> None:
        """End the agent with SIGTERM, and start that of another version.

        Args:
            to: the other version.
            damages: the file of limits that were set by hand is damaged meanwhile.
        """
        self.service.kill_agent(signal.SIGTERM)
        if damages:
            (RUN_DIR / "overrides.json").write_text("{")
        to.start(self.service, self.store)


@pytest.fixture(params=COMMITS)
def older(request: pytest.FixtureRequest, service: Service, unharmed: None, tmp_path: Path) -> Iterator[Older]:
    """Return an older version. No agent runs, nothing is pinned, and the driver is empty."""
    found = Older(request.param, release(request.param), service, tmp_path / "store")
    service.detach()
    yield found
    service.kill_agent(signal.SIGTERM)
    fgpu("detach")  # the pinned maps may be those of the older version
    service.start_agent()


@pytest.fixture
def cgroups(older: Older, tmp_path: Path) -> Iterator[Cgroups]:
    """Return a place for tenants, with the policies of BY_POLICY."""
    place = Cgroups(tmp_path)
    policy, group = older.service.policies / "releases.yaml", place.group.lstrip("/")
    policy.write_text("".join(POLICY.format(group=group, name=name, bytes=n) for name, n in BY_POLICY.items()))
    yield place
    for tenant in place.tenants:
        for pid in set(tenant.pids()) - {tenant.hub.pid}:
            os.kill(pid, signal.SIGKILL)
    place.close()
    policy.unlink()


def tenant_of(cgroups: Cgroups, name: str, store: Path) -> Tenant:
    """Return a tenant whose programs start with the shim of the version that runs then, as with `fgpu run`."""
    tenant = cgroups.named(name)
    tenant.client = partial(tenant.client, before=f"env LD_PRELOAD={store}/current/libfgpu.so")  # type: ignore[method-assign]
    return tenant


def left_behind(tenant: Tenant) -> int:
    """Fill a tenant, and end its program but not the program's child, which keeps the memory.

    Return the child's pid.
    """
    first = filled(tenant).client
    (child,) = first.ok("linger")
    first.kill()
    first.close()
    return child


def assert_stays(orphaned: Tenant) -> None:
    """Check that the memory of left_behind() is neither lost nor freed early."""
    steadily(lambda: orphaned.memory()["used_bytes"] == orphaned.memory()["orphaned_bytes"] == LIMIT, 1.5)


def importer(tenant: Tenant) -> Client:
    """Return a program that has a context and memory of an exporter that has exited."""
    client, exporter = tenant.client(), tenant.client()
    client.ok("device 0")
    _, descriptor = exporter.ok(f"export {SHARED}")
    client.ok(f"import {exporter.inner_pid} {descriptor}")
    exporter.kill()
    exporter.close()
    return client


class Tenants:
    """The tenants of a test, which start under the older version."""

    def __init__(self, cgroups: Cgroups, older: Older) -> None:
        self._older = older
        of = {name: tenant_of(cgroups, name, older.store) for name in (*BY_POLICY, "kept")}
        older.fgpu("set", of["kept"].path, "--memory", f"{LIMIT}B")
        if older.knows_kept:
            older.change(older.version, damages=True)
        else:
            older.fgpu("reload")  # these versions may not have noticed a new cgroup yet
        for tenant in of.values():
            tenant.assert_enforced()
        self.full, self.ending, self.kept = (filled(of[name]) for name in ("full", "ending", "kept"))
        self._fitting = {of["busy"].client(): 0, of["pools"].client(): 1}  # 1: it requests memory of a pool
        for client in self._fitting:
            client.ok("context")
        self.sharing, self.importer = of["sharing"], importer(of["sharing"])
        self.orphaned = of["orphaned"]
        self.child = None if older.is_first else left_behind(self.orphaned)
        self.check()

    def change(self, to: Version, damages: bool = False) -> None:
        """Change to another version while programs send requests.

        Requests that fit are admitted, all others refused.
        """
        for client, pool in self._fitting.items():
            client.send(f"ask {STEP} 0 {pool}")
        self.full.client.send(f"ask {STEP} 0 0")
        self._older.change(to, damages)
        time.sleep(1)  # the agent has entered NVML's figures
        got, refused, other = answered(self.full.client)
        assert refused
        assert (got, other) == (0, 0), "a request that does not fit was admitted"
        for client in self._fitting:
            got, refused, other = answered(client)
            assert got
            assert (refused, other) == (0, 0), "a request that fits was not admitted"

    def check(self) -> None:
        """Check that ledger and driver are equal, and that the limits hold."""
        self.full.check()
        self.kept.check()
        for client in self._fitting:
            assert client.tenant.assert_exact() == CONTEXT
        eventually(lambda: self.sharing.driver() == CONTEXT + SHARED, 5, "the end of the exporter")
        assert self.sharing.assert_exact(5) == CONTEXT + SHARED
        if self.child:
            eventually(lambda: self.orphaned.memory()["orphaned_bytes"] == LIMIT, 5, "memory that outlives its process")

    def check_orphan(self) -> None:
        """Check that orphaned memory stays charged, and that its tenant gets no memory beside it."""
        if self.child:
            assert_stays(self.orphaned)
            new = self.orphaned.client()
            assert new.do("context") == REFUSED
            new.close()

    def end(self) -> None:
        """End all programs that hold memory, and check that no charge remains."""
        if self.child:
            os.kill(self.child, signal.SIGKILL)
        for client in (self.full.client, self.kept.client, self.importer, *self._fitting):
            client.kill()
        for tenant in (self.full.tenant, self.kept.tenant, self.sharing, self.orphaned):
            eventually(lambda tenant=tenant: not tenant.memory()["used_bytes"], 10, f"{tenant.name}: no charge")


@pytest.mark.slow
def test_limits_and_charges_stay_over_an_upgrade_and_back(older: Older, cgroups: Cgroups) -> None:
    older.version.start(older.service, older.store)
    tenants = Tenants(cgroups, older)
    tenants.change(THIS, damages=not older.knows_kept)
    tenants.check()
    tenants.check_orphan()
    assert tenants.kept.tenant.view()["source"] == "kept"
    tenants.ending.client.kill()
    eventually(lambda: not tenants.ending.ledger(), 10, "the release of memory of an exited process")
    if not older.knows_kept:
        fgpu("set", tenants.kept.tenant.path, "--memory", f"{LIMIT}B")
    tenants.change(older.version)
    tenants.check()
    tenants.change(THIS)
    tenants.check()
    tenants.check_orphan()
    tenants.end()


@pytest.mark.slow
@pytest.mark.skipif(not IS_FULL, reason="in the full run: as the test before, with maps of this version")
def test_limits_and_charges_stay_over_a_downgrade_and_back(older: Older, cgroups: Cgroups) -> None:
    """The host had this version first, so this version has created the pinned maps."""
    THIS.start(older.service, older.store)
    full, orphaned = (tenant_of(cgroups, name, older.store) for name in ("full", "orphaned"))
    for tenant in (full, orphaned):
        tenant.assert_enforced()
    held = filled(full)
    child = None if older.is_first else left_behind(orphaned)
    older.change(older.version)
    if older.is_first:  # the first version may refuse requests of a later version's programs that fit
        assert held.client.do(f"alloc {STEP}") == REFUSED
        assert held.tenant.driver() == LIMIT
    else:
        held.check()
        assert_stays(orphaned)
    older.change(THIS)
    held.check()
    held.client.kill()
    if child:
        assert_stays(orphaned)
        os.kill(child, signal.SIGKILL)
    for tenant in (full, orphaned):
        eventually(lambda tenant=tenant: not tenant.memory()["used_bytes"], 10, f"{tenant.name}: no charge")
