"""Tests of priorities by the names of priority classes and qualities of service."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.policy.rules import Priority
from fgpu_ebpf.workloads import cri, cri_messages
from fgpu_ebpf.workloads.workload import named
from tests.unit.policy_kit import Gpu, policies, workload

CLASSES = {"interactive": Priority.HIGH, "build": Priority.NORMAL, "train": Priority.LOW}
OWN, KAI = "fgpu.dev/priority", "priorityClassName"
PLACED = {"kai.scheduler/queue": "team-a"}  # by KAI
RANKS = [*Priority]


def decided(labels, priority="normal", classes=CLASSES, **names):
    """Return the priority, what it comes from, and the notes of the decision."""
    policy = policies(f"{{selector: {{cgroup: a}}, compute: {{priority: {priority}}}}}")
    found = policy.resolve(workload(labels=labels, **names), (Gpu(0),), classes)
    return found.limits.compute.priority, found.limits.compute.priority_by, found.notes


@pytest.mark.parametrize(
    ("labels", "priority", "found"),
    [
        ({OWN: "train"}, "normal", ("low", f"{OWN}: train", ())),
        ({OWN: "build"}, "high", ("normal", f"{OWN}: build", ())),
        ({OWN: "interactive"}, "high", ("high", "", ())),
        ({OWN: "build"}, "normal", ("normal", "", ())),
        ({}, "high", ("high", "", ())),
        ({OWN: "interactive"}, "normal",
         ("normal", "", (f"{OWN} requests high priority by interactive, the policy allows normal",))),
        ({OWN: "build"}, "low", ("low", "", (f"{OWN} requests normal priority by build, the policy allows low",))),
        ({OWN: "high"}, "normal", ("normal", "", (f"{OWN} is ignored: `priorities` in agent.yaml has no 'high'",))),
        ({OWN: ""}, "normal", ("normal", "", (f"{OWN} is ignored: `priorities` in agent.yaml has no ''",))),
    ],
)  # fmt: skip
def test_a_priority_class_lowers_the_priority_of_the_policy_and_never_raises_it(labels, priority, found):
    assert decided(labels, priority) == found


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ({KAI: "train", **PLACED}, ("low", f"{KAI}: train", ())),
        ({KAI: "train"}, ("normal", "", ())),  # another scheduler has placed the pod
        ({KAI: "inference", **PLACED}, ("normal", "", ())),
        ({KAI: "interactive", **PLACED},
         ("normal", "", (f"{KAI} requests high priority by interactive, the policy allows normal",))),
        ({OWN: "build", KAI: "train", **PLACED}, ("low", f"{KAI}: train", ())),
        ({OWN: "train", KAI: "build", **PLACED}, ("low", f"{OWN}: train", ())),
    ],
)  # fmt: skip
def test_kai_s_label_names_a_class_and_the_lowest_of_several_counts(labels, found):
    assert decided(labels) == found


def test_a_class_of_the_image_lowers_the_priority_too():
    assert decided({}, image_asks={OWN: "train"}) == ("low", f"the image's {OWN}: train", ())
    assert decided({OWN: "build"}, "high", image_asks={OWN: "train"}) == ("low", f"the image's {OWN}: train", ())


def test_without_classes_in_the_settings_only_fgpu_s_own_label_leaves_a_note():
    notes = (f"{OWN} is ignored: `priorities` in agent.yaml has no 'train'",)
    assert decided({OWN: "train", KAI: "train", **PLACED}, classes={}) == ("normal", "", notes)


def test_a_policy_without_compute_time_ignores_a_class():
    found = policies("{selector: {cgroup: a}}").resolve(workload(labels={OWN: "train"}), (Gpu(0),), CLASSES)
    assert (found.limits.compute, found.notes) == (None, (f"{OWN} is ignored: the policy gives no compute time",))


def test_the_classes_of_a_pod_come_from_its_labels_and_annotations():
    """An engine reports them, and not the field priorityClassName of the pod."""
    pod = cri_messages.classes()["PodSandbox"](
        metadata={"name": "p", "namespace": "n", "uid": "u"}, labels=PLACED, annotations={OWN: "train"}
    )
    found = policies("{selector: {namespace: n}, compute: {}}").resolve(
        named(workload(), cri._names(pod)), (Gpu(0),), CLASSES
    )
    assert (found.limits.compute.priority, found.limits.compute.priority_by) == ("low", f"{OWN}: train")


names = st.sampled_from([*CLASSES, "other", ""])
labels_ = st.dictionaries(st.sampled_from([OWN, KAI, *PLACED]), names)


@given(labels_, labels_, st.sampled_from(RANKS), st.booleans())
def test_no_label_raises_the_priority(labels, image_asks, most, has_compute):
    policy = policies(f"{{selector: {{cgroup: a}}, compute: {{priority: {most}}}}}")
    if not has_compute:
        policy = replace(policy, policies=(policy.policies[0]._replace(compute=None),))
    found = policy.resolve(workload(labels=labels, image_asks=image_asks), (Gpu(0),), CLASSES).limits.compute
    assert (found is not None) == has_compute
    assert found is None or RANKS.index(found.priority) >= RANKS.index(most)
