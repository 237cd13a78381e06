"""Tests of policies: which policy a workload gets, and the resulting limits."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgpu_ebpf.ledger.level_limits import LevelLimits
from fgpu_ebpf.policy import schema
from fgpu_ebpf.policy.rules import Compute, Park, PolicySet, Priority
from fgpu_ebpf.policy.selector import CUT
from fgpu_ebpf.tenancy.overrides import Override
from fgpu_ebpf.tenancy.tenant import kept_tenant, tenant_of
from fgpu_ebpf.workloads.cgroup_names import Engine
from fgpu_ebpf.workloads.workload import Subject
from tests.unit import policy_kit as kit
from tests.unit.policy_kit import GIB, Gpu, policies, workload

H200 = Gpu(0)
T4 = Gpu(1, "GPU-2b000000-0000-0000-0000-000000000000", "Tesla T4", 15 * GIB)
EVERY = "{selector: {cgroup: '**'}}"


def memory_of(spec, gpus=(H200,), **names):
    """Return the bytes by device, and the notes."""
    decision = policies(spec).resolve(workload(**names), gpus)
    return decision.limits.memory, decision.notes


def test_contexts_besides_the_limit_raise_the_limit_that_is_enforced():
    """A device that is denied or has no limit stays as it is, and the part beyond the limit is in whole MiB."""
    decision = policies("{selector: {cgroup: a}, memory: {limit: 50%, contexts: 3}}").resolve(workload(), (H200, T4))
    half = decision.limits.memory
    tenant = tenant_of(decision, None, (H200, T4), lambda index: (500 << 20) + index)
    assert tenant.outside == {0: 1500 << 20, 1: 1501 << 20}
    assert tenant.limits == {0: half[0] + (1500 << 20), 1: half[1] + (1501 << 20)}
    flags = LevelLimits(1, tenant.limits, outside=tenant.outside).flags_of(1)
    assert kept_tenant(tenant.workload, tenant.limits, {1: flags}, None).outside == {1: 1501 << 20}
    assert not tenant.is_in_force_as(replace(tenant, outside={}))
    denied = Override(1, "/a", None, devices=(T4.uuid_text,))
    assert set(tenant_of(decision, denied, (H200, T4), lambda _: 500 << 20).outside) == {1}
    counted = policies("{selector: {cgroup: a}}").resolve(workload(), (H200,))
    assert tenant_of(counted, None, (H200,), lambda _: 500 << 20).outside == {}


# -- selectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "names", "reason"),
    [
        ("{cgroup: 'system.slice/*'}", {"path": "/system.slice/a"}, ""),
        ("{cgroup: 'system.slice/*'}", {"path": "/a"}, "the workload's cgroup matches none of system.slice/*"),
        ("{cgroup: [x, a]}", {"path": "/a"}, ""),
        ("{cgroup: a, namespace: dev}", {}, "the workload has no namespace"),
        ("{cgroup: a, namespace: dev}", {"namespace": "prod"}, "the workload's namespace matches none of dev"),
        ("{namespace: 'team-*'}", {"namespace": "team-a"}, ""),
        ("{image: 'registry.example/*'}", {"image": "registry.example/a/b"}, ""),
        ("{image: '*'}", {}, "the workload has no image"),
        ("{unit: 'jupyter-*.service'}", {"unit": "jupyter-1.service"}, ""),
        ("{matchLabels: {tier: notebook}}", {"labels": {"tier": "notebook"}}, ""),
        ("{matchLabels: {tier: notebook}}", {"labels": {"tier": "x"}},
         "the workload's labels do not match tier In (notebook)"),
        ("{matchLabels: {tier: notebook}}", {}, "the workload's labels do not match tier In (notebook)"),
        ("{matchExpressions: [{key: a, operator: In, values: [x, y]}]}", {"labels": {"a": "y"}}, ""),
        ("{matchExpressions: [{key: a, operator: NotIn, values: [x]}]}", {"labels": {"a": "x"}},
         "the workload's labels do not match a NotIn (x)"),
        ("{matchExpressions: [{key: a, operator: NotIn, values: [x]}]}", {}, ""),
        ("{matchExpressions: [{key: a, operator: Exists}]}", {"labels": {"a": ""}}, ""),
        ("{matchExpressions: [{key: a, operator: Exists}]}", {}, "the workload's labels do not match a Exists"),
        ("{matchExpressions: [{key: a, operator: DoesNotExist}]}", {"labels": {"a": ""}},
         "the workload's labels do not match a DoesNotExist"),
        ("{image: '*'}", {"image": "x", "inside": True},
         "the cgroup is inside the workload's own cgroup, where only selector.cgroup matches"),
        ("{image: '*', cgroup: '**'}", {"image": "x", "inside": True}, ""),
    ],
)  # fmt: skip
def test_every_key_of_a_selector_must_match(selector, names, reason):
    decision = policies(f"{{selector: {selector}}}").resolve(workload(**names), [H200])
    assert (decision.policy is not None) is (reason == "")
    assert decision.tried == ((("p0", reason),) if reason else ())


def test_the_first_matching_policy_applies_and_earlier_ones_report_why_not():
    found = policies("{selector: {unit: x}}", EVERY, EVERY).resolve(workload(), [H200])
    assert found.policy.name == found.limits.policy == "p1"
    assert found.tried == (("p0", "the workload has no unit"),)


def test_no_limit_applies_without_a_matching_policy():
    found = policies("{selector: {unit: x}}").resolve(workload(), [H200])
    assert (found.policy, found.limits, found.notes) == (None, None, ())
    assert PolicySet().resolve(workload(), [H200]).tried == ()


# -- resulting limits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "policy", "memory"),
    [
        ("{selector: {matchLabels: {a: b}}, memory: {limit: 1GiB}}", "p0", 0),
        ("{selector: {matchLabels: {a: b}}, compute: {}}", "p0", 0),
        ("{selector: {matchExpressions: [{key: a, operator: NotIn, values: [b]}]}, memory: {limit: 1GiB}}", "p0", 0),
        ("{selector: {matchExpressions: [{key: a, operator: DoesNotExist}]}, memory: {limit: 1GiB}}", "p0", 0),
        ("{selector: {matchExpressions: [{key: a, operator: DoesNotExist}]}, mode: observe}", "p1", 2),
        ("{selector: {matchLabels: {x: y}}, memory: {limit: 1GiB}}", "p0", 1),
        ("{selector: {matchLabels: {x: z, a: b}}, memory: {limit: 1GiB}}", "p1", 2),
        ("{selector: {cgroup: other, matchLabels: {a: b}}, memory: {limit: 1GiB}}", "p1", 2),
    ],
)
def test_a_policy_that_a_left_out_label_could_select_gives_no_memory(spec, policy, memory):
    """An observing policy limits nothing, so it is passed over, and the next policy applies."""
    rules = policies(spec, "{selector: {cgroup: a}, memory: {limit: 2GiB}}")
    pod = Subject("1", Engine.CRI, is_pod=True)
    for about in (workload(labels={"x": "y"}, is_cut=True), workload(labels={"x": "y"}, is_cut=True, subject=pod)):
        decision = rules.resolve(about, (H200,))
        assert (decision.policy.name, decision.limits.memory) == (policy, {0: memory * GIB})
        assert (CUT in " ".join(decision.notes)) == (memory == 0)


def test_fields_of_a_policy_become_the_limits_of_a_workload():
    spec = """
  selector: {cgroup: a}
  mode: observe
  onBypass: kill
  memory: {limit: 8GiB, park: {after: 90s, hostMemory: 6GiB, deadline: 30s}}
  compute: {limit: 12.5%, weight: 7, priority: high, quantum: 5ms}
  views: {utilization: own}
  metricLabels: [team, tier]"""
    limits = policies(spec).resolve(workload(), [H200, T4]).limits
    assert (limits.observe, limits.kill, limits.own_utilization) == (True, True, True)
    assert (limits.devices, limits.memory) == ((0, 1), {0: 8 * GIB, 1: 8 * GIB})
    assert limits.compute == Compute(0.125, 7, Priority.HIGH, 5_000_000)
    assert limits.metric_labels == ("team", "tier")
    assert limits.park == Park(90 * 10**9, 6 * GIB, 30 * 10**9)


def test_absent_fields_set_no_limit_and_no_option():
    limits = policies(EVERY).resolve(workload(), [H200]).limits
    assert (limits.memory, limits.compute, limits.devices) == ({}, None, (0,))
    assert (limits.observe, limits.kill, limits.own_utilization, limits.metric_labels) == (False, False, False, ())


def test_the_time_after_which_a_workload_is_parked_becomes_the_tenant_s_whatever_its_labels_and_override_say():
    labelled = workload(labels={"fgpu.dev/memory": "1GiB", "fgpu.dev/park": "off", "park": "1s"})
    park = "{after: 2h, hostMemory: 6GiB}"
    decision = policies(f"{{selector: {{cgroup: a}}, memory: {{limit: 8GiB, park: {park}}}}}").resolve(labelled, [H200])
    for override in (None, Override(1, "/a", GIB)):
        tenant = tenant_of(decision, override, [H200], lambda _: 0)
        assert tenant is not None
        assert tenant.park == Park(7200 * 10**9, 6 * GIB)


def test_compute_has_its_default_values():
    assert policies("{selector: {cgroup: a}, compute: {}}").policies[0].compute == Compute(
        1.0, 100, Priority.NORMAL, 20_000_000
    )


@pytest.mark.parametrize(
    ("devices", "chosen"),
    [
        ("'*'", (0, 1)),
        ("0", (0,)),
        ("['1']", (1,)),
        ("[1, 0]", (0, 1)),
        ("GPU-2B", (1,)),
        ("gpu-2b000000-0000-0000-0000-000000000000", (1,)),
        ("H200", (0,)),
        ("'NVIDIA H*'", (0,)),
        ("'*T4'", (1,)),
        ("[7, A100*]", ()),
    ],
)
def test_devices_are_chosen_by_index_uuid_or_model(devices, chosen):
    spec = f"{{selector: {{cgroup: a}}, devices: {devices}, memory: {{limit: 1GiB}}}}"
    decision = policies(spec).resolve(workload(), [H200, T4])
    assert (decision.limits.devices, tuple(decision.limits.memory)) == (chosen, chosen)
    assert decision.notes == (() if chosen else ("this host has no device 7, A100*",))


def test_a_share_of_a_device_is_rounded_down_to_granules_and_is_at_least_one_granule():
    odd = Gpu(0, usable_bytes=10 * GIB + 12345)
    assert memory_of("{selector: {cgroup: a}, memory: {limit: 50%}}", [odd, Gpu(1, usable_bytes=100)])[0] == {
        0: (5 * GIB) >> 21 << 21,
        1: 2 << 20,
    }


def test_a_limit_beyond_the_device_is_reported():
    memory, notes = memory_of("{selector: {cgroup: a}, memory: {limit: 16GiB}}", [H200, T4])
    assert memory == {0: 16 * GIB, 1: 16 * GIB}
    assert notes == ("the limit of 16GiB is more than tenants can get on device 1",)


# -- requests of the workload itself -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "label", "gib", "note"),  # the note without its first word
    [
        ("{limit: 8GiB}", "4GiB", 4, None),
        ("{limit: 8GiB}", "16GiB", 8, "requests 16GiB of device 0, the policy allows 8GiB"),
        ("{limit: 8GiB, max: 16GiB}", "16GiB", 16, None),
        ("{limit: 8GiB, max: 16GiB}", "17GiB", 16, "requests 17GiB of device 0, the policy allows 16GiB"),
        ("{limit: 7GiB, max: 100%}", "50%", 70, None),
        ("{limit: 50%, max: 16GiB}", "40GiB", 40, None),
        ("{limit: 8GiB}", "8GB", 8, "is ignored: '8GB': did you mean 8GiB?"),
        ("{limit: 8GiB}", "", 8, "is ignored: '' is not a memory size: write it as 8GiB or 50%"),
        ("{limit: 8GiB}", "0%", 8, "is ignored: '0%' must be above 0% and at most 100%"),
        (
            "{limit: 8GiB}", "9" * 5000, 8,
            f"is ignored: '{'9' * 40}…' is not a memory size: write it as 8GiB or 50%",
        ),
    ],
)  # fmt: skip
def test_a_workload_s_label_applies_as_far_as_the_policy_allows(rule, label, gib, note):
    spec = f"{{selector: {{cgroup: a}}, memory: {rule}}}"
    memory, notes = memory_of(spec, labels={"fgpu.dev/memory": label})
    assert (memory, notes) == ({0: gib * GIB}, (f"fgpu.dev/memory {note}",) if note else ())


@pytest.mark.parametrize(
    ("rule", "label", "ratio", "note"),
    [
        ("{limit: 50%}", "25%", 0.25, None),
        ("{limit: 50%}", "75%", 0.5, "fgpu.dev/compute requests 75%, the policy allows 50%"),
        ("{weight: 5}", "75%", 0.75, None),
        ("{limit: 50%}", "half", 0.5, "fgpu.dev/compute is ignored: 'half' is not a share: write it as 50%"),
    ],
)
def test_a_workload_s_label_of_time_applies_as_far_as_the_policy_allows(rule, label, ratio, note):
    decision = policies(f"{{selector: {{cgroup: a}}, compute: {rule}}}").resolve(
        workload(labels={"fgpu.dev/compute": label}), [H200]
    )
    assert (decision.limits.compute.limit_ratio, decision.notes) == (ratio, (note,) if note else ())
    assert decision.limits.compute.weight == (5 if "weight" in rule else 100)


def test_a_label_sets_no_limit_where_the_policy_has_none():
    labels = {"fgpu.dev/memory": "1GiB", "fgpu.dev/compute": "1%"}
    decision = policies(EVERY).resolve(workload(labels=labels), [H200])
    assert (decision.limits.memory, decision.limits.compute) == ({}, None)
    assert [note.partition(":")[0] for note in decision.notes] == [f"{key} is ignored" for key in labels]


@pytest.mark.parametrize(
    ("rule", "label", "gib", "note"),  # the note without its first word
    [
        ("{limit: 8GiB, max: 100%}", "0.250", 35, None),
        ("{limit: 8GiB, max: 100%}", "0.0625", 8.75, None),
        ("{limit: 8GiB, max: 100%}", "1.000", 140, None),
        ("{limit: 8GiB, max: 100%}", "2", 140, None),
        ("{limit: 8GiB, max: 16GiB}", "0.5", 16, "requests 70GiB of device 0, the policy allows 16GiB"),
        ("{limit: 8GiB}", "0.5", 8, "requests 70GiB of device 0, the policy allows 8GiB"),
        ("{limit: 8GiB}", "0.000", 8, "is ignored: '0.000' is not above 0"),
        ("{limit: 8GiB}", "-1", 8, "is ignored: '-1' is not a fraction: write it as 0.25"),
        ("{limit: 8GiB}", "1e3", 8, "is ignored: '1e3' is not a fraction: write it as 0.25"),
        ("{limit: 8GiB}", "\u0661", 8, "is ignored: '\u0661' is not a fraction: write it as 0.25"),
    ],
)
def test_clearml_s_fraction_requests_memory(rule, label, gib, note):
    spec = f"{{selector: {{cgroup: a}}, memory: {rule}}}"
    memory, notes = memory_of(spec, labels={"clearml-injector/fraction": label})
    assert (memory, notes) == ({0: gib * GIB}, (f"clearml-injector/fraction {note}",) if note else ())


@pytest.mark.parametrize(
    ("labels", "gib", "notes"),
    [
        ({"gpu-memory": "2048"}, 2, ()),
        ({"gpu-fraction": "0.25"}, 35, ()),
        ({"gpu-fraction": "0.5"}, 50, ("gpu-fraction requests 70GiB of device 0, the policy allows 50GiB",)),
        ({"gpu-memory": "2GiB"}, 8, ("gpu-memory is ignored: '2GiB' is not a number of MiB: write it as 2000",)),
        ({"gpu-memory": "1"}, 8, ("gpu-memory is ignored: '1MiB' is less than the driver's unit of allocation: write at"
                                  " least 2MiB",)),
        ({"gpu-memory": "2048", "fgpu.dev/memory": "3GiB"}, 3, ()),
    ],
)  # fmt: skip
def test_pods_of_the_kai_scheduler_request_memory_by_its_annotations(labels, gib, notes):
    spec = "{selector: {cgroup: a}, memory: {limit: 8GiB, max: 50GiB}}"
    assert memory_of(spec, labels={"kai.scheduler/queue": "team", **labels}) == ({0: gib * GIB}, notes)
    if "fgpu.dev/memory" not in labels:
        assert memory_of(spec, labels=labels) == ({0: 8 * GIB}, ()), "without the queue's label it may mean anything"


@pytest.mark.parametrize(
    ("rule", "gib", "notes"),
    [
        ("{limit: 0}", 0, ("fgpu.dev/memory requests 2GiB of device 0, the policy allows 0B",)),
        ("{limit: 0, max: 1GiB}", 1, ("fgpu.dev/memory requests 2GiB of device 0, the policy allows 1GiB",)),
        ("{limit: 0, max: 50%}", 2, ()),
    ],
)
def test_a_limit_of_0_is_no_memory(rule, gib, notes):
    spec = f"{{selector: {{cgroup: a}}, memory: {rule}}}"
    assert memory_of(spec) == ({0: 0}, ())
    assert memory_of(spec, labels={"fgpu.dev/memory": "2GiB"}) == ({0: gib * GIB}, notes)
    contexts = policies(spec.replace("{limit", "{contexts: 1, limit")).resolve(workload(), (H200,))
    assert tenant_of(contexts, None, (H200,), lambda _: 500 << 20).limits == {0: 0}


def test_fgpu_s_label_precedes_clearml_s_unless_it_is_invalid():
    spec = "{selector: {cgroup: a}, memory: {limit: 8GiB}}"
    both = {"fgpu.dev/memory": "1GiB", "clearml-injector/fraction": "0.03125"}
    assert memory_of(spec, labels=both) == ({0: GIB}, ())
    memory, notes = memory_of(spec, labels={**both, "fgpu.dev/memory": "much"})
    assert (memory, len(notes)) == ({0: 140 * GIB // 32}, 1)


@pytest.mark.parametrize(
    ("own", "image", "gib"),
    [
        ({}, "4GiB", 4),
        ({}, "12GiB", 8),
        ({}, "x", 8),
        ("12GiB", "4GiB", 4),
        ("12GiB", "14GiB", 12),
        ("2GiB", "4GiB", 2),
    ],
)
def test_requests_of_an_image_only_lower_the_limit(own, image, gib):
    spec = "{selector: {cgroup: a}, memory: {limit: 8GiB, max: 16GiB}}"
    labels = {"fgpu.dev/memory": own} if own else {}
    memory, notes = memory_of(spec, labels=labels, image_asks={"fgpu.dev/memory": image})
    assert memory == {0: gib * GIB}
    assert [note.split()[:3] for note in notes] == [["the", "image's", "fgpu.dev/memory"]] * (image == "x")


def test_an_image_s_share_of_time_only_lowers_the_limit():
    for own, image, ratio in (("40%", "20%", 0.2), ("40%", "45%", 0.4), (None, "20%", 0.2), (None, "90%", 0.5)):
        labels = {"fgpu.dev/compute": own} if own else {}
        one = workload(labels=labels, image_asks={"fgpu.dev/compute": image})
        decision = policies("{selector: {cgroup: a}, compute: {limit: 50%}}").resolve(one, [H200])
        assert (decision.limits.compute.limit_ratio, decision.notes) == (ratio, ())


# -- properties of any policies ------------------------------------------------------------------------------------


def made(documents):
    """Return a set of these documents with different names."""
    for number, document in enumerate(documents):
        document["metadata"]["name"] = f"p{number}"
    found, errors = schema.read("p.yaml", kit.as_yaml(*documents))
    assert [str(error) for error in errors] == []
    return PolicySet(tuple(found))


@given(st.lists(kit.documents, max_size=5), kit.workloads, kit.gpus)
def test_no_label_exceeds_what_the_policy_allows(documents, found, gpus):
    limits = (decision := made(documents).resolve(found, gpus)).limits
    if not limits:
        return
    for gpu in gpus:
        if gpu.index in limits.memory:
            memory = decision.policy.memory
            most = max(memory.limit.of(gpu.usable_bytes), memory.most.of(gpu.usable_bytes))
            assert 0 < limits.memory[gpu.index] <= most
            assert bool(memory) == bool(limits.memory)
    if limits.compute:
        assert 0 < limits.compute.limit_ratio <= decision.policy.compute.limit_ratio


@given(st.lists(kit.documents, max_size=5), kit.workloads, kit.gpus)
def test_the_first_match_applies_and_a_repetition_gives_the_same_result(documents, found, gpus):
    whole = made(documents)
    decision = whole.resolve(found, gpus)
    assert decision == whole.resolve(found, gpus) == made(documents).resolve(found, gpus)
    alone = [PolicySet((policy,)).resolve(found, gpus) for policy in whole.policies]
    first = next((at for at, one in enumerate(alone) if one.policy), len(alone))
    assert decision.policy == (whole.policies[first] if first < len(alone) else None)
    assert decision.tried == tuple(one.tried[0] for one in alone[:first])
    if decision.policy:
        assert (decision.limits, decision.notes) == (alone[first].limits, alone[first].notes)


@given(kit.documents, kit.workloads, kit.gpus)
def test_no_label_of_any_value_exceeds_the_policy_s_maximum(document, found, gpus):
    policy = made([document]).policies[0]
    limits = PolicySet((policy,)).resolve(found, gpus).limits
    for gpu in gpus if limits and policy.memory else ():
        most = max(policy.memory.limit.of(gpu.usable_bytes), policy.memory.most.of(gpu.usable_bytes))
        assert 0 < limits.memory.get(gpu.index, 1) <= most
    if limits and policy.compute:
        assert 0 < limits.compute.limit_ratio <= policy.compute.limit_ratio


def test_a_thousand_workloads_are_compared_with_a_hundred_policies_in_five_seconds():
    whole = policies(*[f"{{selector: {{cgroup: ['a/**/b{n}', 'c/*{n}*/d'], image: 'x*y*z{n}'}}}}" for n in range(100)])
    found = [workload(f"/c/x{n % 100}x/d", image="xyzabc") for n in range(1000)]
    begun = time.process_time()
    assert all(len(whole.resolve(one, [H200]).tried) == 100 for one in found)
    assert time.process_time() - begun < 5.0  # it takes 0.2 s; the bound detects an algorithm of a higher order
