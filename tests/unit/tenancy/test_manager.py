"""Tests of requests for which the kernel or the disk has no room: nothing changes, and the request can be repeated.

Tests of `fgpu set`: settings that a call omits stay unchanged.
"""

from __future__ import annotations

import dataclasses
import errno
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fgpu_ebpf.api import control_server
from fgpu_ebpf.control_client import RequestError
from fgpu_ebpf.driver.bypass_reason import Reason, Reasons
from fgpu_ebpf.ledger.owner_bounds import Bounds
from fgpu_ebpf.ledger.resolutions import Resolution
from fgpu_ebpf.policy.rules import Priority
from fgpu_ebpf.policy.share_name import parse
from fgpu_ebpf.tenancy import explain
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


@pytest.mark.parametrize("is_earlier", [False, True], ids=["this agent", "an earlier agent"])
@pytest.mark.parametrize("place", ["c", "c/inside"])
def test_programs_without_a_limit_are_refused_if_a_new_limit_finds_no_room(host, place, is_earlier):
    (host.root / "c/inside").mkdir(parents=True)
    (host.root / "other").mkdir()
    cgroup, inside, other = (host.manager.workloads.cgroup(path) for path in ("/c", f"/{place}", "/other"))
    for decided in (inside, other):
        host.enforcer.answered.unmanaged(decided, decided)
    if is_earlier:
        host.enforcer.answered.forget_earlier()
    host.enforcer.places.bounds, epoch = Bounds(levels=0), host.books.epoch
    for _ in range(2):
        host.manager.reload(policies("{selector: {cgroup: ['c']}, memory: {limit: 1GiB}}"))
        assert host.books.resolution(cgroup) is Resolution.REFUSED
        assert host.books.resolved(inside) is None
        assert host.books.resolved(other) is (None if is_earlier else False)
        assert host.books.epoch == epoch + 1  # the shims register again
    host.enforcer.places.bounds = Bounds()
    host.manager.consider_all()
    assert (host.books.resolution(cgroup), {*host.books.limits}) == (None, {cgroup})


def test_a_cgroup_without_programs_takes_no_decision_if_its_limit_finds_no_room(host):
    (host.root / "c").mkdir()
    host.enforcer.places.bounds = Bounds(levels=0)
    host.manager.reload(policies("{selector: {cgroup: ['c']}, memory: {limit: 1GiB}}"))
    assert (host.books.decided, host.books.epoch) == ({}, 0)


def test_the_cgroups_inside_a_cgroup_without_room_are_searched_once(host, monkeypatch):
    """A tenant may have thousands of cgroups, and a scan of the host would read all of them at each step."""
    (host.root / "c/inside/more").mkdir(parents=True)
    host.enforcer.places.bounds, walked, walk = Bounds(levels=0), [], host.manager.workloads.walk
    host.manager.policies = policies("{selector: {cgroup: ['c']}, memory: {limit: 1GiB}}")
    monkeypatch.setattr(host.manager.workloads, "walk", lambda top="": walked.append(top) or walk(top))
    for _ in range(3):
        host.manager.consider(["/c"])
    assert walked == ["/c"]
    cgroup = host.manager.workloads.cgroup("/c/inside/more")
    host.enforcer.answered.unmanaged(cgroup, cgroup)
    host.manager.consider(["/c"])
    assert host.books.resolution(host.manager.workloads.cgroup("/c")) is Resolution.REFUSED


# -- settings that a call of `fgpu set` omits stay unchanged


@pytest.fixture
def container(host):
    (host.root / "job").mkdir()
    return "/job"


UUIDS = [f"GPU-00000000-0000-4000-8000-00000000000{n}" for n in range(2)]


@pytest.fixture
def two_devices(host, container):
    """Return a host with two devices, and a container on this host."""
    devices = [Gpu(n, uuid) for n, uuid in enumerate(UUIDS)]
    host.enforcer = Enforcer(host.books, host.manager.workloads, devices, overcommit=False)
    gone = GoneTenants(host.books)
    host.manager = Manager(host.manager.workloads, host.enforcer, host.overrides, devices, EventLog(), gone)
    return host, container


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


@pytest.mark.parametrize(("share", "devices"), [("2gib", {0, 1}), (f"2gib:{UUIDS[0]}", {0})])
def test_unset_restores_the_devices_of_a_share(two_devices, share, devices):
    host, path = two_devices
    host.manager.share(path, parse(share))
    assert host.enforcer.at(path).limits.keys() == devices
    host.manager.set(path, {"memory_bytes": GIB, "devices": (UUIDS[1],)})
    assert host.enforcer.at(path).limits == {1: GIB}
    stored = Overrides(host.overrides._file).get(host.enforcer.at(path).cgroup)
    assert stored.share_names == [parse(share).text], "a restarted container could not request its share"
    assert host.manager.unset(path)
    assert host.enforcer.at(path).limits.keys() == devices
    host.manager.share(path, parse(share))


@pytest.mark.parametrize("asked", [{"limit_millionths": 500_000}, {"memory_bytes": GIB}])
def test_set_and_share_give_no_memory_on_devices_that_the_policy_excludes(host, container, asked):
    host.manager.reload(policies("{selector: {cgroup: ['job']}, devices: [7], memory: {limit: 2GiB}}"))
    host.manager.set(container, asked)
    assert host.enforcer.at(container).limits == {}
    assert "no device 7" in host.enforcer.at(container).notes[0]
    host.manager.unset(container)
    host.manager.share(container, parse("1gib"))
    assert host.enforcer.at(container).limits == {}


def test_every_tenant_has_the_host_s_labels_beside_the_labels_of_its_policy(host, container):
    labels = {"team": "vision", "tier": "batch"}
    namer = SimpleNamespace(named=lambda workload: dataclasses.replace(workload, labels=labels), missing=lambda _: "")
    host.manager.workloads = Workloads(host.root, namer)
    host.manager.metric_labels = ("team", "site")
    host.manager.set(container, {"memory_bytes": GIB})
    assert host.enforcer.at(container).metric_labels == {"team": "vision", "site": ""}
    host.manager.reload(policies("{selector: {cgroup: job}, memory: {limit: 1GiB}, metricLabels: [tier, team]}"))
    assert host.enforcer.at(container).metric_labels == {"team": "vision", "site": "", "tier": "batch"}
    host.manager.unset(container)
    assert host.enforcer.at(container).metric_labels == {"team": "vision", "site": "", "tier": "batch"}


# -- priorities by the name of a class


CLASSES = {"batch": Priority.LOW, "interactive": Priority.HIGH}
POLICY = "{selector: {cgroup: ['job']}, memory: {limit: 2GiB}, compute: {weight: 50}}"


def asked(**request):
    return control_server._limits(request, CLASSES)


def nothing():
    """Return a ledger without processes."""
    return SimpleNamespace(
        usage=lambda *_: [], times=SimpleNamespace(turns=dict), counters=dict, processes=dict,
        opens=SimpleNamespace(of=lambda _: SimpleNamespace(denied=0)),
    )  # fmt: skip


def explained(host, path):
    """Return the priority, what it comes from, and the line of `fgpu explain` about compute time."""
    found = explain.explain(path, host.manager, nothing())
    (time,) = found["levels"][0]["compute"]
    (line,) = (line for line in found["lines"] if "priority" in line)
    return time["priority"], time["priority_by"], line.strip().partition(": had")[0]


def test_explain_names_the_class_from_which_the_priority_comes(host, container):
    host.manager.classes = CLASSES
    host.manager.reload(policies(POLICY))
    assert explained(host, container) == ("normal", "", "gpu 0: time weight 50, normal priority")
    host.manager.set(container, asked(memory="1GiB", weight=25, priority_class="batch"))
    line = "gpu 0: time weight 25, low priority (priority class: batch)"
    assert explained(host, container) == ("low", "priority class: batch", line)
    kept = Overrides(host.overrides._file).get(host.enforcer.at(container).cgroup)
    assert (kept.priority, kept.priority_class) == ("low", "batch")
    host.manager.set(container, asked(priority="high"))
    assert explained(host, container) == ("high", "", "gpu 0: time weight 25, high priority")


def test_explain_names_the_label_from_which_the_priority_comes(host, container, monkeypatch):
    labels = {"fgpu.dev/priority": "batch"}
    monkeypatch.setattr(host.manager.workloads, "identify", lambda path: labelled(Workloads(host.root), path, labels))
    host.manager.classes = CLASSES
    host.manager.reload(policies(POLICY))
    line = "gpu 0: time weight 50, low priority (fgpu.dev/priority: batch)"
    assert explained(host, container) == ("low", "fgpu.dev/priority: batch", line)


def test_explain_says_that_a_reason_is_not_known_yet_and_does_not_wait_for_it(host, container):
    host.manager.reload(policies(POLICY))
    process, queued = SimpleNamespace(levels=(host.enforcer.at(container).cgroup,), flags=0, generation=3), []
    books = nothing()
    books.processes = lambda: {7: process}
    reasons = Reasons(lambda pid, then: queued.append(then) or True)

    def stronger():
        return explain.explain(container, host.manager, books, reasons=reasons)["stronger"]

    assert "without the shim: pid 7 (the reason is not known yet): these" in stronger()[0]
    assert len(stronger()) == 1, "the words of a reason that is not known"
    queued[0](Reason.OTHER_LOADER, "'/opt/ld.so'")
    assert "without the shim: pid 7 (other_loader: '/opt/ld.so'): these" in stronger()[0]
    assert stronger()[1] == f"other_loader: {Reason.OTHER_LOADER.words}"


def labelled(workloads, path, labels):
    found = workloads.identify(path)
    return found and replace(found, labels=labels)


def test_root_can_raise_the_priority_by_a_class_and_an_unknown_class_has_no_effect(host, container):
    host.manager.reload(policies(POLICY))
    host.manager.set(container, asked(weight=25, priority_class="interactive"))
    assert host.enforcer.at(container).compute.priority == "high"
    host.manager.set(container, asked(weight=25, priority_class="other"))
    assert host.enforcer.at(container).compute.priority == "normal"
    assert "priority_class" not in host.overrides._file.read_text()  # an older agent can read the file


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"priority_class": "other"}, "no limit is given"),
        ({"priority_class": "batch", "priority": "high"}, "both given"),
        ({"priority_class": ["batch"], "weight": 25}, "priority_class is missing"),
    ],
)
def test_a_wrong_request_for_a_class_is_refused(request_, error):
    with pytest.raises(RequestError, match=error):
        asked(**request_)
