"""Tests of the workload that a cgroup belongs to, in trees of folders."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.workloads import workload
from fgpu_ebpf.workloads.cgroup_names import Engine
from fgpu_ebpf.workloads.workload import Subject, identify
from tests.unit.root_kit import needs_root

ID = "4f1d" * 16
INNER = "beef" * 16
UID = "0f8a2c1e-1111-2222-3333-444455556666"
UID_ = UID.replace("-", "_")
BURSTABLE = f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice"
NODE = f"/docker/{ID}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UID_}.slice"

# path -> name, unit, container, pod uid, inside
CASES = {
    "/": ("root", None, None, None, False),
    f"/system.slice/docker-{ID}.scope": (f"docker-{ID}.scope", f"docker-{ID}.scope", ID, None, False),
    f"/system.slice/docker-{ID}.scope/init.scope": ("init.scope", "init.scope", ID, None, True),
    f"/system.slice/docker-{ID}.scope/a/b": ("b", f"docker-{ID}.scope", ID, None, True),
    f"/docker/{ID}": (ID, None, ID, None, False),
    f"/docker/{ID}/x": ("x", None, ID, None, True),
    f"/docker/{ID}/docker/{INNER}": (INNER, None, INNER, None, True),  # created by the outer container
    f"/docker/{ID[:12]}": (ID[:12], None, ID[:12], None, False),
    "/docker/buildkit": ("buildkit", None, None, None, False),
    "/docker": ("docker", None, None, None, False),
    f"/machine.slice/libpod-{ID}.scope": (f"libpod-{ID}.scope", f"libpod-{ID}.scope", ID, None, False),
    f"/machine.slice/libpod-{ID}.scope/container": (f"libpod-{ID}.scope", f"libpod-{ID}.scope", ID, None, True),
    f"/libpod_parent/libpod-{ID}": (f"libpod-{ID}", None, ID, None, False),
    f"/libpod_parent/{ID}": (ID, None, ID, None, False),
    f"/system.slice/web.service/libpod-payload-{ID}": (f"libpod-payload-{ID}", "web.service", ID, None, False),
    f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope": (
        f"libpod-{ID}.scope", f"libpod-{ID}.scope", ID, None, False,
    ),
    f"{BURSTABLE}/cri-containerd-{ID}.scope": (
        f"cri-containerd-{ID}.scope", f"cri-containerd-{ID}.scope", ID, UID, False,
    ),
    f"{BURSTABLE}/crio-{ID}.scope": (f"crio-{ID}.scope", f"crio-{ID}.scope", ID, UID, False),
    f"{BURSTABLE}/crio-{ID}.scope/container": (f"crio-{ID}.scope", f"crio-{ID}.scope", ID, UID, True),
    BURSTABLE: (BURSTABLE.rpartition("/")[2], None, None, UID, False),
    f"/kubepods.slice/kubepods-pod{UID_}.slice": (f"kubepods-pod{UID_}.slice", None, None, UID, False),
    f"/kubepods/burstable/pod{UID}/{ID}": (ID, None, ID, UID, False),
    f"/kubepods/pod{UID.replace('-', '')}/{ID}": (ID, None, ID, f"{UID.replace('-', '')}", False),
    f"/kubelet/kubepods/besteffort/pod{UID}/{ID}": (ID, None, ID, UID, False),
    f"{NODE}/cri-containerd-{INNER}.scope": (
        f"cri-containerd-{INNER}.scope", f"cri-containerd-{INNER}.scope", INNER, UID, True,
    ),
    f"/system.slice/containerd.service/kubepods-burstable-pod{UID_}.slice:cri-containerd:{ID}": (
        f"kubepods-burstable-pod{UID_}.slice:cri-containerd:{ID}"[:128], "containerd.service", ID, UID, False,
    ),
    f"/system.slice:docker:{ID}": (f"system.slice:docker:{ID}", None, ID, None, False),
    "/lxc.payload.web-1": ("lxc.payload.web-1", None, "web-1", None, False),
    "/lxc.payload.web-1/init.scope": ("init.scope", "init.scope", "web-1", None, True),
    "/system.slice/jupyter-anna.service": ("jupyter-anna.service", "jupyter-anna.service", None, None, False),
    "/system.slice/jupyter-anna.service/job": ("job", "jupyter-anna.service", None, None, True),
    r"/system.slice/dev-a\x2db.service": ("dev-a-b.service", r"dev-a\x2db.service", None, None, False),
    r"/system.slice/odd\x2f\x0a.service": ("odd__.service", r"odd\x2f\x0a.service", None, None, False),
    "/system.slice": ("system.slice", None, None, None, False),
    "/user.slice/user@1000.service/app.slice/x.scope": ("x.scope", "x.scope", None, None, False),
    "/fgpu/run-1": ("run-1", None, None, None, False),
    "/batch/pod-like": ("pod-like", None, None, None, False),
    f"/batch/{ID}": (ID, None, None, None, False),
    "/a b/ü$c": ("__c", None, None, None, False),
    "/" + "n" * 200: ("n" * 128, None, None, None, False),
}  # fmt: skip


@pytest.mark.parametrize("path", CASES)
def test_a_path_identifies_its_workload(tmp_path, path):
    folder = tmp_path / path.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    found = identify(tmp_path, path)
    assert (found.name, found.unit, found.container, found.pod_uid, found.inside) == CASES[path]
    assert (found.cgroup, found.path) == (folder.stat().st_ino, path)
    assert (found.pod, found.namespace, found.image, dict(found.labels)) == (None, None, None, {})


@pytest.mark.parametrize(
    "path",
    [
        f"/machine.slice/libpod-conmon-{ID}.scope",
        f"/kubepods.slice/crio-conmon-{ID}.scope",
        f"/libpod_parent/libpod-conmon-{ID}",
        f"/machine.slice/libpod-conmon-{ID}.scope/inner",
        "/libpod_parent/conmon",
        f"/libpod_parent/{ID}/conmon",
        "/lxc.monitor.web",
    ],
)
def test_monitors_of_engines_are_no_workload(tmp_path, path):
    (tmp_path / path.lstrip("/")).mkdir(parents=True)
    assert identify(tmp_path, path) is None


def test_a_path_that_is_no_cgroup_below_the_root_is_no_workload(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "inner").mkdir()
    assert [identify(tmp_path, path) for path in ("/gone", "/file", "/file/x")] == [None] * 3
    assert identify(tmp_path / "inner", "/..") is None


@given(st.lists(st.text(st.characters(blacklist_characters="/\0"), min_size=1, max_size=30), max_size=6))
def test_the_name_of_a_workload_has_only_safe_characters_and_at_most_128(parts):
    name = workload._name([part for part in parts if part not in (".", "..")])
    assert 0 < len(name) <= 128
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._@:+=-")


# -- labels --------------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path):
    """Return labelled(path, attributes), which makes a folder with these extended attributes and returns it."""

    def make(path, attributes):
        folder = tmp_path / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in attributes.items():
            os.setxattr(folder, name, value)
        return folder

    return make


as_root = needs_root("only labels of folders that belong to root are accepted")


@as_root
def test_attributes_are_labels_and_two_attributes_are_requests(tmp_path, labelled):
    labelled("/a", {"user.fgpu.memory": b"8GiB", "user.fgpu.compute": b"50%", "user.fgpu.team": b"ml", "user.x": b"y"})
    labels = identify(tmp_path, "/a").labels
    assert labels == {"fgpu.dev/memory": "8GiB", "fgpu.dev/compute": "50%", "team": "ml"}


@as_root
def test_users_other_than_root_may_set_requests_but_no_labels(tmp_path, labelled):
    folder = labelled(
        "/a", {"user.fgpu.memory": b"8GiB", "user.fgpu.team": b"ml", "user.fgpu.fgpu.dev/memory": b"1GiB"}
    )
    os.chown(folder, 1000, 1000)
    assert identify(tmp_path, "/a").labels == {"fgpu.dev/memory": "8GiB"}


@as_root
def test_cgroups_inside_a_workload_may_set_requests_but_no_labels(tmp_path, labelled):
    labelled(f"/docker/{ID}/x", {"user.fgpu.memory": b"8GiB", "user.fgpu.team": b"ml"})
    assert identify(tmp_path, f"/docker/{ID}/x").labels == {"fgpu.dev/memory": "8GiB"}


@as_root
def test_at_most_64_labels_are_read_and_invalid_labels_are_dropped(tmp_path, labelled):
    labelled("/many", {f"user.fgpu.k{n:03}": b"v" for n in range(100)})
    labelled("/odd", {"user.fgpu.a": b"x" * 257, "user.fgpu.b": b"\xff", "user.fgpu.c": b"a\nb", "user.fgpu.d": b""})
    assert len(identify(tmp_path, "/many").labels) == 64
    assert identify(tmp_path, "/odd").labels == {"d": ""}


# -- requests to engines ------------------------------------------------------------------------------------------

POD = f"/kubepods/burstable/pod{UID}"


@as_root
@pytest.mark.parametrize(
    ("path", "subject"),
    [
        (f"/docker/{ID}", Subject(ID, Engine.DOCKER)),
        (f"/docker/{ID}/x/y", Subject(ID, Engine.DOCKER)),  # a cgroup inside the container has the container's names
        (f"/machine.slice/libpod-{ID}.scope/container", Subject(ID, Engine.PODMAN)),
        (f"{POD}/{ID}", Subject(ID, Engine.CRI)),
        (f"{BURSTABLE}/crio-{ID}.scope", Subject(ID, Engine.CRIO)),
        (POD, Subject(UID, Engine.CRI, is_pod=True)),
        (BURSTABLE, Subject(UID, Engine.CRI, is_pod=True)),
        (f"{POD}/other", None),
        (f"/docker/{ID}/docker/{INNER}", None),  # a process in the first container could have chosen this name
        (f"/docker/{ID}/kubepods/pod{UID}", None),
        (f"/docker/{ID}/kubepods/pod{UID}/{INNER}", None),
        ("/system.slice/jupyter.service", None),
    ],
)
def test_each_engine_is_asked_only_about_its_own_containers(tmp_path, path, subject):
    (tmp_path / path.lstrip("/")).mkdir(parents=True)
    assert identify(tmp_path, path).subject == subject


@as_root
@pytest.mark.parametrize("path", [f"/a/docker-{ID}.scope", f"/a/docker-{ID}.scope/x", f"/a/pod{UID}", f"/docker/{ID}"])
def test_cgroups_that_other_users_can_create_cause_no_request(tmp_path, path):
    (tmp_path / path.lstrip("/")).mkdir(parents=True)
    assert identify(tmp_path, path).subject
    own = tmp_path / path.split("/")[1] / path.split("/")[2]
    os.chown(own, 1000, 1000)  # the root user of a user namespace owns its folder, and has not created it
    assert identify(tmp_path, path).subject
    os.chown(own.parent, 1000, 1000)
    assert identify(tmp_path, path).subject is None
