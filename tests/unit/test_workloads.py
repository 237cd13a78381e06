"""Managed cgroups: names, targets, file, against a tree made of folders."""

from __future__ import annotations

import json

import pytest

from fgpu_ebpf.workloads import TargetError, Workloads


@pytest.fixture
def root(tmp_path):
    for path in ("a/b/c", "kubepods/pod1/x", "kubepods/pod2/x"):
        (tmp_path / "root" / path).mkdir(parents=True)
    return tmp_path / "root"


@pytest.fixture
def workloads(root, tmp_path):
    return Workloads(root, tmp_path / "state.json")


def test_put_names_by_the_last_folder_and_names_are_unique(workloads):
    one = workloads.put("/kubepods/pod1/x", 1)
    two = workloads.put("/kubepods/pod2/x", 2)
    assert one.name == "x"
    assert two.name == f"x-{two.cgroup}"
    assert workloads.put("/kubepods/pod1/x", 3).name == "x"


def test_the_file_brings_them_back(workloads, root, tmp_path):
    workloads.put("/a/b", 5, "tenant")
    again = Workloads(root, tmp_path / "state.json")
    assert [(w.path, w.name, w.memory_bytes) for w in again] == [("/a/b", "tenant", 5)]


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"cgroup": 1}]', "null", "[" * 1000])
def test_a_broken_file_is_no_workloads(root, tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    assert list(Workloads(root, tmp_path / "state.json")) == []


@pytest.mark.parametrize("target", ["/nowhere", "/a/../../etc", "/..", "pid/999999999", "pid/x", "nobody", ""])
def test_targets_that_are_not_there(workloads, target):
    with pytest.raises(TargetError):
        workloads.find(target)


def test_targets(workloads):
    workloads.put("/a/b", 5, "tenant")
    assert workloads.find("tenant") == "/a/b"
    assert workloads.find("/a//b/") == "/a/b"


def test_a_group_has_a_managed_cgroup_below_it(workloads):
    outer, inner = workloads.put("/a", 1), workloads.put("/a/b/c", 1)
    assert workloads.is_group(outer)
    assert not workloads.is_group(inner)
    assert workloads.levels("/a/b/c") == (inner.cgroup, outer.cgroup)


def test_a_cgroup_made_anew_under_the_same_path_is_another(workloads, root):
    workload = workloads.put("/a/b/c", 1)
    assert not workloads.is_gone(workload)
    (root / "a/b/c").rename(root / "moved")
    (root / "a/b/c").mkdir()
    assert workloads.is_gone(workload)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "x" * 200, "new\nline"])
def test_names_that_are_none(workloads, name):
    with pytest.raises(TargetError):
        workloads.make(name)


def test_make_finds_a_free_number(workloads):
    assert [workloads.make(""), workloads.make(""), workloads.make("mine")] == [
        "/fgpu/run-1",
        "/fgpu/run-2",
        "/fgpu/mine",
    ]
    with pytest.raises(TargetError, match="there already"):
        workloads.make("mine")


def test_the_file_is_json_of_plain_values(workloads, tmp_path):
    workloads.put("/a/b", 5, "tenant")
    (entry,) = json.loads((tmp_path / "state.json").read_text())
    assert entry["memory_bytes"] == 5
