"""Tests of the table of cgroup names: every engine, with and without systemd's driver, nested, and unknown names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.workloads import cgroup_names
from fgpu_ebpf.workloads.cgroup_names import CgroupName, Engine

ID = "4f1d" * 16
INNER = "beef" * 16
UID = "0f8a2c1e-1111-2222-3333-444455556666"
UID_ = UID.replace("-", "_")
HASH = UID.replace("-", "")  # uid of a static pod, which has no dashes: kubelet computes it from the pod's file
PODS = {
    "burstable": f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice",
    "besteffort": f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice",
    "guaranteed": f"/kubepods.slice/kubepods-pod{UID_}.slice",
    "static": f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{HASH}.slice",
    "kind": "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice"
    f"/kubelet-kubepods-burstable-pod{UID_}.slice",
}
BARE_PODS = {
    "burstable": f"/kubepods/burstable/pod{UID}",
    "besteffort": f"/kubepods/besteffort/pod{UID}",
    "guaranteed": f"/kubepods/pod{UID}",
    "kind": f"/kubelet/kubepods/burstable/pod{UID}",
}
ROOTLESS = "/user.slice/user-1000.slice/user@1000.service/user.slice"
NODE = f"/system.slice/docker-{ID}.scope"

# path -> engine, container, pod uid, unit, inside
CASES = {
    # Docker: names of systemd's cgroup driver, --cgroup-parent, plain names, rootless, under an old kubelet, names in
    # the form of systemd's driver under the other driver, cgroups inside a container
    f"/system.slice/docker-{ID}.scope": ("docker", ID, None, f"docker-{ID}.scope", False),
    f"/batch.slice/docker-{ID}.scope": ("docker", ID, None, f"docker-{ID}.scope", False),
    f"/docker/{ID}": ("docker", ID, None, None, False),
    f"/docker/buildkit/{ID}": ("docker", ID, None, None, False),
    f"{ROOTLESS}/docker-{ID}.scope": ("docker", ID, None, f"docker-{ID}.scope", False),
    f"{PODS['burstable']}/docker-{ID}.scope": ("docker", ID, UID, f"docker-{ID}.scope", False),
    f"/system.slice:docker:{ID}": ("docker", ID, None, None, False),
    f"/system.slice/docker-{ID}.scope/init.scope": ("docker", ID, None, "init.scope", True),
    f"/docker/{ID}/a/b": ("docker", ID, None, None, True),
    # Podman: the same, with its own pods, in a service (--cgroups=split), and with crun's cgroup `container` inside
    f"/machine.slice/libpod-{ID}.scope": ("podman", ID, None, f"libpod-{ID}.scope", False),
    f"/machine.slice/libpod-{ID}.scope/container": ("podman", ID, None, f"libpod-{ID}.scope", True),
    f"/machine.slice/machine-libpod_pod_{INNER}.slice/libpod-{ID}.scope/container": (
        "podman", ID, None, f"libpod-{ID}.scope", True,
    ),
    f"/machine.slice/machine-libpod_pod_{INNER}.slice": (None, None, None, None, False),
    f"/libpod_parent/libpod-{ID}": ("podman", ID, None, None, False),
    f"/libpod_parent/{ID}": ("podman", ID, None, None, False),
    f"/libpod_parent/{INNER}/libpod-{ID}": ("podman", ID, None, None, False),
    f"/system.slice/web.service/libpod-payload-{ID}": ("podman", ID, None, "web.service", False),
    f"{ROOTLESS}/libpod-{ID}.scope/container": ("podman", ID, None, f"libpod-{ID}.scope", True),
    f"/user.slice/user-0.slice/session-1.scope/libpod-{ID}": ("podman", ID, None, "session-1.scope", False),
    # containerd and CRI-O under kubelet
    **{f"{pod}/cri-containerd-{ID}.scope": ("containerd", ID, UID, f"cri-containerd-{ID}.scope", False)
       for kind, pod in PODS.items() if kind != "static"},
    f"{PODS['static']}/cri-containerd-{ID}.scope": ("containerd", ID, HASH, f"cri-containerd-{ID}.scope", False),
    **{f"{pod}/crio-{ID}.scope": ("cri-o", ID, UID, f"crio-{ID}.scope", False)
       for kind, pod in PODS.items() if kind != "static"},
    f"{PODS['burstable']}/crio-{ID}.scope/container": ("cri-o", ID, UID, f"crio-{ID}.scope", True),
    **{f"{pod}/{ID}": ("cri", ID, UID, None, False) for pod in BARE_PODS.values()},
    **{f"{pod}/crio-{ID}": ("cri-o", ID, UID, None, False) for pod in BARE_PODS.values()},
    f"/kubepods/besteffort/pod{HASH}/{ID}": ("cri", ID, HASH, None, False),
    f"/system.slice/containerd.service/kubepods-burstable-pod{UID_}.slice:cri-containerd:{ID}": (
        "containerd", ID, UID, "containerd.service", False,
    ),
    f"/kubepods-besteffort-pod{UID_}.slice:crio:{ID}": ("cri-o", ID, UID, None, False),
    # pods themselves, and the folders around them
    **{pod: (None, None, UID, None, False) for kind, pod in PODS.items() if kind != "static"},
    **dict.fromkeys(BARE_PODS.values(), (None, None, UID, None, False)),
    "/kubepods.slice/kubepods-burstable.slice": (None, None, None, None, False),
    "/kubepods/burstable": (None, None, None, None, False),
    # other cgroups
    f"/system.slice/nerdctl-{ID}.scope": ("nerdctl", ID, None, f"nerdctl-{ID}.scope", False),
    f"/system.slice/runc-{ID}.scope": ("runc", ID, None, f"runc-{ID}.scope", False),
    "/lxc.payload.web-1": ("lxc", "web-1", None, None, False),
    "/lxc.payload.web-1/init.scope": ("lxc", "web-1", None, "init.scope", True),
    "/machine.slice/systemd-nspawn@web.service": (None, None, None, "systemd-nspawn@web.service", False),
    "/machine.slice/systemd-nspawn@web.service/payload": (None, None, None, "systemd-nspawn@web.service", True),
    "/machine.slice/systemd-nspawn@web.service/payload/system.slice/ssh.service": (
        None, None, None, "systemd-nspawn@web.service", True,
    ),
    "/machine.slice/machine-web.scope/payload/init.scope": (None, None, None, "machine-web.scope", True),
    "/system.slice/jupyter-anna.service": (None, None, None, "jupyter-anna.service", False),
    "/system.slice/docker.service": (None, None, None, "docker.service", False),
    "/system.slice/docker.socket": (None, None, None, None, False),
    # engines in containers: processes of the outer container created these cgroups, and could have chosen any name
    f"{NODE}/docker/{INNER}": ("docker", INNER, None, f"docker-{ID}.scope", True),
    f"/docker/{ID}/docker/{INNER}": ("docker", INNER, None, None, True),
    f"{NODE}{PODS['kind']}/cri-containerd-{INNER}.scope": (
        "containerd", INNER, UID, f"cri-containerd-{INNER}.scope", True,
    ),
    f"{NODE}{PODS['kind']}": ("docker", ID, UID, f"docker-{ID}.scope", True),
    f"{PODS['guaranteed']}/cri-containerd-{ID}.scope/docker/{INNER}": (
        "docker", INNER, UID, f"cri-containerd-{ID}.scope", True,
    ),
    f"/lxc.payload.web/docker/{INNER}": ("docker", INNER, None, None, True),
    # names that only resemble those of containers
    f"/batch/{ID}": (None, None, None, None, False),
    f"/system.slice/docker-{ID[:11]}.scope": (None, None, None, f"docker-{ID[:11]}.scope", False),
    f"/system.slice/docker-{ID.upper()}.scope": (None, None, None, f"docker-{ID.upper()}.scope", False),
    f"/system.slice/docker-{ID}a.scope": (None, None, None, f"docker-{ID}a.scope", False),
    "/docker": (None, None, None, None, False),
    "/docker/buildkit": (None, None, None, None, False),
    "/batch/pod-like": (None, None, None, None, False),
    "/": (None, None, None, None, False),
}  # fmt: skip


@pytest.mark.parametrize("path", CASES)
def test_engine_container_pod_and_unit_are_read_from_a_path(path):
    said = cgroup_names.parse(cgroup_names.split(path))
    assert (said.engine, said.container, said.pod_uid, said.unit, said.inside) == CASES[path]


@pytest.mark.parametrize("path", CASES)
def test_only_a_container_or_pod_inside_a_container_is_nested(path):
    said = cgroup_names.parse(cgroup_names.split(path))
    assert said.nested == (path.startswith((NODE + "/docker", NODE + "/kube", f"/docker/{ID}/docker")) or (
        f"/docker/{INNER}" in path
    ))  # fmt: skip


@pytest.mark.parametrize("path", [path for path in CASES if "conmon" not in path])
def test_no_cgroup_of_a_container_pod_or_service_is_a_monitor(path):
    assert not cgroup_names.is_monitor(cgroup_names.split(path))


@pytest.mark.parametrize(
    "path",
    [
        f"/machine.slice/libpod-conmon-{ID}.scope",
        f"/machine.slice/machine-libpod_pod_{INNER}.slice/libpod-conmon-{ID}.scope",
        f"{PODS['burstable']}/crio-conmon-{ID}.scope",
        f"/system.slice/crio-conmon-{ID}.scope",
        f"/kubepods/burstable/pod{UID}/crio-conmon-{ID}",
        f"/libpod_parent/libpod-conmon-{ID}",
        "/libpod_parent/conmon",
        f"/libpod_parent/{INNER}/conmon",
        "/lxc.monitor.web",
    ],
)
def test_cgroups_of_conmon_and_lxc_monitor_are_monitors(path):
    assert cgroup_names.is_monitor(cgroup_names.split(path))
    assert cgroup_names.is_monitor(cgroup_names.split(path + "/below"))


parts = st.lists(
    st.sampled_from([part for path in CASES for part in path.split("/") if part]) | st.text(max_size=20), max_size=8
)


@given(parts)
def test_every_path_has_a_result(found):
    said = cgroup_names.parse(found)
    assert isinstance(said, CgroupName)
    assert (said.container is None) <= (said.engine is None)
    assert said.depth <= len(found)
    assert said.engine is None or said.engine in Engine


@given(parts)
def test_a_cgroup_inside_a_container_belongs_to_that_or_to_a_nested_container(found):
    said = cgroup_names.parse(["docker", ID, *found])
    assert said.inside == bool(found)
    assert said.container == ID or said.nested
