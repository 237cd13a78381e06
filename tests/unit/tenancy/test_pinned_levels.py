"""Tests of pinned levels at a start: a level is released only if nothing can need it any more."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.scheduling.fair_queue import Share
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.gone_tenants import GoneTenants
from fgpu_ebpf.tenancy.manager import Manager
from fgpu_ebpf.tenancy.overrides import Overrides
from fgpu_ebpf.tenancy.pinned_levels import doubts, take_up
from fgpu_ebpf.workloads.cgroups import TargetError, Workloads
from tests.unit.policy_kit import GIB, Gpu, policies
from tests.unit.tenancy.books_kit import Books, PinnedBooks


@pytest.fixture
def host(tmp_path):
    """Return a host with its ledger and files.

    `start(policies, …)` returns the manager of an agent that has just started after another agent. `cgroup(name)` makes
    a cgroup and returns its id.
    """
    root, books, file = tmp_path / "cgroups", Books(), tmp_path / "overrides.json"
    root.mkdir()
    books.orphans = SimpleNamespace(of_level=lambda _: [])
    file.write_text("[]")

    def start(spec="", unknown="", missing=""):
        namer = SimpleNamespace(named=lambda workload: workload, missing=lambda _: missing)
        workloads = Workloads(root, namer)
        enforcer = Enforcer(books, workloads, [Gpu(0, usable_bytes=16 * GIB)], overcommit=False)
        gone = GoneTenants(books)
        manager = Manager(workloads, enforcer, Overrides(file), [Gpu(0, usable_bytes=16 * GIB)], EventLog(), gone)
        manager.policies, manager.policies_unknown = policies(*([spec] if spec else [])), unknown
        take_up(PinnedBooks(books), manager, gone)
        return manager

    def cgroup(name):
        (root / name).mkdir(parents=True)
        return (root / name).stat().st_ino

    return SimpleNamespace(start=start, cgroup=cgroup, books=books, file=file, root=root)


def test_a_full_disk_at_the_end_of_a_container_excludes_no_other_container(host):
    gone = host.cgroup("a")
    manager = host.start(SIX)
    manager.set("/a", {"memory_bytes": GIB})
    (host.root / "a").rmdir()
    host.cgroup("c1")
    folder, away = host.file.parent, host.file.parent.with_name("away")
    overrides = manager.overrides
    overrides._file = away / host.file.name  # no file can be written there yet
    manager.consider_all()
    assert [tenant.path for tenant in manager.enforcer] == ["/c1"]
    assert overrides.get(gone) is None
    away.symlink_to(folder)
    overrides.write_again()
    assert json.loads(host.file.read_text()) == []


SIX = "{selector: {cgroup: ['c*']}, memory: {limit: 6GiB}, compute: {limit: 50%}}"


def test_levels_without_a_policy_are_released(host):
    host.cgroup("c1")
    host.start(SIX)
    assert host.books.limits
    assert not list(host.start().enforcer)
    assert not host.books.limits


@pytest.mark.parametrize("why", ["unknown", "missing", "overrides"])
def test_unknown_policies_names_or_overrides_keep_limit_flags_and_share(host, why):
    one = host.cgroup("c1")
    host.start("{selector: {cgroup: ['c*']}, memory: {limit: 6GiB}, compute: {limit: 50%}, onBypass: kill}")
    before = dict(host.books.limits), dict(host.books.shares)
    if why == "overrides":
        host.file.write_text("")
    manager = host.start(**({} if why == "overrides" else {why: "not known"}))
    assert [(t.cgroup, t.source) for t in manager.enforcer] == [(one, "kept")]
    (tenant,) = manager.enforcer
    assert (dict(host.books.limits), dict(host.books.shares)) == before
    assert (tenant.kill, tenant.shares[0].limit_millionths) == (True, 500_000)
    assert tenant.name in doubts("", manager.enforcer)
    manager.metric_labels = ("team",)
    manager.consider_all()
    assert [(t.source, t.metric_labels) for t in manager.enforcer] == [("kept", {"team": ""})]
    assert manager.unset("/c1")
    assert not host.books.limits


@pytest.mark.parametrize("memory", [{"memory_bytes": 4 * GIB}, {"memory_bytes": None, "memory_millionths": 250_000}])
def test_a_kept_limit_is_not_lost_when_another_value_is_set(host, memory):
    host.cgroup("c1")
    host.start(SIX)
    manager = host.start(unknown="not known")
    with pytest.raises(TargetError, match="give --memory too"):
        manager.set("/c1", {"limit_millionths": 250_000})
    assert [limits for limits, _ in host.books.limits.values()] == [{0: 6 * GIB}]
    manager.set("/c1", memory)
    assert [limits for limits, _ in host.books.limits.values()] == [{0: 4 * GIB}]


def test_kept_limits_are_stored_with_the_next_setting_after_a_full_disk(host, monkeypatch):
    for name in ("c1", "c2"):
        host.cgroup(name)
    host.start(SIX)
    host.file.write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(Overrides, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        manager = host.start()
    assert [t.source for t in manager.enforcer] == ["kept"] * 2
    manager.set("/c2", {"memory_bytes": GIB})
    assert {t.name: t.source for t in host.start().enforcer} == {"c1": "kept", "c2": "set"}


def test_the_empty_cgroup_of_a_run_is_removed_at_a_start_despite_unreadable_overrides(host):
    manager = host.start()
    path = manager.run({"memory_bytes": GIB}, "mine").path
    host.file.write_text("")
    manager = host.start()  # the agent removes empty cgroups of runs, although it cannot read their files
    assert manager.enforcer.at(path) is None
    assert not list(manager.enforcer)
    assert not (host.root / "fgpu" / "mine").exists()


def test_a_level_with_the_limit_of_its_policy_is_not_kept_despite_unreadable_overrides(host):
    host.cgroup("c1")
    host.start(SIX)
    host.file.write_text("")
    assert [t.source for t in host.start(SIX).enforcer] == ["policy"]


def test_a_kept_level_is_decided_once_its_policies_are_known(host):
    host.cgroup("c1")
    host.start(SIX)
    manager = host.start(unknown="not known")
    manager.policies_unknown = ""
    manager.reload(policies(SIX.replace("6GiB", "3GiB")))
    assert [t.source for t in manager.enforcer] == ["policy"]
    assert [limits for limits, _ in host.books.limits.values()] == [{0: 3 * GIB}]


def test_tenants_in_use_keep_their_commitments_at_a_start_and_a_denied_tenant_stays_denied(host):
    idle = [host.cgroup(f"c{n}") for n in range(4)]
    used = [host.cgroup(f"c{n}") for n in (8, 9)]
    manager = host.start(SIX)
    for cgroup in used:
        manager.enforcer.use(cgroup)
    for _ in range(2):
        manager = host.start(SIX)
        assert [host.books.limits[c][0][0] for c in used] == [6 * GIB] * 2
        assert manager.enforcer.commitments.committed(0) == 12 * GIB
    manager.enforcer.use(idle[0])
    assert host.books.limits[idle[0]][0] == {0: 0}
    written = _written(host, lambda: host.start(SIX))
    assert host.books.limits[idle[0]][0] == {0: 0}
    assert [by for cgroup, by in written if cgroup == idle[0]] == [{0: 0}], "the level was open for a moment"


def _written(host, act):
    """Return the cgroup and limits of every level that `act` puts in force."""
    seen, set_limits = [], host.books.set_limits

    def noted(levels, over=None):
        levels = list(levels)
        seen.extend((level.cgroup, dict(level.bytes)) for level in levels)
        set_limits(levels, over)

    host.books.set_limits = noted
    act()
    del host.books.set_limits
    return seen


def test_a_limit_that_could_not_grow_is_unchanged_after_a_start(host):
    used = [host.cgroup(f"c{n}") for n in range(2)]
    manager = host.start(SIX)
    for cgroup in used:
        manager.enforcer.use(cgroup)
    for _ in range(2):
        host.start(SIX.replace("6GiB", "12GiB"))
        assert [host.books.limits[c][0][0] for c in used] == [6 * GIB] * 2


def test_a_limit_by_hand_that_does_not_fit_any_more_is_kept_and_named(host):
    for name in ("c1", "c2"):
        host.cgroup(name)
    manager = host.start()
    manager.enforcer.commitments.overcommit = True
    for name in ("/c1", "/c2"):
        manager.set(name, {"memory_bytes": 9 * GIB})
    manager = host.start()
    assert [limits for limits, _ in host.books.limits.values()] == [{0: 9 * GIB}] * 2
    assert "do not fit" in doubts("", manager.enforcer)
    manager.set("/c1", {"memory_bytes": 8 * GIB})
    assert [limits for limits, _ in host.books.limits.values()] == [{0: 8 * GIB}, {0: 9 * GIB}]


def test_limits_by_hand_inside_a_group_are_in_force_after_a_start_with_or_without_pins(host):
    host.cgroup("c")
    group = "{selector: {cgroup: ['c']}, memory: {limit: 12GiB}}"
    for name in ("c/a", "c/b", "c/d"):
        host.cgroup(name)
    manager = host.start(group)
    for name in ("/c/a", "/c/b", "/c/d"):
        manager.set(name, {"memory_bytes": 6 * GIB})
    assert {t.source for t in host.start(group).enforcer} == {"policy", "set"}
    host.books.limits.clear()  # the pins are lost, the file is not
    assert len(list(host.start(group).enforcer)) == 4


def test_levels_of_removed_cgroups_are_released_even_if_policies_are_unknown(host):
    host.cgroup("c1")
    host.start(SIX)
    (host.root / "c1").rmdir()
    host.start(unknown="not known")
    assert not host.books.limits


def test_a_level_without_a_memory_limit_keeps_no_limit_and_its_share_at_a_start(host):
    host.cgroup("c1")
    host.start("{selector: {cgroup: ['c*']}, compute: {limit: 50%}}")
    host.start(unknown="not known")
    assert [limits for limits, _ in host.books.limits.values()] == [{0: abi.NO_LIMIT}]
    assert [by[0] for by in host.books.shares.values()] == [Share(500_000, 100, 1, 20_000_000)]


def test_a_share_of_a_container_that_ended_without_an_agent_is_dropped_at_the_next_start(host):
    """The device plugin would count the share as taken otherwise."""
    gone, stays = host.cgroup("c"), host.cgroup("d")
    manager = host.start()
    for path in ("/c", "/d"):
        manager.set(path, {"memory_bytes": GIB})
    (host.root / "c").rmdir()
    manager = host.start()
    assert [one.cgroup for one in manager.overrides] == [stays]
    assert gone not in [row["cgroup"] for row in json.loads(host.file.read_text())]
