"""Tests of the enforcer: which limits are put in force and which do not fit, with a ledger that records its calls."""

from __future__ import annotations

import dataclasses
import errno
import random
import select
from pathlib import Path
from types import SimpleNamespace

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.gatekeeper.ledger_cache import ManagedState, managed_state
from fgpu_ebpf.tenancy.device_commitments import Commitments
from fgpu_ebpf.tenancy.enforcer import Enforcer, RoomError
from fgpu_ebpf.tenancy.tenant import Source, Tenant
from fgpu_ebpf.workloads.cgroups import Workloads
from fgpu_ebpf.workloads.workload import Workload
from tests.unit.tenancy.books_kit import Books

GIB = 1 << 30


@pytest.fixture
def books():
    return Books()


@pytest.fixture
def place(tmp_path, books):
    """Return make(path, GiB, …), which returns a tenant, and an enforcer for a device of 10 GiB."""
    devices = [SimpleNamespace(index=0, usable_bytes=10 * GIB)]
    enforcer = Enforcer(books, Workloads(tmp_path), devices, overcommit=False)

    def make(path, gib=None, source=Source.POLICY, **more):
        folder = tmp_path / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        workload = Workload(folder.stat().st_ino, path, folder.name)
        limit = abi.NO_LIMIT if gib is None else gib * GIB
        return Tenant(workload, folder.name, source, "p", {0: limit}, **more)

    return SimpleNamespace(make=make, enforcer=enforcer, root=tmp_path)


def in_force(books, tenant):
    return books.limits[tenant.cgroup][0][0]


def test_limits_are_in_force_before_their_first_use_and_committed_from_it_on(place, books):
    one = place.make("/one", 8)
    place.enforcer.put([one])
    assert (in_force(books, one), books.decided, place.enforcer.commitments.committed(0)) == (8 * GIB, {}, 0)
    place.enforcer.use(one.cgroup)
    assert (books.decided, place.enforcer.commitments.committed(0)) == ({one.cgroup: True}, 8 * GIB)


def test_requests_wait_for_room_where_the_agent_makes_it_and_a_limit_is_enforced(place, books):
    one, two = place.make("/one", 1), place.make("/two", 1, observe=True)
    place.enforcer.put([one])
    assert books.limits[one.cgroup][1] == 0
    place.enforcer.makes_room = True
    place.enforcer.put([dataclasses.replace(one, kill=True), two])
    flags = {cgroup: flags for cgroup, (_, flags) in books.limits.items()}
    assert flags == {one.cgroup: abi.LimitFlag.KILL | abi.LimitFlag.WAITS, two.cgroup: abi.LimitFlag.OBSERVE}


def test_a_tenant_without_room_gets_nothing_until_there_is_room(place, books):
    one, two = place.make("/one", 8), place.make("/two", 4)
    place.enforcer.put([one, two])
    for tenant in (one, two):
        place.enforcer.use(tenant.cgroup)
    assert in_force(books, two) == 0
    assert "4GiB for two do not fit on device 0: 8GiB of 10GiB" in place.enforcer.denied(two.cgroup)
    assert "tenants; lower a limit, or allow overcommit" in place.enforcer.denied(two.cgroup), "there is one device"
    place.enforcer.release([one.cgroup])
    assert (in_force(books, two), place.enforcer.denied(two.cgroup)) == (4 * GIB, "")


def test_a_process_whose_entry_is_created_while_a_level_appears_is_moved_into_that_level(place, books, monkeypatch):
    pod, leaf = place.make("/pod", 8), place.make("/pod/c", 6)
    place.enforcer.put([pod])
    place.enforcer.put([leaf])  # just before this, a program in the leaf found no limit of the leaf
    books.known, books.so_far = {23: SimpleNamespace(generation=7, levels=())}, 1
    monkeypatch.setattr("fgpu_ebpf.tenancy.moves.procfs.cgroup_path", {23: "/pod/c"}.get)
    for tell in books.over:
        tell()
    assert select.select([place.enforcer.moves], [], [], 0)[0]
    place.enforcer.moves.take_over_late()
    assert books.moved == [(23, 7, (leaf.cgroup, pod.cgroup))]
    assert not select.select([place.enforcer.moves], [], [], 0)[0]


def test_process_entries_are_not_read_again_if_no_entry_was_created_while_a_level_appeared(place, books, monkeypatch):
    books.known, books.so_far = {23: SimpleNamespace(generation=7, levels=())}, 1
    monkeypatch.setattr("fgpu_ebpf.tenancy.moves.procfs.cgroup_path", {}.get)
    place.enforcer.put([place.make("/one", 8)])
    monkeypatch.setattr(books, "processes", None)
    for tell in books.over:
        tell()
    place.enforcer.moves.take_over_late()


def test_a_limit_by_hand_without_room_is_refused_with_the_figures(place, books):
    one, two = place.make("/one", 8, Source.SET), place.make("/two", 4, Source.SET)
    place.enforcer.put([one])
    with pytest.raises(RoomError, match="8GiB of 10GiB are committed"):
        place.enforcer.put([two])
    assert list(place.enforcer) == [one]
    assert list(books.limits) == [one.cgroup]


def test_a_limit_that_the_kernel_refused_is_not_in_force_and_can_be_set_again(place, books):
    one, group, leaf = place.make("/one", 2, Source.SET), place.make("/pod", 8), place.make("/pod/c", 6)
    place.enforcer.put([one])
    before = dict(books.limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(books, "set_limits", lambda *_: (_ for _ in ()).throw(OSError(errno.E2BIG, "no room")))
        with pytest.raises(OSError, match="no room"):
            place.enforcer.put([dataclasses.replace(one, limits={0: 3 * GIB}), group, leaf])
    assert (list(place.enforcer), place.enforcer.commitments.committed(0)) == ([one], 2 * GIB)
    assert [place.enforcer.at(p) for p in ("/one", "/pod", "/pod/c")] == [one, None, None]
    assert (place.enforcer.named("pod"), place.enforcer.groups(), books.limits) == (None, set(), before)
    place.enforcer.put([group, leaf])
    assert in_force(books, leaf) == 6 * GIB
    assert place.enforcer.groups() == {group.cgroup}


def test_a_denied_tenant_gets_its_limit_when_another_limit_is_lowered_far_enough(place, books):
    one, two = place.make("/one", 8), place.make("/two", 4)
    place.enforcer.put([one, two])
    for tenant in (one, two):
        place.enforcer.use(tenant.cgroup)
    place.enforcer.put([dataclasses.replace(one, limits={0: 7 * GIB})])
    assert "7GiB of 10GiB" in place.enforcer.denied(two.cgroup)
    place.enforcer.put([dataclasses.replace(one, limits={0: 6 * GIB})])
    assert (in_force(books, two), place.enforcer.denied(two.cgroup)) == (4 * GIB, "")


def test_contexts_besides_a_limit_that_do_not_fit_are_not_subtracted_from_the_limit_in_force(place, books):
    one, two = place.make("/one", 4), place.make("/two", 4)
    place.enforcer.put([one, two])
    for tenant in (one, two):
        place.enforcer.use(tenant.cgroup)
    more = dataclasses.replace(two, limits={0: 7 * GIB}, outside={0: 3 * GIB})
    place.enforcer.put([more])
    assert (in_force(books, two), books.outside[two.cgroup]) == (4 * GIB, {0: 0})
    place.enforcer.put([dataclasses.replace(one, limits={0: 1 * GIB})])
    assert (in_force(books, two), books.outside[two.cgroup]) == (7 * GIB, {0: 3 * GIB})


def test_a_raised_limit_without_room_is_put_in_force_when_there_is_room(place, books):
    one, two = place.make("/one", 4), place.make("/two", 4)
    place.enforcer.put([one, two])
    for tenant in (one, two):
        place.enforcer.use(tenant.cgroup)
    place.enforcer.put([dataclasses.replace(two, limits={0: 9 * GIB})])
    assert in_force(books, two) == 4 * GIB
    place.enforcer.put([dataclasses.replace(one, limits={0: 1 * GIB})])
    assert in_force(books, two) == 9 * GIB


def test_the_reason_of_a_denial_is_up_to_date(place):
    one, two, three = place.make("/one", 8), place.make("/two", 4), place.make("/three", 1)
    place.enforcer.put([one, two, three])
    for tenant in (one, two, three):
        place.enforcer.use(tenant.cgroup)
    assert "9GiB of 10GiB" in place.enforcer.denied(two.cgroup)


def test_overcommit_admits_every_limit(place, books):
    place.enforcer.commitments.overcommit = True
    tenants = [place.make(f"/t{n}", 8, Source.SET) for n in range(3)]
    place.enforcer.put(tenants)
    assert [in_force(books, tenant) for tenant in tenants] == [8 * GIB] * 3


def test_a_limit_by_hand_on_an_overcommitted_device_can_be_kept_or_lowered_and_not_raised(place, books):
    place.enforcer.commitments.overcommit = True
    one, two, three = (place.make(f"/t{n}", 6, Source.SET) for n in range(3))
    place.enforcer.put([one, two, three])
    place.enforcer.commitments.overcommit = False
    place.enforcer.put([dataclasses.replace(one, limits={0: GIB}), dataclasses.replace(two, kill=True)])
    assert [in_force(books, tenant) for tenant in (one, two, three)] == [GIB, 6 * GIB, 6 * GIB]
    assert books.limits[two.cgroup][1] == abi.LimitFlag.KILL
    assert place.enforcer.commitments.committed(0) == 13 * GIB
    for limit in (2, 7):
        with pytest.raises(RoomError, match="12GiB of 10GiB are committed"):
            place.enforcer.put([dataclasses.replace(one, limits={0: limit * GIB})])


def test_a_limit_beyond_the_device_commits_the_whole_device(place):
    place.enforcer.put([place.make("/one", 100, Source.SET)])
    assert place.enforcer.commitments.committed(0) == 10 * GIB
    with pytest.raises(RoomError):
        place.enforcer.put([place.make("/two", 1, Source.SET)])


def test_only_the_group_s_limit_counts_for_tenants_inside_it(place):
    inner = [place.make(f"/pod/c{n}", 6, Source.SET) for n in range(3)]
    place.enforcer.put([place.make("/pod", 8, Source.SET), *inner])
    assert place.enforcer.commitments.committed(0) == 8 * GIB


def test_a_group_that_appears_after_its_tenants_is_committed_in_their_place(place):
    place.enforcer.put([place.make("/pod/a", 5, Source.SET), place.make("/pod/b", 5, Source.SET)])
    place.enforcer.put([place.make("/pod", 7, Source.SET)])
    assert place.enforcer.commitments.committed(0) == 7 * GIB


def test_the_first_use_inside_a_group_commits_the_group_and_decides_all_levels(place, books):
    group, leaf = place.make("/pod", 8), place.make("/pod/c", 6)
    place.enforcer.put([group, leaf])
    place.enforcer.use(leaf.cgroup)
    assert place.enforcer.commitments.committed(0) == 8 * GIB
    assert books.decided == {group.cgroup: True, leaf.cgroup: True}
    assert place.enforcer.groups() == {group.cgroup}


def test_observed_and_unlimited_tenants_commit_nothing(place, books):
    place.enforcer.put([place.make("/all", 10, Source.SET)])
    others = [place.make("/observed", 5, observe=True), place.make("/free")]
    place.enforcer.put(others)
    for tenant in others:
        place.enforcer.use(tenant.cgroup)
    assert books.limits[others[0].cgroup] == ({0: 5 * GIB}, abi.LimitFlag.OBSERVE)
    assert in_force(books, others[1]) == abi.NO_LIMIT


def test_a_limit_that_is_only_observed_from_now_on_no_longer_counts(place, books):
    one, two = place.make("/one", 8), place.make("/two", 4)
    place.enforcer.put([one, two])
    for tenant in (one, two):
        place.enforcer.use(tenant.cgroup)
    assert in_force(books, two) == 0
    place.enforcer.put([dataclasses.replace(one, observe=True)])
    assert (place.enforcer.commitments.committed(0), in_force(books, one)) == (4 * GIB, 8 * GIB)
    assert (in_force(books, two), place.enforcer.denied(two.cgroup)) == (4 * GIB, "")
    place.enforcer.put([one])
    assert uncommitted(books, one) == {0}, "its next request would not wait for the decision"
    assert "8GiB for one do not fit on device 0" in place.enforcer.use_device(one.cgroup, 0)


def test_a_start_commits_nothing_for_a_limit_that_is_only_observed(place, books):
    one, two = place.make("/one", 8, observe=True), place.make("/two", 4, Source.SET)
    place.enforcer.adopt(dataclasses.replace(one, source=Source.KEPT), {0})
    assert place.enforcer.commitments.committed(0) == 0
    place.enforcer.put([one, two])
    assert (place.enforcer.commitments.committed(0), in_force(books, two)) == (4 * GIB, 4 * GIB)


def test_a_limit_of_0_fits_on_a_full_device_and_commits_nothing(place, books):
    none = place.make("/none", 0)
    place.enforcer.put([place.make("/all", 10, Source.SET)])
    place.enforcer.commitments.held_elsewhere = lambda *_: GIB  # more is taken than the device has
    place.enforcer.adopt(dataclasses.replace(none, source=Source.KEPT), {0})
    place.enforcer.put([none])
    place.enforcer.use(none.cgroup)
    assert (in_force(books, none), place.enforcer.denied(none.cgroup), uncommitted(books, none)) == (0, "", set())
    assert place.enforcer.commitments.committed(0) == 10 * GIB


def test_memory_of_a_removed_cgroup_inside_a_limit_counts_in_this_limit_only(place):
    group, other = place.make("/pod", 6, Source.SET), place.make("/other", 4, Source.SET)
    place.enforcer.commitments.held_elsewhere = lambda _, is_committed: 0 if is_committed(group.cgroup) else GIB
    place.enforcer.put([group])
    place.enforcer.put([other])
    place.enforcer.put([dataclasses.replace(group, limits={0: abi.NO_LIMIT})])
    with pytest.raises(RoomError, match="1GiB of 10GiB are committed"):
        place.enforcer.put([dataclasses.replace(other, limits={0: 10 * GIB})])


def test_a_raised_limit_without_room_leaves_the_earlier_limit_in_force(place, books):
    one, two = place.make("/one", 4), place.make("/two", 4)
    place.enforcer.put([one, two])
    for tenant in (one, two):
        place.enforcer.use(tenant.cgroup)
    place.enforcer.put([dataclasses.replace(two, limits={0: 9 * GIB})])
    assert in_force(books, two) == 4 * GIB
    place.enforcer.put([dataclasses.replace(two, limits={0: 6 * GIB})])
    assert in_force(books, two) == 6 * GIB


def test_unchanged_limits_are_not_written_again(place, books):
    one = place.make("/one", 4)
    place.enforcer.put([one])
    calls = books.calls
    place.enforcer.put([one])
    assert books.calls == calls


def test_decisions_from_before_a_cgroup_was_a_tenant_are_dropped(place, books):
    one = place.make("/one", 4)
    books.decided[one.cgroup] = False  # a program registered there while no policy matched
    place.enforcer.put([one])
    assert one.cgroup not in books.decided
    assert not books.epoch, "no process in the cgroup could send another hello"
    (place.root / "one" / "cgroup.events").write_text("populated 1\n")
    place.enforcer.release([one.cgroup])
    place.enforcer.put([one])
    assert (books.epoch, place.enforcer.commitments.committed(0)) == (1, 0), "a process in it may never use the device"


def test_names_of_tenants_are_unique(place):
    one, two = place.make("/a/x", 1), place.make("/b/x", 1)
    place.enforcer.put([one])
    place.enforcer.put([two])
    assert [t.name for t in place.enforcer] == ["x", f"x-{two.cgroup}"]
    place.enforcer.put([two])
    assert len(place.enforcer) == 2
    assert place.enforcer.named("x").path == "/a/x"


def test_levels_of_a_cgroup_are_ordered_from_the_leaf_outwards(place):
    place.enforcer.put([place.make("/pod", 8), place.make("/pod/c", 6)])
    (pod, leaf) = (place.enforcer.at(p).cgroup for p in ("/pod", "/pod/c"))
    place.make("/pod/c/inside")
    assert place.enforcer.levels("/pod/c/inside") == (leaf, pod)


def test_a_cgroup_too_deep_for_the_kernel_s_programs_is_reported(place):
    programs = Path(__file__).parents[3] / "bpf/maps.bpf.h"
    assert f"#define DEPTH {abi.DEPTH} " in programs.read_text()
    deep = ["/d" * 15, "/d" * 16]
    place.enforcer.put([place.make(path, 2) for path in deep])
    found, lost = (place.enforcer.denied(place.enforcer.at(path).cgroup) for path in deep)
    assert (found, lost) == ("", "the cgroup is more than 15 levels below the root: the BPF programs search no deeper")


def test_the_innermost_of_too_many_levels_are_left_out_and_reported(place, books):
    paths = ["/b", "/b/1", "/b/1/2", "/b/1/2/3", "/b/1/2/3/4"]
    place.enforcer.put([place.make(path, 2) for path in reversed(paths)])
    ids = [place.enforcer.at(path).cgroup for path in paths]
    assert place.enforcer.levels(paths[-1]) == tuple(reversed(ids[:4]))
    assert "at most 4 levels" in place.enforcer.denied(ids[4])
    assert place.enforcer.denied(ids[3]) == ""
    decided = SimpleNamespace(resolved=lambda cgroup: cgroup in ids or None, page_missing=lambda _: False)
    kept = ManagedState(True, ids[3], tuple(reversed(ids[:4])))
    assert managed_state(decided, ids[::-1]) == kept
    decided.resolved = lambda cgroup: cgroup in ids[:4] or None  # the kernel has no decision on the level left out
    assert managed_state(decided, ids[::-1]) == kept


def summed(enforcer, index, but=None):
    """Return the sum of the commitments without the enforcer's shortcuts, and without those of `but` and inside it."""
    total = 0
    for tenant in enforcer:
        granted = enforcer.commitments._granted
        own = granted.get(tenant.cgroup, {}).get(index, 0)
        groups = [g for g in enforcer.around(tenant) if any(limit < 1 << 60 for limit in g.limits.values())]
        within = but and (tenant.path == but.path or tenant.path.startswith(f"{but.path}/"))
        total += 0 if own == abi.NO_LIMIT or groups or within else min(own, 10 * GIB)
    return total


def test_the_committed_sum_equals_the_sum_of_all_commitments_after_any_history(place, scale):
    chance = random.Random(1009)
    paths = [f"/{a}{b}{c}" for a in "ab" for b in ("", "/x", "/y") for c in ("", "/u", "/v") if b or not c]
    for _ in range(scale(101, 1009, 10007)):
        tenant = place.make(chance.choice(paths), chance.choice([None, 1, 2, 3]))
        match chance.randrange(4):
            case 0:
                place.enforcer.release([tenant.cgroup]) if place.enforcer.get(tenant.cgroup) else None
            case 1:
                place.enforcer.use(tenant.cgroup)
            case _:
                place.enforcer.put([dataclasses.replace(tenant, name=tenant.path)])
        assert place.enforcer.commitments.committed(0) == summed(place.enforcer, 0)
        assert place.enforcer.commitments.committed(0, tenant) == summed(place.enforcer, 0, tenant)
        assert place.enforcer.commitments.committed(0) <= 10 * GIB
    place.enforcer.release([tenant.cgroup for tenant in place.enforcer])
    assert not place.enforcer._tree._inside, "an entry of a removed tenant was kept"


def test_a_thousand_tenants_at_once_need_at_most_three_examinations_each(place, monkeypatch):
    looks = []
    promise = Commitments._promise
    monkeypatch.setattr(Commitments, "_promise", lambda *given: looks.append(1) or promise(*given))
    tenants = [dataclasses.replace(place.make(f"/t{n}", 1), limits={0: 1 << 20}) for n in range(1009)]
    place.enforcer.put(tenants)
    for tenant in tenants:
        place.enforcer.use(tenant.cgroup)
    assert place.enforcer.commitments.committed(0) == 1009 << 20
    assert len(looks) <= 3 * len(tenants)


# -- preexisting processes


def test_kill_is_not_in_force_for_a_tenant_with_preexisting_processes(place, books, monkeypatch):
    at = {"/": "", "/one": ""}
    monkeypatch.setattr(place.enforcer.preexisting, "places", lambda: frozenset(at))
    place.enforcer.update_spared()
    one, two = place.make("/one", 1, kill=True), place.make("/two", 1, kill=True)
    inside = place.make("/one/inside", 1, kill=True)
    place.enforcer.put([one, two, inside])

    def killing():
        return [t.path for t in (one, two, inside) if books.limits[t.cgroup][1] & abi.LimitFlag.KILL]

    assert killing() == ["/two", "/one/inside"]
    assert [place.enforcer.spares(t) for t in (one, two, inside)] == [True, False, False]
    at["/two"] = at.pop("/one")  # the process was moved
    place.enforcer.update_spared()
    assert killing() == ["/one", "/one/inside"]
    at.clear()
    place.enforcer.update_spared()
    assert killing() == ["/one", "/two", "/one/inside"]
    calls = books.calls
    place.enforcer.update_spared()
    assert books.calls == calls, "nothing changed"


# -- several devices


@pytest.fixture
def two(tmp_path, books):
    """Return an enforcer for two devices of 10 GiB, and make(path, GiB, …): a tenant with that limit on both."""
    devices = [SimpleNamespace(index=index, usable_bytes=10 * GIB) for index in range(2)]
    enforcer = Enforcer(books, Workloads(tmp_path), devices, overcommit=False)

    def make(path, gib, source=Source.POLICY, **more):
        folder = tmp_path / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        workload = Workload(folder.stat().st_ino, path, folder.name)
        return Tenant(workload, folder.name, source, "p", {0: gib * GIB, 1: gib * GIB}, **more)

    return SimpleNamespace(make=make, enforcer=enforcer, committed=enforcer.commitments.committed)


def uncommitted(books, tenant):
    return books.uncommitted[tenant.cgroup]


def test_a_limit_counts_on_a_device_from_its_first_use_there(two, books):
    one, other = two.make("/one", 8), two.make("/other", 8)
    two.enforcer.put([one, other])
    two.enforcer.use(one.cgroup)
    assert (two.committed(0), two.committed(1), uncommitted(books, one)) == (0, 0, {0, 1})
    assert two.enforcer.use_device(one.cgroup, 1) == ""
    assert (two.committed(0), two.committed(1), uncommitted(books, one)) == (0, 8 * GIB, {0})
    assert "8GiB for other do not fit on device 1: 8GiB of 10GiB" in two.enforcer.use_device(other.cgroup, 1)
    assert (books.limits[other.cgroup][0], uncommitted(books, other)) == ({0: 8 * GIB, 1: 0}, {0})
    assert two.enforcer.use_device(other.cgroup, 0) == ""
    assert "device 1" in two.enforcer.denied(other.cgroup)
    assert "name another device (`--device`, `devices:` in a policy)" in two.enforcer.denied(other.cgroup)
    two.enforcer.release([one.cgroup])
    assert (books.limits[other.cgroup][0], two.enforcer.denied(other.cgroup)) == ({0: 8 * GIB, 1: 8 * GIB}, "")


def test_a_limit_with_named_devices_counts_on_all_of_them_from_the_start(two, books):
    one = two.make("/one", 8, Source.SET, named_devices=True)
    two.enforcer.put([one])
    assert (two.committed(0), two.committed(1), uncommitted(books, one)) == (8 * GIB, 8 * GIB, set())
    with pytest.raises(RoomError, match="do not fit on device 0"):
        two.enforcer.put([two.make("/other", 4, Source.SET, named_devices=True)])


def test_a_limit_by_hand_needs_room_on_its_used_devices_or_on_one_device(two):
    first, other = two.make("/first", 8, Source.SET), two.make("/other", 4, Source.SET)
    two.enforcer.put([first, other])
    for tenant, device in ((first, 0), (other, 1)):
        assert two.enforcer.use_device(tenant.cgroup, device) == ""
    two.enforcer.put([two.make("/third", 6, Source.SET)])  # this limit fits next to the second
    with pytest.raises(RoomError, match="7GiB for fourth do not fit on device 0"):
        two.enforcer.put([two.make("/fourth", 7, Source.SET)])
    two.enforcer.put([two.make("/first", 9, Source.SET)])
    assert (two.committed(0), two.committed(1)) == (9 * GIB, 4 * GIB)


def test_memory_without_a_request_is_a_first_use(two, books):
    one = two.make("/one", 8)
    two.enforcer.put([one])
    books.used[one.cgroup, 1] = GIB
    two.enforcer.use_charged({one.cgroup})
    assert (two.committed(0), two.committed(1), uncommitted(books, one)) == (0, 8 * GIB, {0})


def test_a_later_limit_on_a_device_without_a_limit_counts_from_the_first_use_of_that_device_on(two, books):
    holder, pod = two.make("/holder", 8), dataclasses.replace(two.make("/pod", 4), limits={0: 4 * GIB, 1: abi.NO_LIMIT})
    two.enforcer.adopt(dataclasses.replace(pod, source=Source.KEPT), {0, 1})
    two.enforcer.put([holder, pod])
    assert two.enforcer.use_device(holder.cgroup, 1) == ""
    two.enforcer.use(pod.cgroup)
    for limit, more in ((abi.NO_LIMIT, "labels"), (8 * GIB, "")):
        two.enforcer.put([dataclasses.replace(pod, limits={0: 4 * GIB, 1: limit}, notes=(more,))])
        assert (two.committed(0), two.committed(1)) == (4 * GIB, 8 * GIB)
    assert uncommitted(books, pod) == {1}
    assert "8GiB for pod do not fit on device 1" in two.enforcer.use_device(pod.cgroup, 1)
    two.enforcer.put([dataclasses.replace(pod, limits={0: abi.NO_LIMIT, 1: 2 * GIB})])
    assert (two.committed(0), two.committed(1), books.limits[pod.cgroup][0][0]) == (0, 10 * GIB, abi.NO_LIMIT)


def test_a_later_group_counts_in_place_of_its_tenants(two, books):
    inner = two.make("/g/inner", 8)
    two.enforcer.put([inner])
    group = two.make("/g", 9)
    two.enforcer.put([group])
    assert uncommitted(books, group) == {0, 1}
    assert two.enforcer.use_device(inner.cgroup, 0) == ""
    assert (two.committed(0), uncommitted(books, group), uncommitted(books, inner)) == (9 * GIB, {1}, set())


def test_overcommit_leaves_no_device_of_a_tenant_uncommitted(two, books):
    two.enforcer.commitments.overcommit = True
    tenants = [two.make(f"/t{number}", 8) for number in range(3)]
    two.enforcer.put(tenants)
    assert [uncommitted(books, tenant) for tenant in tenants] == [set()] * 3


@pytest.mark.parametrize("seed", range(3))
def test_only_first_uses_that_fit_get_memory(two, books, scale, seed):
    chance = random.Random(seed)
    for _ in range(scale(101, 1009, 10007)):
        tenant = two.make(chance.choice(["/a", "/a/x", "/a/y", "/b", "/c/z", "/d"]), chance.randrange(1, 10))
        there = two.enforcer.get(tenant.cgroup)
        match chance.randrange(5):
            case 0 if there:
                two.enforcer.release([tenant.cgroup])
            case 1 | 2 if there:
                two.enforcer.use(tenant.cgroup)
                two.enforcer.use_device(tenant.cgroup, chance.randrange(2))
            case _:
                two.enforcer.put([dataclasses.replace(tenant, name=tenant.path)])
        for device in range(2):
            assert two.committed(device) == summed(two.enforcer, device) <= 10 * GIB
            units = [t for t in two.enforcer if not two.enforcer.around(t)]
            usable = [t for t in units if device not in uncommitted(books, t)]
            assert sum(books.limits[t.cgroup][0][device] for t in usable) <= 10 * GIB, "limits exceed the device"


def test_a_start_restores_the_devices_on_which_a_limit_counted(two, books):
    one = two.make("/one", 8)
    two.enforcer.adopt(dataclasses.replace(one, source=Source.KEPT), {1})
    two.enforcer.put([one])
    assert (two.committed(0), two.committed(1), uncommitted(books, one)) == (0, 8 * GIB, {0})


def test_a_tenant_counts_for_itself_when_its_group_is_removed(two, books):
    group, one, other = two.make("/g", 10), two.make("/g/one", 8), two.make("/g/other", 8)
    two.enforcer.put([group, one, other])
    assert [uncommitted(books, tenant) for tenant in (group, one, other)] == [{0, 1}, set(), set()]
    for tenant in (one, other):
        assert two.enforcer.use_device(tenant.cgroup, 0) == ""
    assert (two.committed(0), uncommitted(books, group)) == (10 * GIB, {1})
    books.used[one.cgroup, 0] = books.used[other.cgroup, 0] = GIB
    books.known = {
        n: SimpleNamespace(levels=(t.cgroup,), generation=1, is_parked=False) for n, t in enumerate((one, other))
    }
    two.enforcer.release([group.cgroup])
    assert (two.committed(0), two.committed(1)) == (8 * GIB, 0)
    assert sorted(books.limits[tenant.cgroup][0][0] for tenant in (one, other)) == [0, 8 * GIB]
    assert uncommitted(books, one) == uncommitted(books, other) == {1}


def test_the_levels_of_a_parked_process_are_released_when_it_runs(two, books):
    group, one, other = two.make("/g", 10), two.make("/g/one", 8), two.make("/other", 1)
    two.enforcer.put([group, one, other])
    process = SimpleNamespace(levels=(one.cgroup, group.cgroup), generation=1, is_parked=True)
    books.known = {23: process}
    two.enforcer.release([group.cgroup, one.cgroup, other.cgroup], {one.cgroup})
    assert two.enforcer.leaving == {group.cgroup: False, one.cgroup: True}
    assert (two.enforcer.get(one.cgroup), two.enforcer.get(other.cgroup), books.moved) == (one, None, [])
    two.enforcer.release_left()
    assert len(two.enforcer.leaving) == 2, "it is parked"
    two.enforcer.put([group])
    assert two.enforcer.leaving == {one.cgroup: True}, "it has a limit again"
    process.is_parked = False
    two.enforcer.release_left()
    assert (two.enforcer.leaving, two.enforcer.get(one.cgroup)) == ({}, None)
    assert books.moved == [(23, 1, (group.cgroup,))]


def test_a_process_that_begins_while_its_level_is_removed_is_moved(two, books, monkeypatch):
    group, one = two.make("/g", 10), two.make("/g/one", 8)
    two.enforcer.put([group, one])
    remove = books.remove

    def begin(cgroups):
        remove(cgroups)
        if not books.known:
            books.known, books.so_far = (
                {23: SimpleNamespace(levels=(one.cgroup, group.cgroup), generation=1, is_parked=False)},
                1,
            )

    monkeypatch.setattr(books, "remove", begin)
    two.enforcer.release([one.cgroup])
    assert books.moved == [(23, 1, (group.cgroup,))]


def test_a_limit_of_the_root_cgroup_is_committed_in_place_of_its_tenants(two):
    inner, root = two.make("/inner", 8), two.make("/", 9)
    two.enforcer.put([inner])
    assert two.enforcer.use_device(inner.cgroup, 0) == ""
    two.enforcer.put([root])
    assert (two.committed(0), two.committed(1)) == (9 * GIB, 0)


def test_a_denied_tenant_is_denied_for_the_same_reason_after_a_start(two, books):
    holder, denied = two.make("/holder", 8), two.make("/denied", 4)
    pinned = {0: 0, 1: 4 * GIB}
    two.enforcer.adopt(dataclasses.replace(holder, source=Source.KEPT), {0})
    two.enforcer.adopt(dataclasses.replace(denied, source=Source.KEPT, limits=pinned), {0})
    for tenant in (holder, denied):
        two.enforcer.put([tenant])
    assert "4GiB for denied do not fit on device 0: 8GiB of 10GiB" in two.enforcer.denied(denied.cgroup)
    assert (books.limits[denied.cgroup][0], uncommitted(books, denied)) == (pinned, {1})
    two.enforcer.release([holder.cgroup])
    assert (books.limits[denied.cgroup][0][0], two.enforcer.denied(denied.cgroup)) == (4 * GIB, "")
