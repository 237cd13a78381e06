"""Tests of pods' names, labels and annotations from an engine with the container runtime interface over real gRPC."""

from __future__ import annotations

import os
import socket
import sys
import threading
from concurrent import futures

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fgpu_ebpf.tenancy.tenant import _name
from fgpu_ebpf.workloads import cri as cri_engine
from fgpu_ebpf.workloads import engine_thread
from fgpu_ebpf.workloads.cgroup_names import Engine
from fgpu_ebpf.workloads.cri import CriApi
from fgpu_ebpf.workloads.engine_answers import AnswerError
from fgpu_ebpf.workloads.workload import Names
from tests.support.wait import eventually
from tests.unit.workloads.labels_kit import ID, IMAGE, OTHER, UID, Cri, asked, running, subject, workload

CONTAINERD = subject(engine=Engine.CONTAINERD)
POD = subject(UID, Engine.CRI, is_pod=True)


@pytest.fixture
def cri(tmp_path):
    engine = Cri(tmp_path / "cri.sock")
    yield engine
    engine.stop()


@pytest.fixture
def api(cri):
    return CriApi(str(cri.path))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(cri_engine, "DEADLINE_SECONDS", 0.3)
    monkeypatch.setattr(engine_thread, "LONGEST_PAUSE_SECONDS", 0.1)


def test_a_container_has_its_pod_s_names_labels_and_annotations_and_its_image_s_labels(cri, api):
    cri.add_pod(labels={"tier": "notebook"}, annotations={"fgpu.dev/memory": "50%", "long": "x" * 1000})
    cri.add_container()
    cri.images[IMAGE] = {"maintainer": "us"}
    with running(api) as found:
        known = asked(found, workload(CONTAINERD))
        assert (known.name, known.pod, known.namespace) == ("main", "jupyter-0", "dev")
        assert known.image == "registry.example/app:1"
        wanted = {"tier": "notebook", "fgpu.dev/memory": "50%", "maintainer": "us"}
        assert wanted.items() <= known.labels.items()
        assert "long" not in known.labels
        assert known.image_asks == {}
        assert _name(known) == "dev/jupyter-0/main"


def test_the_connection_is_closed_until_the_next_request(cri, api):
    """The threads of an open connection of gRPC use processor time all the time."""
    cri.add_pod()
    for id_ in (ID, OTHER):
        cri.add_container(id_)
    cri.images[IMAGE] = {}
    with running(api) as found:
        for id_ in (ID, OTHER):
            assert asked(found, workload(subject(id_, Engine.CONTAINERD), path=f"/{id_}")).pod
            eventually(lambda: api._channel is None)


def test_what_a_device_plugin_has_allocated_has_precedence_over_requests_of_the_pod(cri, api):
    """kubelet passes annotations of the device plugin as annotations of the container."""
    asks = {"fgpu.dev/memory": "12GiB", "tier": "pod"}
    cri.add_pod(labels=asks, annotations=asks | {"fgpu.dev/compute": "100%"})
    cri.add_container(annotations={"fgpu.dev/memory": "2GiB", "tier": "container"})
    cri.images[IMAGE] = {}
    with running(api) as found:
        labels = asked(found, workload(CONTAINERD)).labels
    wanted = {"fgpu.dev/memory": "2GiB", "fgpu.dev/compute": "100%", "tier": "pod"}
    assert wanted.items() <= labels.items()


def test_an_image_s_labels_are_kept_apart_and_requested_once(cri, api):
    cri.add_pod()
    cri.add_container()
    cri.add_container(OTHER)
    cri.images[IMAGE] = {"fgpu.dev/memory": "8GiB"}
    with running(api) as found:
        assert asked(found, workload(CONTAINERD)).image_asks == {"fgpu.dev/memory": "8GiB"}
        other = asked(found, workload(subject(OTHER, Engine.CRIO), path="/other"))
        assert other.image_asks == {"fgpu.dev/memory": "8GiB"}
        assert cri.calls.count("ImageStatus") == 1


def test_a_pod_is_known_before_its_containers(cri, api):
    with running(api) as found:
        found.named(workload(POD, path="/pod"))
        eventually(lambda: cri.calls.count("ListPodSandbox") > 1)
        cri.add_pod(labels={"clearml-injector/fraction": "0.250"})
        known = asked(found, workload(POD, path="/pod"))
        assert (known.pod, known.namespace) == ("jupyter-0", "dev")
        assert known.labels["clearml-injector/fraction"] == "0.250"
        assert _name(known) == "dev/jupyter-0"


def test_a_pod_is_requested_at_once_when_one_of_its_containers_is_known(cri, api, monkeypatch):
    monkeypatch.setattr(engine_thread, "FIRST_AGAIN_SECONDS", 30.0)
    with running(api) as found:
        found.named(workload(POD, path="/pod"))
        eventually(lambda: cri.calls)
        cri.add_pod()
        cri.add_container()
        assert asked(found, workload(CONTAINERD)).pod == "jupyter-0"
        eventually(lambda: found.named(workload(POD, path="/pod")).pod, 2)


def test_the_labels_of_the_ready_sandbox_of_a_pod_are_used(cri, api):
    cri.add_pod("a" * 64, labels={"n": "old"}, state=1)
    cri.add_pod("b" * 64, labels={"n": "ready"}, state=0)
    cri.add_pod("c" * 64, labels={"n": "gone"}, state=1)
    with running(api) as found:
        assert asked(found, workload(POD)).labels["n"] == "ready"


def test_a_pause_container_has_no_names(cri, api):
    cri.add_pod(id_=ID, labels={"tier": "notebook"})
    with running(api) as found:
        known = asked(found, workload(CONTAINERD))
        assert (known.name, known.pod, known.labels) == ("w", None, {})
        assert CriApi(api.path).ask(CONTAINERD) == Names()  # the thread of `found` uses and closes `api`


def test_cri_engines_get_no_request_about_docker_podman_and_lxc_containers(api):
    assert [api.serves(subject(engine=engine)) for engine in (Engine.DOCKER, Engine.PODMAN, Engine.LXC)] == [False] * 3
    assert api.serves(POD)


# -- engines that hang or return false answers


@pytest.mark.parametrize("lie", ["hangs", "garbage", "another container", "20 MiB", "is down"])
def test_an_engine_with_false_or_no_answers_is_reported_and_asked_again(cri, api, quick, lie):
    ended = threading.Event()
    status = cri.messages["ContainerStatusResponse"]
    pad = cri.messages["ContainerStatus"](id=ID, labels={"x": "y" * (20 << 20)})
    cri.raw = {
        "hangs": lambda: b"\xff" * ended.wait(10),
        "garbage": lambda: b"\xff" * 100,
        "another container": lambda: status(status=cri.messages["ContainerStatus"](id=OTHER)).SerializeToString(),
        "20 MiB": lambda: status(status=pad).SerializeToString(),
        "is down": lambda: 1 // 0,
    }[lie]
    with running(api) as found:
        assert found.named(workload(CONTAINERD)).labels == {}
        assert eventually(lambda: found.views() and found.views()[0].fault)
        assert "fails" in found.missing(workload(CONTAINERD))
        ended.set()
        cri.raw = None
        cri.add_pod()
        cri.add_container()
        assert asked(found, workload(CONTAINERD)).pod == "jupyter-0"
        assert found.views()[0].fault == ""


def test_names_are_found_after_a_socket_without_grpc_and_an_engine_restart(tmp_path, quick):
    path = tmp_path / "cri.sock"
    with socket.socket(socket.AF_UNIX) as silent, running(CriApi(str(path))) as found:
        silent.bind(str(path))
        silent.listen(8)
        found.named(workload(CONTAINERD))
        assert eventually(lambda: found.views() and found.views()[0].fault)
        silent.close()
        os.unlink(path)
        for _ in range(2):
            cri = Cri(path)
            cri.add_pod()
            cri.add_container()
            assert asked(found, workload(CONTAINERD)).pod == "jupyter-0"
            cri.stop()
            found._entries.clear()


def test_an_engine_without_cri_v1_is_reported(tmp_path, quick):
    import grpc

    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{tmp_path}/cri.sock")
    server.start()
    with running(CriApi(f"{tmp_path}/cri.sock")) as found:
        found.named(workload(CONTAINERD))
        assert "does not support CRI v1" in eventually(lambda: found.views() and found.views()[0].fault)
    server.stop(0)


@pytest.mark.parametrize(
    ("prefix", "fix"),
    [
        (sys.base_prefix, "install python3-grpcio and python3-protobuf"),
        ("/opt/pipx", "run `pipx inject fgpu-ebpf grpcio protobuf`, or install both packages into /opt/pipx"),
    ],
)
def test_a_missing_grpc_module_is_reported_with_the_command_for_this_installation(
    tmp_path, monkeypatch, quick, prefix, fix
):
    """A virtual environment does not have the packages of the system."""
    monkeypatch.setattr(sys, "prefix", prefix)
    monkeypatch.setitem(sys.modules, "grpc", None)
    (tmp_path / "cri.sock").touch()
    with running(CriApi(f"{tmp_path}/cri.sock")) as found:
        found.named(workload(CONTAINERD))
        assert f"grpc is not installed: {fix}" in eventually(lambda: found.views() and found.views()[0].fault)


# -- any bytes at all


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=60), st.text(max_size=40) | st.binary(max_size=40))
def test_any_bytes_give_names_or_an_error(monkeypatch, answer, info):
    api = CriApi("/nowhere")
    messages = api._known_messages()

    def call(method, service, **fields):
        try:
            return messages[f"{method}Response"].FromString(answer)
        except Exception as error:
            raise AnswerError("is none") from error

    monkeypatch.setattr(api, "_call", call)
    for about in (CONTAINERD, POD):
        try:
            names = api.ask(about)
        except AnswerError:
            continue
        assert names is None or all(isinstance(text, (str, type(None))) for text in (names.pod, names.namespace))
    assert cri_engine._image_labels(info) is None
