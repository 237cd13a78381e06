"""The names of managed cgroups, which identify the tenants in metrics, commands and events.

No two tenants have the same name, and a tenant keeps its name. The names are stored in a file under /run, for restarts
of the agent. Without this file, names are assigned in the order of cgroup ids, which is the order in which the kernel
made the cgroups. The module runs in the agent's main loop.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from fgpu_ebpf.linux import atomic_file
from fgpu_ebpf.tenancy.tenant import Tenant
from fgpu_ebpf.workloads.workload import NAME_CHARACTERS

log = logging.getLogger("fgpu.agent")
FILE = "tenants.json"
MOST_BYTES = 16 << 20
_MOST_BEHIND = 25  # characters of a suffix: a dash, an id of 64 bits, and a number if the suffixed name is taken


class TenantNames:
    """The names of tenants, by cgroup id. If a name is taken, the next tenant gets its cgroup id as a suffix."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._paths: dict[int, str] = {}
        self._owners: dict[str, int] = {}
        self._file: Path | None = None

    def keep_in(self, file: Path, cgroup_at: Callable[[str], int | None]) -> None:
        """Read the names of existing cgroups from a file, and write changes to the file from now on."""
        self._file = file
        for cgroup, path, name in _read(file):
            if cgroup_at(path) == cgroup and name not in self._owners:
                self._enter(cgroup, path, name)

    def owner(self, name: str) -> int | None:
        """Return the cgroup id of the tenant with this name, or None."""
        return self._owners.get(name)

    def named(self, tenants: Iterable[Tenant]) -> list[Tenant]:
        """Return the tenants with unique names, oldest cgroup first. The names are not entered."""
        entered: dict[str, int] = {}
        found = []
        for tenant in sorted(tenants, key=lambda tenant: tenant.cgroup):
            name = self._free(tenant, entered)
            entered[name] = tenant.cgroup
            found.append(tenant if name == tenant.name else replace(tenant, name=name))
        return found

    def enter(self, tenants: Iterable[Tenant]) -> None:
        """Enter the names that named() has returned, and write the file."""
        before = dict(self._names)
        for tenant in tenants:
            self._enter(tenant.cgroup, tenant.path, tenant.name)
        if before != self._names:
            self._write()

    def outlive(self, tenant: Tenant) -> Tenant:
        """Rename a tenant whose cgroup is gone, to free the name for a new tenant. Return the renamed tenant."""
        self._remove(tenant.cgroup)
        (renamed,) = self.named([replace(tenant, name=_behind(tenant.name, tenant.cgroup))])
        self._enter(renamed.cgroup, renamed.path, renamed.name)
        return renamed

    def forget(self, cgroups: Collection[int]) -> None:
        """Free the names of cgroups that are no longer tenants."""
        known = [cgroup for cgroup in cgroups if cgroup in self._names]
        for cgroup in known:
            self._remove(cgroup)
        if known:
            self._write()

    def _free(self, tenant: Tenant, entered: dict[str, int]) -> str:
        """Return the entered name of a tenant if derived from the current name, else the first free name."""
        had, longer = self._names.get(tenant.cgroup), _behind(tenant.name, tenant.cgroup)
        if had is not None and had not in entered and (had == tenant.name or had.startswith(longer)):
            return had
        candidates = chain((tenant.name, longer), (f"{longer}.{number}" for number in count(2)))
        return next(name for name in candidates if self._is_free(name, tenant.cgroup, entered))

    def _is_free(self, name: str, cgroup: int, entered: dict[str, int]) -> bool:
        return name not in entered and self._owners.get(name, cgroup) == cgroup

    def _enter(self, cgroup: int, path: str, name: str) -> None:
        self._remove(cgroup)
        self._names[cgroup], self._paths[cgroup], self._owners[name] = name, path, cgroup

    def _remove(self, cgroup: int) -> None:
        self._paths.pop(cgroup, None)
        name = self._names.pop(cgroup, None)
        if name is not None and self._owners.get(name) == cgroup:
            del self._owners[name]

    def _write(self) -> None:
        if self._file is None:
            return
        entries = [[cgroup, self._paths[cgroup], name] for cgroup, name in self._names.items()]
        try:
            atomic_file.write(self._file, json.dumps(entries), 0o600)
        except OSError as error:
            log.warning("names of tenants cannot be stored, and may change when the agent restarts: %s", error)


def _behind(name: str, cgroup: int) -> str:
    return f"{name[: NAME_CHARACTERS - _MOST_BEHIND]}-{cgroup}"


def _read(file: Path) -> list[tuple[int, str, str]]:
    try:
        with file.open("rb") as opened:
            found = json.loads(opened.read(MOST_BYTES))
        return [(int(cgroup), str(path), str(name)) for cgroup, path, name in found]
    except (OSError, ValueError, TypeError, RecursionError):
        return []
