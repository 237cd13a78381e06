"""Tests of shares in pods that have a limit of their own, by the same policy as their containers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from fgpu_ebpf.policy.share_name import parse
from fgpu_ebpf.tenancy.enforcer import Enforcer, RoomError
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.gone_tenants import GoneTenants
from fgpu_ebpf.tenancy.manager import Manager
from fgpu_ebpf.tenancy.overrides import Overrides
from fgpu_ebpf.workloads.cgroup_names import Engine
from fgpu_ebpf.workloads.cgroups import Workloads
from fgpu_ebpf.workloads.workload import Subject
from tests.unit.policy_kit import GIB, Gpu, policies
from tests.unit.tenancy.books_kit import CONTEXT_BYTES, Books

UUID = Gpu(0).uuid_text
OTHER = UUID.replace("1f3a", "2f3a")
POLICY = "{selector: {namespace: [dev]}, memory: {limit: 8GiB, max: 16GiB}}"


class Names:
    """An engine that knows each cgroup below `pods`: `/pods/NAME` is a pod, and cgroups inside it are containers."""

    known = True

    def named(self, workload):
        if not self.known:
            return workload
        parts = workload.path.split("/")[1:]
        subject = Subject(parts[-1], Engine.CRI, is_pod=len(parts) == 2)
        return replace(workload, namespace="dev", subject=subject) if parts[0] == "pods" and parts[1:] else workload

    def missing(self, _):
        return ""


def host_with(tmp_path, *devices):
    root = tmp_path / "cgroups"
    for path in ("pods/one/a", "pods/one/b", "pods/two/a"):
        (root / path).mkdir(parents=True)
    books = Books()
    books.orphans = SimpleNamespace(of_level=lambda _: [])
    workloads = Workloads(root, Names())
    enforcer = Enforcer(books, workloads, devices, overcommit=False)
    overrides = Overrides(tmp_path / "overrides.json")
    manager = Manager(workloads, enforcer, overrides, devices, EventLog(), GoneTenants(books))
    manager.reload(policies(POLICY))
    return SimpleNamespace(root=root, books=books, enforcer=enforcer, manager=manager, overrides=overrides)


@pytest.fixture
def host(tmp_path):
    return host_with(tmp_path, Gpu(0, UUID, usable_bytes=40 * GIB))


def limit(host, path, device=0):
    """Return the limit in the kernel, in GiB."""
    return host.books.limits[host.enforcer.at(path).cgroup][0][device] / GIB


def test_a_pod_has_at_least_the_sum_of_its_containers_shares_up_to_the_policy_s_max(host):
    assert limit(host, "/pods/one") == 8
    host.manager.share("/pods/one/a", parse(f"11gib:{UUID}"))
    assert (limit(host, "/pods/one"), limit(host, "/pods/one/a")) == (11, 11)
    host.manager.share("/pods/one/b", parse(f"3gib:{UUID}"))
    assert (limit(host, "/pods/one"), limit(host, "/pods/one/b")) == (14, 3)
    host.manager.share("/pods/two/a", parse(f"20gib:{UUID}"))
    assert (limit(host, "/pods/two"), limit(host, "/pods/two/a")) == (16, 16)
    host.manager.consider_all()
    assert (limit(host, "/pods/one"), limit(host, "/pods/two")) == (14, 16)


def test_a_pod_with_small_shares_keeps_the_limit_of_its_policy(host):
    host.manager.share("/pods/one/a", parse(f"2gib:{UUID}"))
    assert (limit(host, "/pods/one"), limit(host, "/pods/one/a")) == (8, 2)


def test_the_contexts_of_a_policy_are_added_to_the_sum(host):
    host.manager.reload(policies(POLICY.replace("max", "contexts: 1, max")))
    host.manager.share("/pods/one/a", parse(f"11gib:{UUID}"))
    assert limit(host, "/pods/one") == limit(host, "/pods/one/a") == 11 + -(-CONTEXT_BYTES // (1 << 20)) / 1024


def test_the_limit_of_a_pod_follows_the_end_of_a_container(host):
    """The next container of a pod starts before the agent has noticed the end of the one before."""
    host.manager.share("/pods/one/a", parse(f"11gib:{UUID}"))
    host.manager.share("/pods/one/b", parse(f"3gib:{UUID}"))
    (host.root / "pods/one/a").rmdir()
    host.manager.consider(["/pods/one/a"])
    assert limit(host, "/pods/one") == 8
    (host.root / "pods/one/c").mkdir()
    (host.root / "pods/one/b").rmdir()
    host.manager.share("/pods/one/c", parse(f"12gib:{UUID}"))
    assert limit(host, "/pods/one") == 12
    host.manager.unset("/pods/one/c")
    assert limit(host, "/pods/one") == 8


def test_a_share_that_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    host = host_with(tmp_path, Gpu(0, UUID, usable_bytes=20 * GIB))
    for path in ("/pods/one/a", "/pods/two/a"):
        host.enforcer.use(host.enforcer.at(path).cgroup)
    host.manager.share("/pods/one/a", parse(f"10gib:{UUID}"))
    with pytest.raises(RoomError, match=r"11GiB for .*two do not fit on device 0: 10GiB of 20GiB are committed"):
        host.manager.share("/pods/two/a", parse(f"11gib:{UUID}"))
    assert (limit(host, "/pods/one"), limit(host, "/pods/two"), limit(host, "/pods/two/a")) == (10, 8, 8)
    assert len(list(host.overrides)) == 1
    host.manager.share("/pods/two/a", parse(f"10gib:{UUID}"))
    assert limit(host, "/pods/two") == 10


def test_a_share_is_refused_if_the_limit_of_its_pod_does_not_fit(tmp_path):
    host = host_with(tmp_path, Gpu(0, UUID, usable_bytes=10 * GIB))
    host.manager.share("/pods/one/a", parse(f"2gib:{UUID}"))
    with pytest.raises(RoomError, match=r"8GiB for .*two do not fit on device 0: 8GiB of 10GiB are committed"):
        host.manager.share("/pods/two/a", parse(f"2gib:{UUID}"))


def test_a_share_of_one_device_raises_and_commits_the_pod_s_limit_on_that_device_only(tmp_path):
    host = host_with(tmp_path, *(Gpu(index, uuid, usable_bytes=20 * GIB) for index, uuid in enumerate((UUID, OTHER))))
    host.manager.share("/pods/one/a", parse(f"11gib:{OTHER}"))
    assert (limit(host, "/pods/one", 0), limit(host, "/pods/one", 1)) == (8, 11)
    assert [host.enforcer.commitments.committed(index) for index in (0, 1)] == [0, 11 * GIB]
    with pytest.raises(RoomError, match=r"12GiB for .*two do not fit on device 1: 11GiB of 20GiB"):
        host.manager.share("/pods/two/a", parse(f"12gib:{OTHER}"))
    host.manager.share("/pods/two/a", parse(f"12gib:{UUID}"))
    assert [host.enforcer.commitments.committed(index) for index in (0, 1)] == [12 * GIB, 11 * GIB]


@pytest.mark.parametrize("sizes", [(3, 3, 14), (9, 5, 6)])  # the pods are decided in the order of their inodes
def test_pods_that_are_known_late_have_together_what_the_device_has(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(Names, "known", False)
    host = host_with(tmp_path, Gpu(0, UUID, usable_bytes=20 * GIB))
    for path, size in zip(("/pods/one/a", "/pods/one/b", "/pods/two/a"), sizes, strict=True):
        host.manager.share(path, parse(f"{size}gib:{UUID}"))
    monkeypatch.setattr(Names, "known", True)
    host.manager.consider_all()
    assert [limit(host, path) for path in ("/pods/one", "/pods/two")] == [sizes[0] + sizes[1], sizes[2]]
    assert host.enforcer.commitments.committed(0) == 20 * GIB


def test_a_pod_that_is_known_late_has_at_least_the_shares_that_were_given_in_it(tmp_path, monkeypatch):
    """The engine reports the pod's names after its container has started. The limit of the policy does not fit then."""
    monkeypatch.setattr(Names, "known", False)
    host = host_with(tmp_path, Gpu(0, UUID, usable_bytes=20 * GIB))
    for path, size in (("/pods/one/a", 9), ("/pods/one/b", 5), ("/pods/two/a", 6)):
        host.manager.share(path, parse(f"{size}gib:{UUID}"))
    monkeypatch.setattr(Names, "known", True)
    host.manager.consider_all()
    assert [limit(host, path) for path in ("/pods/one", "/pods/one/a", "/pods/one/b")] == [14, 9, 5]
    assert [limit(host, path) for path in ("/pods/two", "/pods/two/a")] == [6, 6]
    assert host.enforcer.commitments.committed(0) == 20 * GIB
    (host.root / "pods/one/b").rmdir()
    host.manager.consider(["/pods/one/b"])
    assert [limit(host, path) for path in ("/pods/one", "/pods/two")] == [9, 8]


def test_the_refusal_of_a_share_names_the_memory_that_its_policy_adds_for_contexts(tmp_path):
    """The scheduler counts the shares alone, so shares that fill the device to the byte leave no room for contexts."""
    host = host_with(tmp_path, Gpu(0, UUID, usable_bytes=16 * GIB))
    host.manager.reload(policies("{selector: {cgroup: ['pods/*/*']}, memory: {limit: 8GiB, contexts: 1}}"))
    host.manager.share("/pods/one/a", parse(f"8gib:{UUID}"))
    with pytest.raises(
        RoomError, match=r"8.5GiB \(of which 500MiB are for contexts, besides the limit\) for a.* do not fit"
    ):
        host.manager.share("/pods/two/a", parse(f"8gib:{UUID}"))
