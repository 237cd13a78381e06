"""Tests of the file budget: how many probed files, and how much of the agent's time, one cgroup may use."""

from __future__ import annotations

import pytest

from fgpu_ebpf.driver import file_budget
from fgpu_ebpf.driver.file_budget import BURST_NS, MOST_FILES, REFILL_NS, FileBudget


def test_files_of_a_cgroup_are_bounded() -> None:
    budget = FileBudget()
    for n in range(MOST_FILES):
        assert budget.room("/a") == MOST_FILES - n
        budget.enter((1, n), "/a")
    budget.enter((1, 0), "/b")  # the file counts for the first cgroup
    assert (budget.room("/a"), budget.room("/b"), budget.has("/a")) == (0, MOST_FILES, (MOST_FILES, MOST_FILES))
    assert budget.cgroup_of((1, 0)) == "/a"
    budget.forget((1, 0))
    budget.forget((1, 0))
    assert (budget.room("/a"), (1, 0) in budget, budget.cgroup_of((1, 0))) == (1, False, "")


def test_files_of_all_cgroups_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_budget, "MOST_FILES_ALL", 23)
    budget = FileBudget()
    for n in range(23):
        budget.enter((1, n), f"/{n}")
    assert budget.room("/new") == 0


def test_used_time_is_reduced_step_by_step() -> None:
    budget = FileBudget()
    budget.charge("/a", BURST_NS + 2 * REFILL_NS)
    assert (budget.has_time("/a"), budget.has_time("/b")) == (False, True)
    budget.refill()
    assert not budget.has_time("/a")
    budget.refill()
    assert budget.has_time("/a")
    for _ in range(BURST_NS // REFILL_NS):
        budget.refill()
    assert not budget._spent_ns, "an entry of an idle cgroup was kept"
