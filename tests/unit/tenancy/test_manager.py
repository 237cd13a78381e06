"""Tests of requests for which the kernel or the disk has no room: nothing changes, and the request can be repeated.

Tests of `fgpu set`: settings that a call omits stay unchanged.
"""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from fgpu_ebpf.policy.share_name import parse
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.gone_tenants import GoneTenants
from fgpu_ebpf.tenancy.manager import Manager
from fgpu_ebpf.tenancy.overrides import Overrides
from fgpu_ebpf.workloads.cgroups import TargetError, Workloads
from tests.unit.policy_kit import GIB, Gpu, policies
from tests.unit.tenancy.books_kit import Books


class SmallBooks(Books):
    """A ledger with room for a given number of levels."""

    room = 100
    orphans = SimpleNamespace(of_level=lambda _: [])

    def set_limits(self, levels, over=None):
        if len({*self.limits, *(level.cgroup for level in levels)}) > self.room:
            raise OSError(errno.E2BIG, "no room")
        super().set_limits(levels, over)


@pytest.fixture
def host(tmp_path):
    root = tmp_path / "cgroups"
    root.mkdir()
    books, devices = SmallBooks(), [Gpu(0)]
    workloads, overrides = Workloads(root), Overrides(tmp_path / "overrides.json")
    enforcer = Enforcer(books, workloads, devices, overcommit=False)
    manager = Manager(workloads, enforcer, overrides, devices, EventLog(), GoneTenants(books))
    return SimpleNamespace(root=root, books=books, enforcer=enforcer, overrides=overrides, manager=manager)


def nothing_is_left(host):
    assert not list(host.enforcer)
    assert not list(host.overrides)
    assert not list((host.root / "fgpu").iterdir())
    assert not host.books.limits


def test_a_run_that_the_kernel_has_no_room_for_leaves_nothing_and_can_be_repeated(host):
    host.books.room = 0
    with pytest.raises(OSError, match="no room"):
        host.manager.run({"memory_bytes": GIB}, "mine")
    nothing_is_left(host)
    host.books.room = 1
    assert host.manager.run({"memory_bytes": GIB}, "mine").path == "/fgpu/mine"


@pytest.mark.parametrize("name", ["../mine", "\ud800"])
def test_a_run_with_an_invalid_name_is_refused(host, name):
    with pytest.raises(TargetError, match="is not a valid name"):
        host.manager.run({"memory_bytes": GIB}, name)
    assert not list(host.root.iterdir())


def test_a_run_that_cannot_be_stored_leaves_nothing(host, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "no room on the disk")

    monkeypatch.setattr(host.overrides, "_write", refuse)
    with pytest.raises(OSError, match="disk"):
        host.manager.run({"memory_bytes": GIB}, "mine")
    nothing_is_left(host)


def test_a_policy_admits_the_tenants_that_fit_and_the_rest_once_the_kernel_has_room(host):
    host.books.room = 5
    for n in range(7):
        (host.root / f"c{n}").mkdir()
    host.manager.reload(policies("{selector: {cgroup: ['c*']}, memory: {limit: 1GiB}}"))
    assert len(host.books.limits) == 5
    assert {tenant.cgroup for tenant in host.enforcer} == set(host.books.limits)
    host.books.room = 7
    host.manager.consider_all()
    assert len(host.enforcer) == len(host.books.limits) == 7


# -- settings that a call of `fgpu set` omits stay unchanged


@pytest.fixture
def container(host):
    (host.root / "job").mkdir()
    return "/job"


def in_force(host, path):
    tenant = host.enforcer.at(path)
    return tenant.limits, tenant.compute and tenant.compute.limit_ratio


@pytest.mark.parametrize("policy", ["", "{selector: {cgroup: ['job']}, memory: {limit: 4GiB, max: 4GiB}}"])
def test_set_replaces_only_the_named_settings_of_a_share_and_unset_restores_the_share(host, container, policy):
    if policy:
        host.manager.reload(policies(policy))
    host.manager.share(container, parse("2gib-50pct"))
    by_share = in_force(host, container)
    assert by_share == ({0: 2 * GIB}, 0.5)
    host.manager.set(container, {"limit_millionths": 250_000})
    assert in_force(host, container) == ({0: 2 * GIB}, 0.25)
    host.manager.set(container, {"memory_bytes": GIB})
    assert in_force(host, container) == ({0: GIB}, 0.25)
    assert Overrides(host.overrides._file).get(host.enforcer.at(container).cgroup).share == "2gib-50pct"
    assert host.manager.unset(container)
    assert in_force(host, container) == by_share
    assert host.enforcer.at(container).source == "share"
    assert host.manager.unset(container)
    assert bool(policy) is (host.enforcer.at(container) is not None)
    assert not list(host.overrides)


@pytest.mark.parametrize("asked", [{"limit_millionths": 500_000}, {"memory_bytes": GIB}])
def test_set_and_share_give_no_memory_on_devices_that_the_policy_excludes(host, container, asked):
    host.manager.reload(policies("{selector: {cgroup: ['job']}, devices: [7], memory: {limit: 2GiB}}"))
    host.manager.set(container, asked)
    assert host.enforcer.at(container).limits == {}
    assert "no device 7" in host.enforcer.at(container).notes[0]
    host.manager.unset(container)
    host.manager.share(container, parse("1gib"))
    assert host.enforcer.at(container).limits == {}
