"""Slots for levels: how many a workload may have, on hosts with typical trees, and how many are reserved for others."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from fgpu_ebpf.ledger.owner_bounds import Bounds
from fgpu_ebpf.tenancy.level_capacity import FEW, PLACES, LevelCapacity
from tests.unit.root_kit import needs_root

as_root = needs_root("only folders that belong to root count as cgroups of the host")


def container(n: int) -> str:
    return f"{n:064x}"


def pod(n: int) -> str:
    return f"kubepods-burstable-pod{n:08x}_1234_1234_1234_123456789abc.slice"


@dataclass
class Host:
    """Cgroups in a folder, and the levels that have a slot."""

    root: Path
    bounds: Bounds = field(default_factory=Bounds)
    others: int = 0  # pages of removed tenants

    def __post_init__(self) -> None:
        self.placed: dict[int, str] = {}
        self.places = LevelCapacity(self.root, self.bounds, None, lambda: self.others + len(self.placed))

    def tenant(self, path: str) -> SimpleNamespace:
        folder = Path(f"{self.root}{path}")
        folder.mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(cgroup=folder.stat().st_ino, path=path)

    def take(self, *paths: str) -> dict[str, str]:
        """Give these paths slots. Return the reason for each path that found none."""
        tenants = [self.tenant(path) for path in paths]
        fit, shortages = self.places.divide(tenants)  # type: ignore[arg-type]
        for tenant in fit:
            self.places.enter(tenant.cgroup, tenant.path)
            self.placed[tenant.cgroup] = tenant.path
        return {tenant.path: shortages[tenant.cgroup] for tenant in tenants if tenant.cgroup in shortages}

    def leave(self, path: str) -> None:
        cgroup = self.tenant(path).cgroup
        self.places.leave(cgroup)
        del self.placed[cgroup]


@pytest.fixture
def host(tmp_path: Path) -> Callable[..., Host]:
    return lambda **more: Host(tmp_path, **more)


NODE = f"/system.slice/docker-{container(1)}.scope"
USER = "/user.slice/user-1000.slice/user@1000.service/user.slice"


@pytest.mark.parametrize(
    "paths",
    [
        [
            f"{NODE}/kubelet.slice/kubelet-kubepods.slice/{pod(n)}{inside}"
            for n in range(110)
            for inside in ("", *(f"/cri-containerd-{container(100 * n + k)}.scope" for k in range(3)))
        ],
        [f"{NODE}/docker/{container(n)}" for n in range(200)],
        [f"{USER}/libpod-{container(n)}.scope" for n in range(200)],
        [f"/system.slice/jupyter-user{n}.service" for n in range(200)],
    ],
    ids=["kind", "docker-in-docker", "rootless-podman", "jupyterhub"],
)
def test_the_default_bounds_are_sufficient_for_typical_hosts(host, paths):
    assert host(others=PLACES // 2 - len(paths)).take(*paths) == {}


@as_root
def test_users_of_jupyterhub_are_separate_workloads(host):
    whole = host(bounds=Bounds(levels=1))
    assert whole.take("/system.slice", *(f"/system.slice/jupyter-user{n}.service" for n in range(200))) == {}


@as_root
def test_a_level_beyond_the_bound_is_refused_with_owner_bound_and_key(host):
    whole = host(bounds=Bounds(levels=3))
    said = whole.take(*(f"{NODE}/docker/{container(n)}" for n in range(5)))
    assert len(said) == 2
    words = f"{NODE} (container) has 3 of 3 levels that one workload may have (bounds.levels in agent.yaml)"
    assert set(said.values()) == {f"no room for the limit: {words}"}
    whole.leave(f"{NODE}/docker/{container(0)}")
    assert len(whole.take(*said)) == 1


@as_root
def test_workloads_with_few_levels_find_a_slot_beside_workloads_with_many(host):
    whole = host(others=PLACES // 2 - FEW)
    greedy = [f"{NODE}/docker/{container(n)}" for n in range(FEW + 5)]
    said = whole.take(*greedy)
    assert list(said) == greedy[FEW:]
    assert all(f"fewer than {FEW} levels; {NODE} (container) has {FEW}" in text for text in said.values())
    modest = f"/system.slice/docker-{container(2)}.scope"
    assert whole.take(modest) == {}
    whole.others = PLACES
    assert "all 4096 levels" in whole.take("/system.slice/other.service")["/system.slice/other.service"]


def test_counted_levels_of_each_owner_equal_its_existing_levels_after_any_history(host, scale):
    """Levels appear and disappear inside and around one another. An owner's count is the number of its levels."""
    whole, chance = host(bounds=Bounds(levels=7)), random.Random(1009)
    paths = [f"/{a}{b}{c}" for a in ("x.slice", "y") for b in ("", "/m", "/n.scope") for c in ("", "/u", "/v")]
    for _ in range(scale(101, 1009, 10007)):
        path = chance.choice(paths)
        if path in whole.placed.values() and chance.randrange(2):
            whole.leave(path)
        else:
            whole.take(path)
        owners = [whole.places.owner(path).cgroup for path in whole.placed.values()]
        assert {c: n for c, n in whole.places._levels.items() if n} == {c: owners.count(c) for c in set(owners)}
