"""The managed cgroups, and which of them lie inside which.

Owns: the tenant of each cgroup and of each path. Never: decides what one gets, or writes to the kernel. Used by the
enforcer, in the agent's main loop. Cannot fail.
"""

from __future__ import annotations

from collections.abc import Iterator

from fgpu_ebpf.tenants import Tenant

Saved = tuple[dict[int, Tenant], dict[str, int], dict[str, int]]


class TenantTree:
    """Tenants by cgroup id and by path."""

    def __init__(self) -> None:
        self._tenants: dict[int, Tenant] = {}
        self._paths: dict[str, int] = {}
        self._inside: dict[str, int] = {}  # how many tenants lie below a path

    def __iter__(self) -> Iterator[Tenant]:
        return iter(list(self._tenants.values()))

    def __len__(self) -> int:
        return len(self._tenants)

    def __contains__(self, cgroup: int) -> bool:
        return cgroup in self._tenants

    def cgroups(self) -> set[int]:
        """Of all tenants."""
        return set(self._tenants)

    def get(self, cgroup: int) -> Tenant | None:
        """The tenant of a cgroup."""
        return self._tenants.get(cgroup)

    def at(self, path: str) -> Tenant | None:
        """The tenant of exactly that cgroup."""
        return self._tenants.get(self._paths.get(path, -1))

    def around(self, tenant: Tenant) -> list[Tenant]:
        """The groups that a tenant lies in, innermost first."""
        return [group for path in above(tenant.path) if (group := self.at(path))]

    def has_inside(self, path: str) -> bool:
        """Some tenant lies below this path."""
        return path in self._inside

    def replace(self, tenant: Tenant) -> None:
        """What is known of a tenant that is there has changed, but for its path."""
        self._tenants[tenant.cgroup] = tenant

    def enter(self, tenant: Tenant) -> Tenant | None:
        """Enter a tenant; returns what its cgroup was before."""
        before = self._tenants.get(tenant.cgroup)
        if before:
            self._count_inside(before.path, -1)
        self._count_inside(tenant.path, 1)
        self._tenants[tenant.cgroup] = tenant
        self._paths[tenant.path] = tenant.cgroup
        return before

    def forget(self, cgroup: int) -> None:
        """This cgroup is no tenant any more."""
        tenant = self._tenants.pop(cgroup, None)
        if tenant:
            self._count_inside(tenant.path, -1)
            if self._paths.get(tenant.path) == cgroup:
                del self._paths[tenant.path]

    def _count_inside(self, path: str, more: int) -> None:
        for around in above(path):
            self._inside[around] = self._inside.get(around, 0) + more
            if not self._inside[around]:
                del self._inside[around]

    def save(self) -> Saved:
        """All of it, for restore()."""
        return dict(self._tenants), dict(self._paths), dict(self._inside)

    def restore(self, saved: Saved) -> None:
        """As it was."""
        self._tenants, self._paths, self._inside = saved


def below(path: str) -> str:
    """What the paths of all cgroups inside this one begin with."""
    return f"{path.rstrip('/')}/"


def above(path: str) -> list[str]:
    """The paths around one, innermost first; the root has none."""
    parts = path.split("/")
    return [around for n in range(len(parts) - 1, 0, -1) if (around := "/".join(parts[:n]) or "/") != path]
