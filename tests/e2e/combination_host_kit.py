"""The host of tests/e2e/test_combinations_anew.py: tenants with all features at once, which can be stopped and started
again, and a build of a later version of fgpu.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.e2e.combination_kit import PATHS, Denied, Observed, Orphaned, World, column
from tests.e2e.held_kit import LIMIT, Held
from tests.e2e.layout_kit import Version, version
from tests.support.commands import ask
from tests.support.containers.docker import Docker
from tests.support.host import REFUSED, SHIM
from tests.support.place import Cgroups
from tests.support.tenant import Tenant
from tests.support.wait import eventually

NEWER = "9.9.9"


@dataclass(kw_only=True)
class Host(World):
    """A host with everything that the faults of test_combinations_anew.py need. `work` is a folder for its files."""

    group: Cgroups
    docker: Docker
    work: Path
    versions: tuple[Version, Version]

    @property
    def store(self) -> Path:
        """The folder of published shims."""
        return self.work / "store"

    def held(self) -> dict[str, Held]:
        """Return the columns whose running program is at an enforced limit."""
        special = (Denied, Observed, Orphaned)
        return {name: one for name, one in self.columns.items() if not isinstance(one, special)}

    def check_programs(self) -> None:
        """Check the columns of held(), except their ledger, because only a working agent can show the ledger."""
        for one in self.held().values():
            for device, bytes_ in one.bytes.items():
                one._check(device, bytes_)
            new = one.tenant.client()
            assert new.do("context") == REFUSED
            new.close()

    def end_gatekeeper(self) -> None:
        """Stop the gatekeeper as a service manager does."""
        pids = self.service.gatekeepers()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        eventually(lambda: not pids & self.service.gatekeepers(), 10, "the gatekeeper's end")

    @contextmanager
    def preloading(self, shim: Path) -> Iterator[None]:
        """Start programs in the cgroups with this shim, as `fgpu run` does. A container keeps the shim of its start."""
        tenants = [one.tenant for name, one in self.columns.items() if name != "by label"]
        for tenant in tenants:
            tenant.client = partial(tenant.client, before=f"env LD_PRELOAD={shim}")
        try:
            yield
        finally:
            for tenant in tenants:
                del tenant.__dict__["client"]

    def programs_anew(self, *features: str) -> None:
        """Kill the programs of these columns, and fill each tenant with another program."""
        for feature in features:
            tenant = self.columns[feature].tenant
            self.columns[feature].client.kill()
            self.columns[feature].client.close()
            if feature == "orphaned memory":
                continue  # the memory of its exited program stays charged
            eventually(lambda tenant=tenant: not tenant.driver(), 10, f"{feature}: the driver's free of the memory")
            eventually(lambda feature=feature: not self.columns[feature].ledger(), 10, f"{feature}: an empty ledger")
        for feature in features:
            tenant = self.columns[feature].tenant
            if feature == "orphaned memory":
                self.columns[feature] = Orphaned(tenant, tenant.client())
            else:
                self.columns[feature] = column(feature, tenant)

    def end_tenants(self) -> None:
        """End every tenant; its cgroup is removed."""
        for tenant in [one.tenant for one in self.columns.values()]:
            for pid in tenant.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            tenant.end()
            tenant.place.tenants.remove(tenant)
            shutil.rmtree(tenant.folder)
        self.columns["two levels"].tenant.cgroup.parent.rmdir()

    def start_tenants(self) -> dict[str, Tenant]:
        """Start tenants of the same names, in other cgroups."""
        name = self.columns["by label"].tenant.name
        return {feature: self.group.named(path) for feature, path in PATHS.items()} | {
            "by label": self.docker.named(name)
        }


def is_tenant(tenant: Tenant) -> bool:
    return any(view["path"] == tenant.path for view in ask(verb="snapshot")["tenants"])


def assert_unlimited_by_hand(tenant: Tenant) -> None:
    """Check that a program exceeds the limit that `fgpu set` gave to the tenant's previous cgroup."""
    client = tenant.client()
    client.ok("device 0")
    client.ok(f"alloc {LIMIT}")
    assert not is_tenant(tenant)
    client.kill()
    client.close()
    eventually(lambda: not tenant.driver(), 10, "the driver's free of the program's memory")


def newer_build(work: Path) -> Version:
    """Build this tree's fgpu as a later version: other version number, BPF programs and shim; same layout."""
    newer = version(work, 0)
    site = work / "site/fgpu_ebpf"
    (site / "__init__.py").write_text(f'__version__ = "{NEWER}"\n')
    with open(site / "bpf/fgpu.bpf.c", "a", encoding="utf-8") as source:
        source.write(f"/* {NEWER} */\n")
    newer.shim = work / "libfgpu.so"
    newer.shim.write_bytes(SHIM.read_bytes() + NEWER.encode())
    return newer
