"""The tree of the managed cgroups. The module does no I/O and runs in the agent's main loop."""

from __future__ import annotations

from collections.abc import Iterator

from fgpu_ebpf.tenancy.tenant import Tenant

Saved = tuple[dict[int, Tenant], dict[str, int], dict[str, int]]


class TenantTree:
    """The tenants by cgroup id and by path."""

    def __init__(self) -> None:
        self._tenants: dict[int, Tenant] = {}
        self._paths: dict[str, int] = {}
        self._inside: dict[str, int] = {}  # the number of tenants below a path

    def __iter__(self) -> Iterator[Tenant]:
        return iter(list(self._tenants.values()))

    def __len__(self) -> int:
        return len(self._tenants)

    def __contains__(self, cgroup: object) -> bool:
        return cgroup in self._tenants

    def cgroups(self) -> set[int]:
        """Return the cgroup ids of all tenants."""
        return set(self._tenants)

    def get(self, cgroup: int) -> Tenant | None:
        """Return the tenant with this cgroup id, or None."""
        return self._tenants.get(cgroup)

    def at(self, path: str) -> Tenant | None:
        """Return the tenant whose cgroup has exactly this path, or None."""
        return self._tenants.get(self._paths.get(path, -1))

    def around(self, tenant: Tenant) -> list[Tenant]:
        """Return the groups around a tenant, innermost first."""
        return [group for path in above(tenant.path) if (group := self.at(path))]

    def has_inside(self, path: str) -> bool:
        """Return True if there is a tenant below this path."""
        return path in self._inside

    def replace(self, tenant: Tenant) -> None:
        """Replace the record of a tenant, which must have the same path."""
        self._tenants[tenant.cgroup] = tenant

    def enter(self, tenant: Tenant) -> Tenant | None:
        """Enter a tenant, and return the earlier tenant of the same cgroup, or None."""
        before = self._tenants.get(tenant.cgroup)
        if before:
            count_inside(self._inside, before.path, -1)
        count_inside(self._inside, tenant.path, 1)
        self._tenants[tenant.cgroup] = tenant
        self._paths[tenant.path] = tenant.cgroup
        return before

    def forget(self, cgroup: int) -> None:
        """Remove a cgroup that is no longer a tenant."""
        tenant = self._tenants.pop(cgroup, None)
        if tenant:
            count_inside(self._inside, tenant.path, -1)
            if self._paths.get(tenant.path) == cgroup:
                del self._paths[tenant.path]

    def save(self) -> Saved:
        """Return the whole state, for restore()."""
        return dict(self._tenants), dict(self._paths), dict(self._inside)

    def restore(self, saved: Saved) -> None:
        """Restore the state that save() returned."""
        self._tenants, self._paths, self._inside = saved


def count_inside(inside: dict[str, int], path: str, more: int) -> None:
    """Add `more` to the number of cgroups inside each cgroup around a path, and remove a number that becomes 0."""
    for around in above(path):
        inside[around] = inside.get(around, 0) + more
        if not inside[around]:
            del inside[around]


def below(path: str) -> str:
    """Return the prefix of the paths of all cgroups inside the cgroup at this path."""
    return f"{path.rstrip('/')}/"


def above(path: str) -> list[str]:
    """Return the paths of the cgroups around a cgroup, innermost first. The result for the root is empty."""
    parts = path.split("/")
    return [around for n in range(len(parts) - 1, 0, -1) if (around := "/".join(parts[:n]) or "/") != path]
