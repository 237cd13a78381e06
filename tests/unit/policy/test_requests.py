"""Tests of the requests that schedulers of Kubernetes record in annotations of pods."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.policy.requests import ADAPTERS, of_adapters
from fgpu_ebpf.workloads import engine_answers
from fgpu_ebpf.workloads.cgroup_names import Engine
from fgpu_ebpf.workloads.workload import ASKING, Subject
from tests.unit.policy_kit import GIB, Gpu, policies, workload

H200 = Gpu(0)
SPEC = "{selector: {cgroup: a}, memory: {limit: 8GiB, max: 50GiB}, compute: {limit: 80%}}"
POD = Subject("0" * 32, Engine.CRI, is_pod=True)
HAMI, VOLCANO = "hami.io/vgpu-devices-allocated", "volcano.sh/vgpu-ids-new"
ONE = "GPU-aaa,NVIDIA,3072,30:;"
TWO = "GPU-aaa,NVIDIA,3072,30:;;GPU-aaa,NVIDIA,4096,60:GPU-bbb,NVIDIA,2048,60:;"
BAD = "is not a list of UUID,TYPE,MIB,PERCENT"


def limits_of(labels, subject=None, spec=SPEC):
    """Return GiB, the ceiling of device time, and the notes."""
    decision = policies(spec).resolve(workload(labels=labels, subject=subject), (H200,))
    return decision.limits.memory[0] / GIB, decision.limits.compute.limit_ratio, decision.notes


@pytest.mark.parametrize("label", [HAMI, VOLCANO])
@pytest.mark.parametrize(
    ("text", "subject", "gib", "ratio", "notes"),
    [
        (ONE, None, 3, 0.3, ()),
        (ONE.removesuffix(";"), POD, 3, 0.3, ()),
        (TWO, None, 4, 0.6, ()),
        (TWO, POD, 7, 0.8, ("{} requests 90%, the policy allows 80%",)),
        ("GPU-aaa,NVIDIA,3072,0:;", None, 3, 0.8, ()),
        ("GPU-aaa,NVIDIA,3072,30:;GPU-aaa,NVIDIA,1024,0:;", POD, 4, 0.8, ()),
        ("GPU-aaa,NVIDIA,3072,70:;GPU-aaa,NVIDIA,1024,70:;", POD, 4, 0.8, ("{} requests 100%, the policy allows 80%",)),
        ("GPU-aaa,NVIDIA,65536,30:;", None, 50, 0.3,
         ("{} requests 64GiB of device 0, the policy allows 50GiB",)),
        (";;", None, 8, 0.8, ()),
        ("", POD, 8, 0.8, ()),
        ("GPU-aaa,NVIDIA,0,30:;", None, 8, 0.3,
         ("{} is ignored: '0MiB' is not between 1 byte and 128 TiB",)),
        ("GPU-aaa,NVIDIA:;", None, 8, 0.8, (f"{{}} is ignored: 'GPU-aaa,NVIDIA:;' {BAD}",) * 2),
        ("GPU-aaa,NVIDIA,-1,0:", None, 8, 0.8, (f"{{}} is ignored: 'GPU-aaa,NVIDIA,-1,0:' {BAD}",) * 2),
    ],
)  # fmt: skip
def test_what_hami_and_volcano_have_booked_is_a_request(label, text, subject, gib, ratio, notes):
    """A container may need what the largest needs; all containers together may need the sum, on one device."""
    assert limits_of({label: text}, subject) == (gib, ratio, tuple(note.format(label) for note in notes))


@pytest.mark.parametrize(
    ("labels", "gib", "notes"),
    [
        ({"POD": "35", "DEV": "140"}, 35, ()),
        ({"POD": "35840", "DEV": "143360"}, 35, ()),
        ({"POD": "140", "DEV": "140"}, 50, ("requests 140GiB of device 0, the policy allows 50GiB",)),
        ({"POD": "35"}, 8, ()),
        ({"POD": "0", "DEV": "140"}, 8, ("is ignored: '0' of '140' is not a part of a device's memory",)),
        ({"POD": "141", "DEV": "140"}, 8, ("is ignored: '141' of '140' is not a part of a device's memory",)),
        ({"POD": "x", "DEV": "0"}, 8, ("is ignored: 'x' of '0' is not a part of a device's memory",)),
    ],
)
def test_what_aliyun_has_booked_is_a_part_of_the_device(labels, gib, notes):
    found = limits_of({f"ALIYUN_COM_GPU_MEM_{key}": value for key, value in labels.items()}, POD)
    assert found == (gib, 0.8, tuple(f"ALIYUN_COM_GPU_MEM_POD {note}" for note in notes))


def test_fgpu_s_own_labels_precede_those_of_schedulers():
    assert limits_of({HAMI: ONE, "fgpu.dev/memory": "2GiB", "fgpu.dev/compute": "10%"}) == (2, 0.1, ())


@pytest.mark.parametrize(
    ("adapter", "labels"),
    [
        ("kai", {"kai.scheduler/queue": "team", "gpu-memory": "3072"}),
        ("hami", {HAMI: ONE}),
        ("volcano", {VOLCANO: ONE}),
        ("aliyun", {"ALIYUN_COM_GPU_MEM_POD": "3", "ALIYUN_COM_GPU_MEM_DEV": "140"}),
        ("clearml", {"clearml-injector/fraction": "0.1"}),
    ],
)
def test_only_adapters_of_agent_yaml_read_requests(adapter, labels):
    """fgpu's own label has no adapter."""
    every, others = set(ADAPTERS), set(ADAPTERS) - {adapter}

    def gib(labels, adapters):
        found = policies(SPEC).resolve(workload(labels=labels, image_asks=labels), (H200,), adapters=adapters)
        return found.limits.memory[0] / GIB

    assert gib(labels, {adapter}) == gib(labels, every) != gib(labels, others) == 8
    assert gib({"fgpu.dev/memory": "2GiB"}, set()) == 2


def test_the_priority_of_a_pod_of_kai_is_read_by_kai_s_adapter_alone():
    labels = {"kai.scheduler/queue": "team", "priorityClassName": "batch"}
    assert of_adapters(labels, ["kai"]) == labels
    assert of_adapters(labels, ["hami"]) == {"kai.scheduler/queue": "team"}


def test_a_policy_without_memory_or_time_ignores_what_was_booked():
    decision = policies("{selector: {cgroup: a}}").resolve(workload(labels={HAMI: ONE}), (H200,))
    whys = "the policy sets no memory limit", "the policy gives no compute time"
    assert (decision.limits.memory, decision.limits.compute) == ({}, None)
    assert decision.notes == tuple(f"{HAMI} is ignored: {why}" for why in whys)


def test_an_annotation_about_many_devices_is_kept():
    text = ("GPU-2b000000-0000-0000-0000-000000000000,NVIDIA,3072,30:" * 16 + ";") * 4
    assert engine_answers.labels_of({HAMI: text, "other": text}) == ({HAMI: text}, False)
    assert engine_answers.labels_of({HAMI: text * 2}) == ({}, False)


@given(st.dictionaries(st.sampled_from(ASKING), st.text("0123456789,:;.%GiBx-", max_size=40)), st.booleans())
def test_no_text_of_a_request_exceeds_the_policy(labels, is_pod):
    gib, ratio, _ = limits_of(labels, POD if is_pod else None)
    assert 0 < gib <= 50
    assert 0 < ratio <= 0.8
