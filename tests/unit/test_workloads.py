"""Tests of cgroups, overrides and TARGETs, with a tree of folders."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fgpu_ebpf.policy.units import Amount
from fgpu_ebpf.tenancy import targets
from fgpu_ebpf.tenancy.overrides import Override, Overrides
from fgpu_ebpf.workloads.cgroups import TargetError, Workloads

ID = "1f3a" + "0" * 60


@pytest.fixture
def root(tmp_path):
    for path in ("a/b/c", "system.slice/x.service/inner", f"docker/{ID}/inner", f"docker/1f3b{ID[4:]}"):
        (tmp_path / "root" / path).mkdir(parents=True)
    return tmp_path / "root"


@pytest.fixture
def workloads(root):
    return Workloads(root)


def test_walk_finds_every_cgroup_except_the_root_and_outer_cgroups_first(workloads, root):
    found = list(workloads.walk())
    assert sorted(found) == sorted("/" + str(p.relative_to(root)) for p in root.rglob("*"))
    assert all(found.index(path.rpartition("/")[0]) < found.index(path) for path in found if path.count("/") > 1)


def test_a_recreated_cgroup_of_the_same_path_is_another_cgroup(workloads, root):
    before = workloads.cgroup("/a/b/c")
    (root / "a/b/c").rename(root / "moved")
    assert workloads.cgroup("/a/b/c") is None
    (root / "a/b/c").mkdir()
    assert workloads.cgroup("/a/b/c") not in (None, before)


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "x" * 200, "new\nline"])
def test_invalid_names_are_refused(workloads, name):
    with pytest.raises(TargetError):
        workloads.make(name)


def test_make_finds_a_free_number(workloads):
    made = [workloads.make(""), workloads.make(""), workloads.make("mine")]
    assert made == ["/fgpu/run-1", "/fgpu/run-2", "/fgpu/mine"]
    with pytest.raises(TargetError, match="already"):
        workloads.make("mine")


def test_populated_and_pids_are_read_from_the_files(workloads, root):
    (root / "a/cgroup.events").write_text("populated 1\nfrozen 0\n")
    (root / "a/cgroup.procs").write_text("12\n345\n")
    assert workloads.is_populated("/a")
    assert not workloads.is_populated("/a/b")
    assert workloads.pids("/a") == [12, 345]
    assert workloads.pids("/gone") == []


# -- overrides


def test_overrides_are_restored_from_the_file(tmp_path):
    one = Override(23, "/a/b", 5, "tenant", True)
    overrides = Overrides(tmp_path / "overrides.json")
    overrides.put(one)
    overrides.put(Override(29, "/a", 7))
    overrides.drop([29, 31])
    assert list(Overrides(tmp_path / "overrides.json")) == [one]


def test_a_percentage_is_stored_and_a_file_without_one_stays_readable_for_older_agents(tmp_path):
    file = tmp_path / "overrides.json"
    overrides = Overrides(file)
    overrides.put(Override(23, "/a", 4 << 20))
    assert "millionths" not in file.read_text().replace("limit_millionths", "")
    overrides.put(Override(29, "/b", None, memory_millionths=125_000))
    assert [one.memory for one in Overrides(file)] == [Amount(4 << 20), Amount(millionths=125_000)]


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"cgroup": 1}]', "null", "[" * 1000])
def test_an_invalid_file_has_no_overrides(tmp_path, text):
    (tmp_path / "overrides.json").write_text(text)
    assert list(Overrides(tmp_path / "overrides.json")) == []


def test_an_override_that_cannot_be_stored_is_not_applied(tmp_path):
    overrides = Overrides(tmp_path / "nowhere/overrides.json")
    with pytest.raises(OSError, match="nowhere"):
        overrides.put(Override(23, "/a", 5))
    assert list(overrides) == []


# -- TARGET


@pytest.fixture
def find(workloads):
    enforcer = SimpleNamespace(named=lambda name: SimpleNamespace(path="/a/b") if name == "tenant" else None)
    return lambda target: targets.find(target, enforcer, workloads)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("tenant", "/a/b"),
        ("/a//b/", "/a/b"),
        (ID[:12], f"/docker/{ID}"),
        ("unit/x.service", "/system.slice/x.service"),
        ("x.service", "/system.slice/x.service"),
    ],
)
def test_names_paths_container_ids_and_units_are_resolved_as_targets(find, target, path):
    assert find(target) == path


@pytest.mark.parametrize(
    "target", ["/nowhere", "/a/../../etc", "/..", "pid/999999999", "pid/x", "nobody", "", "unit/y.service", "1f3"]
)
def test_missing_and_invalid_targets_are_errors(find, target):
    with pytest.raises(TargetError):
        find(target)


def test_an_ambiguous_target_is_refused(find, root):
    (root / f"docker/1f3a1{ID[5:]}").mkdir()
    with pytest.raises(TargetError, match="name one of these cgroups"):
        find("1f3a")
