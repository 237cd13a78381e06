"""Tests of budgets of events: which workloads get one, and which events were lost."""

from __future__ import annotations

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.ledger import event_budgets
from fgpu_ebpf.ledger.event_budgets import BUSY, IDLE_SECONDS, EventBudgets, name_of
from fgpu_ebpf.workloads.bound_owner import Owner, Why

FD = 7


class Kernel:
    """The kernel's map, and a clock. A cgroup below /root owns itself; the owner of /a/b is /a, a user's cgroup."""

    def __init__(self, monkeypatch):
        self.now, self.map = 1000.5, {b"12345678": bytes(24)}
        monkeypatch.setattr(event_budgets, "monotonic", lambda: self.now)
        monkeypatch.setattr(event_budgets.cgroup_namespace, "root_path", lambda: "")
        monkeypatch.setattr(event_budgets.bpf, "items", lambda fd, *_: iter(list(self.map.items())))
        monkeypatch.setattr(event_budgets.bpf, "update", lambda fd, key, value: self.map.update({key: value}))
        monkeypatch.setattr(event_budgets.bpf, "delete", lambda fd, key: self.map.pop(key, None) is not None)
        self.budgets = EventBudgets(FD, self.owner)

    @staticmethod
    def owner(path):
        first = "/" + path.split("/")[1]
        return Owner(1, path, Why.ITSELF) if first == "/root" else Owner(1, first, Why.USER)

    def has(self, path):
        return key(path) in self.map

    def lose(self, path):
        at = key(path) if path else bytes(8)
        found = abi.EventBudget.from_buffer_copy(self.map[at])
        found.lost += 1
        self.map[at] = bytes(found)


def key(path):
    return name_of(path.encode()).to_bytes(8, "little")


@pytest.fixture
def kernel(monkeypatch):
    return Kernel(monkeypatch)


def test_only_a_busy_workload_has_a_budget(kernel):
    assert set(kernel.map) == {bytes(8)}, "budgets of an earlier agent were kept"
    kernel.budgets.note(f"/user/{n}" for n in range(BUSY - 1))
    kernel.now += 1
    kernel.budgets.note(f"/user/{n}" for n in range(BUSY - 1))
    assert not kernel.has("/user")
    kernel.budgets.note(["/user/one/more"])
    assert kernel.has("/user")
    assert not kernel.has("/user/one")


def test_events_of_a_workload_with_a_budget_cost_no_look_at_its_cgroups(kernel, monkeypatch):
    kernel.budgets.note(["/user/one"] * BUSY)
    monkeypatch.setattr(kernel.budgets, "_owner", None)
    kernel.now += IDLE_SECONDS - 1
    kernel.budgets.note(["/user/one/more", "/user"])
    kernel.now += IDLE_SECONDS - 1
    kernel.budgets.lost()
    assert kernel.has("/user")


def test_root_s_own_cgroups_have_no_budget(kernel):
    kernel.budgets.note(["/root/one"] * 2 * BUSY)
    assert set(kernel.map) == {bytes(8)}


def test_a_workload_whose_name_is_too_long_for_the_kernel_has_no_budget(kernel):
    kernel.budgets.note([f"/{'n' * abi.PATH}/one"] * BUSY)
    assert set(kernel.map) == {bytes(8)}


def test_lost_events_are_reported_once(kernel):
    kernel.budgets.note(["/a/one", "/b/one"] * BUSY)
    assert kernel.budgets.lost() == []
    kernel.lose("/b")
    assert kernel.budgets.lost() == ["/b"]
    assert kernel.budgets.lost() == []
    kernel.lose("/b")
    kernel.lose("")
    assert kernel.budgets.lost() == ["/b", ""]


def test_an_idle_workload_loses_its_budget(kernel):
    kernel.budgets.note(["/a/one", "/b/one"] * BUSY)
    kernel.now += IDLE_SECONDS - 1
    kernel.lose("/b")
    kernel.budgets.lost()
    kernel.now += 2
    kernel.budgets.lost()
    assert (kernel.has("/a"), kernel.has("/b")) == (False, True)


def test_the_longest_idle_workload_loses_its_budget_if_all_budgets_are_used(kernel, monkeypatch):
    monkeypatch.setattr(event_budgets, "MOST", 2)
    for name in ("/a/one", "/b/one", "/c/one"):
        kernel.now += 1
        kernel.budgets.note([name] * BUSY)
    assert [kernel.has(path) for path in ("/a", "/b", "/c")] == [False, True, True]


def test_the_key_of_a_budget_is_the_fnv_1a_hash_of_the_workload_s_name():
    assert name_of(b"") == 0xCBF29CE484222325
    assert name_of(b"a") == 0xAF63DC4C8601EC8C
    assert name_of(b"foobar") == 0x85944171F73967E8
