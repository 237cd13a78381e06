"""Tests of the bound owner of a cgroup, in trees as engines, systemd and users create them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgpu_ebpf.workloads.bound_owner import Owner, Why, owner_of
from tests.unit.root_kit import needs_root

as_root = needs_root("only folders that belong to root count as cgroups of the host")

ID = "0123456789ab" * 5 + "0123"
POD = "kubepods-burstable-pod12345678_1234_1234_1234_123456789abc.slice"
JOBS = "/system.slice/n1_slurmstepd.scope"
USER = "/user.slice/user-1000.slice/user@1000.service"
KIND = f"/system.slice/docker-{ID}.scope"


@pytest.fixture
def host(tmp_path: Path) -> Callable[..., Owner]:
    """Return host(path, users, levels): the owner of a cgroup. `users`: uids by cgroup. `levels`: limited cgroups."""

    def find(path: str, users: dict[str, int] | None = None, levels: tuple[str, ...] = ()) -> Owner:
        (tmp_path / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
        for cgroup, uid in (users or {}).items():
            os.chown(f"{tmp_path}{cgroup}", uid, uid)
        ids = {os.stat(f"{tmp_path}{level}").st_ino for level in levels}
        return owner_of(tmp_path, path, ids.__contains__)

    return find


@as_root
@pytest.mark.parametrize(
    ("path", "owner", "why"),
    [
        (f"/system.slice/docker-{ID}.scope", f"/system.slice/docker-{ID}.scope", Why.CONTAINER),
        (f"/docker/{ID}/a/b", f"/docker/{ID}", Why.CONTAINER),
        (f"{KIND}/kubelet.slice/{POD}/cri-containerd-{ID}.scope", KIND, Why.CONTAINER),
        (f"{KIND}/docker/{ID}", KIND, Why.CONTAINER),
        (f"/kubepods.slice/kubepods-burstable.slice/{POD}/cri-containerd-{ID}.scope", POD, Why.POD),
        (f"{USER}/user.slice/libpod-{ID}.scope/container", USER, Why.UNIT),
        ("/system.slice/jupyter-alice.service/x", "/system.slice/jupyter-alice.service", Why.UNIT),
        (f"/system.slice/containerd.service/{POD}:cri-containerd:{ID}", "", Why.CONTAINER),
        (f"{JOBS}/job_7/step_0/user/task_0", f"{JOBS}/job_7", Why.JOB),
        (f"{JOBS}/sEKNKTV3WPV500/step_0/docker-{ID}.scope", f"{JOBS}/sEKNKTV3WPV500", Why.JOB),
        ("/system.slice/slurmstepd.scope/job_7/a", "/system.slice/slurmstepd.scope/job_7", Why.JOB),
        (JOBS, JOBS, Why.ITSELF),
        (f"{USER}/slurmstepd.scope/job_7", USER, Why.UNIT),
        ("/fgpu/run-1/a", "/fgpu/run-1", Why.RUN),
        ("/lxc.payload.one/a", "/lxc.payload.one", Why.CONTAINER),
        ("/plain/a", "/plain/a", Why.ITSELF),
        ("/", "/", Why.ITSELF),
    ],
)
def test_the_owner_of_a_cgroup_follows_from_the_names_in_its_path(host, path, owner, why):
    found = host(path)
    assert found.why is why
    assert found.path.endswith(owner or path)


@as_root
def test_a_container_inside_a_user_s_cgroup_is_owned_by_that_cgroup(host):
    found = host(f"/work/alice/docker-{ID}.scope", {"/work/alice": 1000})
    assert (found.path, found.why) == ("/work/alice", Why.USER)


@as_root
def test_the_outermost_cgroup_with_a_limit_owns_a_cgroup_inside_it(host):
    found = host("/teams/a/x/y", levels=("/teams/a", "/teams/a/x"))
    assert (found.path, found.why) == ("/teams/a", Why.LEVEL)


@as_root
def test_a_slice_with_a_limit_owns_only_cgroups_without_an_owner_inside_the_slice(host):
    levels = ("/kubepods.slice", f"/kubepods.slice/{POD}")
    assert host(f"/kubepods.slice/{POD}/a", levels=levels).path == f"/kubepods.slice/{POD}"
    assert host("/work.slice/plain/a", levels=("/work.slice", "/work.slice/plain")).path == "/work.slice/plain"
    assert host("/work.slice/a", levels=("/work.slice",)).path == "/work.slice"
    assert host(f"{JOBS}/job_7/step_0", levels=(JOBS, f"{JOBS}/job_7/step_0")).path == f"{JOBS}/job_7"


NAMES = st.sampled_from(
    ["a", "x.slice", "x.scope", "x.service", JOBS[14:], f"docker-{ID}.scope", ID, "docker", POD, "kubepods", "fgpu"]
)


@settings(max_examples=300)
@given(
    outside=st.lists(NAMES, min_size=1, max_size=3),
    inside=st.lists(NAMES, min_size=1, max_size=3),
    other=st.lists(NAMES, min_size=1, max_size=3),
    levels=st.integers(0, 2**7 - 1),
)
def test_names_of_cgroups_inside_a_workload_give_it_no_second_owner(tmp_path_factory, outside, inside, other, levels):
    """A cgroup inside a workload has the same owner as the workload, whatever name the workload chooses for it."""
    root = tmp_path_factory.mktemp("host")
    own = "/" + "/".join([*outside, f"cri-containerd-{ID}.scope"])
    paths = ["/".join([own, *names]) for names in (inside, other)]
    for path in paths:
        Path(f"{root}{path}").mkdir(parents=True, exist_ok=True)
    found = sorted(str(folder) for folder in Path(f"{root}{own}").rglob("*"))
    ids = {os.stat(folder).st_ino for n, folder in enumerate(found) if levels >> n & 1}
    owners = {owner_of(root, path, ids.__contains__) for path in (own, *paths)}
    assert len(owners) == 1
    assert own.startswith(next(iter(owners)).path)
