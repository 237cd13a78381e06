"""Tests of engines: their labels reach workloads, and a slow, silent or malicious engine delays nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.workloads import docker as docker_engine
from fgpu_ebpf.workloads import engine_answers, engine_labels, engine_thread, label_cache
from fgpu_ebpf.workloads.cgroup_names import Engine
from fgpu_ebpf.workloads.docker import DockerApi
from fgpu_ebpf.workloads.engine_answers import AnswerError
from fgpu_ebpf.workloads.workload import Names, Workload, named
from tests.support.wait import Deadline, eventually
from tests.unit.policy_kit import Gpu, policies
from tests.unit.root_kit import needs_root
from tests.unit.workloads.labels_kit import (
    ID,
    IMAGE,
    OTHER,
    PATH,
    Docker,
    asked,
    container,
    running,
    subject,
    workload,
)

MIB = 1 << 20


@pytest.fixture
def docker(tmp_path):
    engine = Docker(tmp_path / "docker.sock")
    yield engine
    engine.stop()


@pytest.fixture
def api(docker):
    return DockerApi(Engine.DOCKER, str(docker.path))


@pytest.fixture
def quick(monkeypatch):
    """Shorten deadlines and pauses, so that tests take little time."""
    monkeypatch.setattr(docker_engine, "DEADLINE_SECONDS", 0.2)
    monkeypatch.setattr(engine_thread, "LONGEST_PAUSE_SECONDS", 0.1)


# -- labels and names


def test_labels_image_and_name_of_a_container_arrive_later_by_one_request(docker, api):
    docker.containers = [container(), container(OTHER, Names=["/db"])]
    with running(api) as found:
        first = found.named(workload())
        assert (first.name, first.labels, first.image) == ("w", {}, None)  # the call returns at once, with no names yet
        known = asked(found, workload())
        assert (known.name, known.labels, known.image) == ("web", {"tier": "notebook"}, "registry.example/app:1")
        assert len(docker.targets) == 1
        assert (found.views()[0].found, found.views()[0].failed) == (1, 0)


def test_a_container_is_requested_once_for_all_its_cgroups(docker, api):
    docker.containers = [container()]
    with running(api) as found:
        found.named(workload(path=PATH + "/inner", inside=True))
        asked(found, workload())
        inner = found.named(workload(path=PATH + "/inner", inside=True))
        assert (inner.name, inner.labels) == ("w", {"tier": "notebook"})
        for _ in range(100):
            found.named(workload())
        assert len(docker.targets) == 1


def test_annotations_of_podman_are_read_and_docker_containers_get_no_labels_from_podman(tmp_path):
    podman = Docker(tmp_path / "podman.sock")
    podman.containers = [container(Annotations={"fgpu.dev/memory": "8GiB"})]
    with running(DockerApi(Engine.PODMAN, str(podman.path))) as found:
        known = asked(found, workload(subject(engine=Engine.PODMAN)))
        assert known.image_asks == {"fgpu.dev/memory": "8GiB"}  # the image is not known: the request may be the image's
        assert found.named(workload(subject(OTHER))).labels == {}  # Docker's labels belong to no workload here
    podman.stop()


def test_a_docker_container_has_the_pod_name_and_namespace_of_its_labels(docker, api):
    docker.containers = [container(Labels={engine_answers.POD_NAME: "jupyter-0", engine_answers.POD_NAMESPACE: "dev"})]
    with running(api) as found:
        known = asked(found, workload())
        assert (known.pod, known.namespace) == ("jupyter-0", "dev")


@pytest.mark.parametrize(
    ("own", "image", "asks", "labels"),
    [
        ({"fgpu.dev/memory": "8GiB"}, {}, {}, {"fgpu.dev/memory": "8GiB"}),
        ({"fgpu.dev/memory": "8GiB"}, {"fgpu.dev/memory": "8GiB"}, {"fgpu.dev/memory": "8GiB"}, {}),
        ({"fgpu.dev/memory": "9GiB"}, {"fgpu.dev/memory": "8GiB"}, {}, {"fgpu.dev/memory": "9GiB"}),
        ({"fgpu.dev/compute": "50%", "a": "b"}, {"a": "c"}, {}, {"fgpu.dev/compute": "50%", "a": "b"}),
    ],
)
def test_requests_of_the_image_and_of_the_workload_are_kept_apart(docker, api, own, image, asks, labels):
    docker.containers, docker.images = [container(Labels=own)], {IMAGE: image}
    with running(api) as found:
        known = asked(found, workload())
        assert (known.image_asks, known.labels) == (asks, labels)


def test_a_running_container_has_the_image_by_which_it_was_created_after_the_tag_has_moved(docker, api):
    """Docker's list names an image by its id once another image has the tag."""
    docker.containers = [container(Image=IMAGE, State="running")]
    docker.given = {ID: {"Id": ID, "Config": {"Image": "registry.example/app:1"}}}
    with running(api) as found:
        assert asked(found, workload()).image == "registry.example/app:1"


def test_a_container_that_is_starting_is_not_inspected(docker, api):
    """Docker answers `inspect` about a starting container only after the start."""
    docker.containers = [container(Image=IMAGE)]
    docker.given = {ID: {"Config": {"Image": "registry.example/app:1"}}}
    with running(api) as found:
        assert asked(found, workload()).image == IMAGE
        assert len(docker.targets) == 1


@pytest.mark.parametrize("given", [None, [], {}, {"Config": []}, {"Config": {"Image": 1}}, {"Config": {"Image": ""}}])
def test_a_container_whose_image_s_name_is_not_reported_has_the_image_s_id(docker, api, given):
    docker.containers, docker.given = [container(Image=IMAGE, State="running")], {ID: given}
    with running(api) as found:
        known = asked(found, workload())
        assert (known.image, known.labels) == (IMAGE, {"tier": "notebook"})


def test_labels_of_a_cgroup_s_attributes_take_precedence_over_labels_of_the_engine():
    one = named(workload(labels={"tier": "batch"}), Names("web", labels={"tier": "notebook", "team": "ml"}))
    assert one.labels == {"tier": "batch", "team": "ml"}


# -- later changes


def test_a_container_that_the_engine_reports_late_is_requested_again(docker, api):
    with running(api) as found:
        found.named(workload())
        eventually(lambda: len(docker.targets) > 2)
        assert "has no such container" in found.missing(workload())
        docker.containers = [container()]
        assert asked(found, workload()).labels == {"tier": "notebook"}
        assert found.missing(workload()) == ""


def test_names_are_found_with_an_engine_that_starts_later_or_restarts(tmp_path, quick):
    path = tmp_path / "docker.sock"
    with running(DockerApi(Engine.DOCKER, str(path))) as found:
        found.named(workload())
        assert eventually(found.views)[0].waiting == 1
        assert "does not exist" in found.missing(workload())
        docker = Docker(path)
        docker.containers = [container()]
        assert asked(found, workload()).labels
        docker.stop()
        found.named(workload(subject(OTHER), path="/other"))
        eventually(lambda: not found.views()[0].is_there)
        docker = Docker(path)
        docker.containers = [container(OTHER)]
        assert asked(found, workload(subject(OTHER), path="/other")).labels
        assert found.views()[0].fault == ""
        docker.stop()


def rescan(found: engine_labels.Engines, times: int) -> None:
    """Count several rescans of the cgroups, in which no container is requested."""
    for _ in range(times):
        found.rescanned()


def test_known_labels_are_kept_while_the_agent_is_frozen_and_the_engine_is_stopped(docker, api, tmp_path, monkeypatch):
    """Time without a rescan is no proof that a container has been removed: an agent that was frozen forgets nothing."""
    docker.containers, docker.images = [container(Labels={"fgpu.dev/memory": "8GiB"})], {IMAGE: {}}
    with running(api, file=tmp_path / "engines.json") as found:
        known = asked(found, workload())
        docker.stop()
        later = time.monotonic() + 1000
        monkeypatch.setattr(time, "monotonic", lambda: later)
        found.keep()
        assert found.named(workload()) == known


def test_known_labels_survive_an_agent_restart_and_are_forgotten_after_many_rescans(docker, api, tmp_path):
    docker.containers, docker.images = [container(Labels={"fgpu.dev/memory": "8GiB"})], {IMAGE: {}}
    file = tmp_path / "engines.json"
    with running(api, file=file) as found:
        known = asked(found, workload())
        found.keep()
        assert file.stat().st_mode & 0o777 == 0o600
        before = file.stat().st_ino
        found.keep()
        assert file.stat().st_ino == before  # nothing has changed
    docker.stop()
    with running(api, file=file) as found:
        assert found.named(workload()) == known  # immediately
        rescan(found, engine_labels.FORGOTTEN_RESCANS)
        found.keep()
        assert found.named(workload()) == known
        rescan(found, engine_labels.FORGOTTEN_RESCANS + 1)
        found.keep()
    with running(api, file=file) as found:
        assert found.named(workload()).labels == {}  # the container was in none of many rescans


@pytest.fixture
def often(monkeypatch):
    """Request names again immediately after a rescan."""
    monkeypatch.setattr(engine_thread, "SPREAD_SECONDS", 0.0)


def test_a_renamed_container_has_its_new_name_after_a_rescan_and_keeps_its_image(docker, api, often):
    docker.containers = [container()]
    with running(api) as found:
        known = asked(found, workload())
        docker.containers = [container(Names=["/api"], Image="sha256:" + "b2" * 32, Labels={})]
        rescan(found, 1)
        eventually(lambda: PATH in found.take())
        assert found.named(workload()) == dataclasses.replace(known, name="api")
        rescan(found, 1)
        eventually(lambda: len(docker.targets) == 3)
        assert found.take() == [], "the name is the same"


def test_a_container_that_was_renamed_while_no_agent_ran_has_its_new_name(docker, api, often, tmp_path):
    docker.containers, file = [container()], tmp_path / "engines.json"
    with running(api, file=file) as found:
        asked(found, workload())
        found.keep()
    docker.containers = [container(Names=["/api"])]
    with running(api, file=file) as found:
        assert found.named(workload()).name == "web"
        rescan(found, 1)
        eventually(lambda: PATH in found.take())
        assert found.named(workload()).name == "api"
        found.keep()
    assert [names.name for names in label_cache.read(file).values()] == ["api"]


def test_a_known_container_that_the_engine_no_longer_has_keeps_its_names_and_is_requested_once(docker, api, often):
    docker.containers = [container()]
    with running(api) as found:
        known = asked(found, workload())
        docker.containers = []
        rescan(found, 1)
        eventually(lambda: found.views()[0].unknown == 1)
        assert found.named(workload()) == known
        eventually(lambda: found._threads[0]._wants == {})


def test_no_container_waits_for_labels_while_its_name_is_requested_again(docker, api, often, quick):
    docker.containers = [container()]
    with running(api) as found:
        asked(found, workload())
        docker.status = 500
        rescan(found, 1)
        eventually(lambda: found.views()[0].fault)
        assert found.views()[0].waiting == 0


@pytest.mark.parametrize("text", ["", "{", "[1]", '["of"]', '[{"of": ["x", "y", 0]}]', "{}", "null", "[" * 10**5])
def test_an_invalid_label_cache_has_no_labels(tmp_path, text):
    file = tmp_path / "engines.json"
    file.write_text(text)
    assert label_cache.read(file) == {}


@pytest.mark.parametrize(
    "wrong", [{"of": ["docker"]}, {"of": ["x", "y", 0]}, {"name": 1}, {"is_cut": 0}, {"labels": 1}]
)
def test_an_invalid_entry_makes_the_label_cache_invalid(tmp_path, wrong):
    file = tmp_path / "engines.json"
    entry = {"of": ["docker", ID, False], **dataclasses.asdict(Names("web"))}
    for entries, known in (([entry], 1), ([entry, {**entry, **wrong}], 0)):
        file.write_text(json.dumps(entries))
        assert len(label_cache.read(file)) == known


# -- engines that hang or return false answers


def drip(wfile):
    wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1000):
        wfile.write(b" ")
        wfile.flush()
        time.sleep(0.05)


def headers(wfile):
    wfile.write(b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(10**5)))


def raw(body, head=b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"):
    return lambda wfile: wfile.write(head + body)


def silent(_):
    time.sleep(30)


LIES = {
    "hangs": silent,
    "drips": drip,
    "endless headers": headers,
    "empty": raw(b"", b""),
    "no http": raw(b"", b"SSH-2.0-OpenSSH\r\n"),
    "no json": raw(b"<html>"),
    "half": raw(b'[{"Id": "', b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"),
    "bad length": raw(b"[", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"),
    "bad chunks": raw(b"zz\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "10 MiB": raw(b'["' + b"x" * (10 * MIB) + b'"]'),
    "deep": raw(b"[" * 10**6),
    "a long number": raw(b"9" * 10**6),
    "not utf-8": raw(b'["\xff\xfe"]'),
    "no list": raw(b'{"Id": 1}'),
    "list of lists": raw(b"[[]]"),
    "500": raw(b"{}", b"HTTP/1.1 500 Internal Server Error\r\nConnection: close\r\n\r\n"),
}


@pytest.mark.timed
@pytest.mark.parametrize("lie", LIES)
def test_an_engine_with_false_or_no_answers_delays_nothing_and_is_reported(docker, api, quick, lie):
    docker.raw = LIES[lie]
    other = DockerApi(Engine.PODMAN, str(docker.path) + ".other")
    podman = Docker(docker.path.with_name("docker.sock.other"))
    podman.containers = [container(OTHER)]
    with running(api, other) as found:
        deadline = Deadline(0.2)
        assert found.named(workload()).labels == {}
        assert not deadline.is_over()  # shorter than a single deadline of an engine
        one = workload(subject(OTHER, Engine.PODMAN), path="/libpod")
        assert asked(found, one).labels == {"tier": "notebook"}  # while the other engine hangs
        assert eventually(lambda: next((v for v in found.views() if v.failed and v.fault), None))
        eventually(lambda: "docker fails: " in found.missing(workload()))
        docker.raw, docker.containers = None, [container()]
        assert asked(found, workload()).labels == {"tier": "notebook"}  # once the engine works again
        eventually(lambda: [v.fault for v in found.views()] == ["", ""])
    podman.stop()


@pytest.mark.timed
def test_an_oversized_answer_does_not_delay_the_answer_about_another_container(docker, api):
    docker.containers = [container(Labels={"x": "y" * 5 * MIB}), container(OTHER)]
    with running(api) as found:
        found.named(workload())
        deadline = Deadline(1)
        assert asked(found, workload(subject(OTHER), path="/other")).labels == {"tier": "notebook"}
        assert not deadline.is_over()
        assert found.named(workload()).labels == {}
        eventually(lambda: "longer than 4 MiB" in found.missing(workload()))


def test_an_engine_with_a_full_backlog_is_reported_after_a_deadline(tmp_path, quick):
    path = tmp_path / "docker.sock"
    with socket.socket(socket.AF_UNIX) as full, running(DockerApi(Engine.DOCKER, str(path))) as found:
        full.bind(str(path))
        full.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(str(path))
        found.named(workload())
        assert eventually(lambda: found.views() and found.views()[0].fault)
        for sock in waiting:
            sock.close()


def test_an_engine_s_thread_that_could_not_start_starts_later(docker, api, monkeypatch):
    """A host that is short of processes for a moment must not leave containers without labels."""

    def fail(_thread):
        monkeypatch.undo()
        raise RuntimeError("can't start new thread")

    docker.containers = [container()]
    with running(api) as found:
        monkeypatch.setattr(threading.Thread, "start", fail)
        assert found.named(workload()).labels == {}
        assert found.views()[0].fault == "can't start new thread"
        found.keep()
        assert asked(found, workload()).labels == {"tier": "notebook"}
        assert found.views()[0].fault == ""


def test_a_new_container_waits_for_no_request_about_ended_containers(tmp_path):
    """The engine starts after hundreds of containers have ended, and creates one. That container is requested first."""
    with running(DockerApi(Engine.DOCKER, str(tmp_path / "docker.sock"))) as found:
        for number in range(300):
            found.named(workload(subject(f"{number:064x}"), f"/docker/{number:064x}"))
        time.sleep(1)  # by now the engine's absence has been recorded
        engine = Docker(tmp_path / "docker.sock")
        engine.containers = [container()]
        asked(found, workload())
        assert any(ID in target for target in engine.targets[:2])  # another request may have been in progress
        engine.stop()


@needs_root("it gives a socket to another user")
def test_a_socket_that_root_does_not_own_gets_no_request(docker, api, quick):
    docker.containers = [container()]
    os.chown(docker.path, 1000, 1000)
    with running(api) as found:
        found.named(workload())
        assert "belongs to uid 1000" in eventually(lambda: found.views() and found.views()[0].fault)
        assert docker.targets == []


# -- bounds


def test_labels_are_bounded_in_length_and_number_and_requests_are_kept():
    many = {f"k{n:05}": "v" * 10 for n in range(5000)}
    first = {"io.kubernetes.pod.namespace": "a", "fgpu.dev/memory": "8GiB"}
    labels, is_cut = engine_answers.labels_of({**many, "long": "x" * MIB, "x" * 400: "", **first})
    assert labels.items() >= first.items()
    assert "long" not in labels
    assert len(labels) == engine_answers.MOST_LABELS
    assert is_cut
    wide, is_cut = engine_answers.labels_of({f"{n}": "v" * 256 for n in range(1000)})
    assert sum(len(k) + len(v) for k, v in wide.items()) <= engine_answers.MOST_CHARACTERS
    assert is_cut
    some = {f"k{n}": "v" for n in range(engine_answers.MOST_LABELS)}
    assert engine_answers.labels_of(some, some, {"long": "x" * MIB}) == (some, False)


def test_very_many_labels_of_a_container_or_its_image_do_not_hide_the_label_that_selects_its_policy(
    docker, api, tmp_path
):
    many = {f"k{n:03}": "" for n in range(engine_answers.MOST_LABELS)}
    file = tmp_path / "labels.json"
    rules = policies("{selector: {matchLabels: {tier: notebook}}, memory: {limit: 4GiB}}")
    docker.containers = [container(Labels={**many, "tier": "notebook"}), container(OTHER, Labels=many)]
    with running(api, file=file) as found:
        whole = asked(found, workload(subject(OTHER), path="/other"))
        assert rules.resolve(whole, [Gpu(0)]).limits is None
        cut = asked(found, workload())
        assert rules.resolve(cut, [Gpu(0)]).limits.memory == {0: 0}
        found.keep()
    with running(api, file=file) as again:
        assert rules.resolve(again.named(workload()), [Gpu(0)]).limits.memory == {0: 0}, "the restart forgot the cut"
    of_both, is_cut = engine_answers.labels_of(dict(sorted({**many, "tier": "gold"}.items())))
    image = engine_answers.Labels({"tier": "x"}, is_cut=False)
    merged = engine_answers.with_image(Names("web", labels=of_both, is_cut=is_cut), image)
    assert (is_cut, merged.labels.get("tier"), merged.is_cut) == (True, None, True), "a label of the image replaces one"
    image = engine_answers.labels_of({**many, "tier": "notebook"})
    named_by_both = named(workload(), engine_answers.with_image(Names("web", labels={"team": "ml"}), image))
    assert rules.resolve(named_by_both, [Gpu(0)]).limits.memory == {0: 0}


def test_names_that_an_earlier_version_has_stored_without_the_cut_are_requested_again(docker, api, tmp_path):
    labels = {"tier": "notebook", **{f"k{n:03}": "" for n in range(engine_answers.MOST_LABELS)}}
    file = tmp_path / "labels.json"
    rules = policies("{selector: {matchLabels: {k255: ''}}, memory: {limit: 4GiB}}")
    docker.containers = [container(Labels=labels)]
    with running(api, file=file) as found:
        asked(found, workload())
        found.keep()
    stored = json.loads(file.read_text())
    assert [len(entry["labels"]) for entry in stored] == [engine_answers.MOST_LABELS]
    file.write_text(json.dumps([{key: entry[key] for key in entry if key != "is_cut"} for entry in stored]))
    with running(api, file=file) as again:
        assert rules.resolve(asked(again, workload()), [Gpu(0)]).limits.memory == {0: 0}


def test_known_labels_are_bounded_and_forgotten(docker, api, monkeypatch):
    monkeypatch.setattr(engine_labels, "MOST_KNOWN", 8)
    docker.containers = [container(f"{n:064x}") for n in range(100)]
    with running(api) as found:
        for n in range(100):
            found.named(workload(subject(f"{n:064x}"), path=f"/{n}"))
        assert (len(found._entries), found.left_out) == (8, 92)
        eventually(lambda: len(docker.targets) == 8)
        rescan(found, engine_labels.FORGOTTEN_RESCANS + 1)
        assert asked(found, workload(subject(f"{99:064x}"), path="/99")).labels
        assert len(found._entries) == 1


def test_labels_of_a_container_that_the_last_rescan_has_not_found_make_room_for_others(docker, api, monkeypatch):
    monkeypatch.setattr(engine_labels, "MOST_KNOWN", 2)
    one, two, three = (workload(subject(f"{n:064x}"), path=f"/{n}") for n in range(3))
    docker.containers = [container(f"{n:064x}") for n in range(3)]
    with running(api) as found:
        known = asked(found, one)
        asked(found, two)
        rescan(found, 1)
        found.named(one)
        assert found.named(three) == three, "the rescan has found both containers"
        rescan(found, 1)
        assert asked(found, three).labels
        assert found.named(one) == known


def test_a_removed_container_is_not_requested_any_more(docker, api, monkeypatch):
    monkeypatch.setattr(engine_labels, "MOST_KNOWN", 1)
    docker.containers = [container(OTHER)]
    with running(api) as found:
        found.named(workload())
        eventually(lambda: docker.targets)
        rescan(found, engine_labels.FORGOTTEN_RESCANS + 1)
        asked(found, workload(subject(OTHER), path="/other"))
        assert found._threads[0]._wants == {}


def test_a_failure_is_no_longer_reported_once_the_containers_that_are_requested_are_gone(docker, api, quick):
    docker.status = 500
    with running(api) as found:
        found.named(workload())
        assert eventually(lambda: found.views() and found.views()[0].fault)
        rescan(found, engine_labels.FORGOTTEN_RESCANS + 1)
        found.keep()
        (view,) = found.views()
        assert (view.fault, view.waiting, view.is_there) == ("", 0, False), "the last request had no answer"
        docker.status, docker.containers = 200, [container(OTHER)]
        asked(found, workload(subject(OTHER), path="/other"))
        assert found.views()[0].is_there


def test_a_cgroup_without_an_engine_causes_no_request(docker, api):
    with running(api) as found:
        before = set(threading.enumerate())  # threads of earlier tests may end at any time
        found.named(Workload(1, "/batch", "batch"))
        found.named(workload(subject(engine=Engine.RUNC)))
        assert set(threading.enumerate()) <= before
        assert found._entries == {}
        assert found.views() == ()


# -- arbitrary answers

junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
labels = st.dictionaries(st.text(max_size=8) | st.sampled_from(engine_answers.ASKING), junk, max_size=5)
items = st.fixed_dictionaries(
    {"Id": st.just(ID) | junk},
    optional={
        "Names": st.lists(st.sampled_from(["/a", "/a/b", "", "x"]) | junk, max_size=3) | junk,
        "Labels": labels | junk,
        "Image": junk,
        "ImageID": junk,
        "State": st.just("running") | junk,
        "HostConfig": st.fixed_dictionaries({}, optional={"Annotations": labels | junk}) | junk,
    },
)


def is_sound(names):
    texts = [names.pod, names.namespace, names.image, *names.labels, *names.labels.values(), *names.image_asks.values()]
    return all(text is None or (isinstance(text, str) and text.isprintable() and len(text) <= 512) for text in texts)


@given(st.lists(items, max_size=3) | junk, junk, labels | junk)
def test_any_answer_of_docker_gives_valid_names_none_or_an_error(found, image, image_labels):
    try:
        said = engine_answers.of_docker(found, ID)
    except AnswerError:
        return
    if said is None:
        return
    names, _, _ = said
    assert is_sound(names)
    assert is_sound(named(workload(), names))
    assert is_sound(Names(image=engine_answers.docker_given_image(image)))
    for answer in (image, {"Config": image}, {"Config": {"Labels": image_labels}}):
        try:
            known = engine_answers.docker_image_labels(answer)
        except AnswerError:
            continue
        both = engine_answers.with_image(names, known)
        assert is_sound(both)
        assert not set(both.image_asks) & set(both.labels)
        assert {**both.image_asks, **both.labels}.items() >= names.labels.items()
