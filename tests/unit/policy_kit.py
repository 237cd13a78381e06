"""Policies and workloads for the tests: from given texts, and random ones from hypothesis."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from fgpu_ebpf.policy import schema
from fgpu_ebpf.policy.rules import Policy, PolicySet
from fgpu_ebpf.workloads.workload import Workload

GIB = 1 << 30
HEAD = "apiVersion: fgpu.dev/v1alpha1\nkind: GpuPolicy\n"


@dataclass(frozen=True)
class Gpu:
    index: int
    uuid_text: str = "GPU-1f3a5b00-0000-0000-0000-000000000000"
    name: str = "NVIDIA H200"
    usable_bytes: int = 140 * GIB


def text(name: str = "p", spec: str = "{selector: {cgroup: a}}") -> str:
    """Return one document."""
    return f"---\n{HEAD}metadata: {{name: {name}}}\nspec: {spec}\n"


def read(yaml: str) -> list[Policy]:
    """Return the policies of a valid text."""
    policies, errors = schema.read("p.yaml", yaml.encode())
    assert [str(error) for error in errors] == []
    return policies


def policies(*specs: str) -> PolicySet:
    """Return policies p0, p1, … with these specs."""
    return PolicySet(tuple(read("".join(text(f"p{i}", spec) for i, spec in enumerate(specs)))))


def workload(path: str = "/a", **names: Any) -> Workload:
    return Workload(cgroup=7, path=path, name="w", **names)


# -- valid documents -----------------------------------------------------------------------------------------------

words = st.text("abcxyz019-", min_size=1, max_size=12)
anything = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, blacklist_categories=["Cc"]), max_size=12)
globs = st.text("abc*?.-", min_size=1, max_size=10)
path_globs = st.lists(st.one_of(st.just("**"), globs.filter(lambda g: "**" not in g)), min_size=1, max_size=4).map(
    "/".join
)


def one_or_several(item: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.one_of(item, st.lists(item, min_size=1, max_size=4))


label_keys = st.text("abc.-/", min_size=1, max_size=12)
expressions = st.one_of(
    st.fixed_dictionaries(
        {
            "key": label_keys,
            "operator": st.sampled_from(["In", "NotIn"]),
            "values": st.lists(anything, min_size=1, max_size=3),
        }
    ),
    st.fixed_dictionaries({"key": label_keys, "operator": st.sampled_from(["Exists", "DoesNotExist"])}),
)
selectors = st.fixed_dictionaries(
    {},
    optional={
        "cgroup": one_or_several(path_globs),
        "namespace": one_or_several(globs),
        "image": one_or_several(globs),
        "unit": one_or_several(globs),
        "matchLabels": st.dictionaries(label_keys, anything, min_size=1, max_size=3),
        "matchExpressions": st.lists(expressions, min_size=1, max_size=3),
    },
).filter(bool)
sizes = st.one_of(st.integers(2, 64).map("{}GiB".format), st.integers(1, 100).map("{}%".format), st.just(f"{8 * GIB}B"))
memories = st.one_of(
    st.fixed_dictionaries({"limit": sizes}),
    st.builds(lambda a, b: {"limit": f"{a}GiB", "max": f"{a + b}GiB"}, st.integers(1, 64), st.integers(0, 64)),
    st.builds(lambda a: {"limit": "1GiB", "park": {"after": f"{a}m"}}, st.integers(1, 43_200)),
)
computes = st.fixed_dictionaries(
    {},
    optional={
        "limit": st.integers(1, 100).map("{}%".format),
        "weight": st.integers(1, 10_000),
        "priority": st.sampled_from(["high", "normal", "low"]),
        "quantum": st.integers(1, 1000).map("{}ms".format),
    },
)
devices = st.lists(
    st.one_of(st.integers(0, 15), st.sampled_from(["*", "0", "GPU-1f3a", "*H200*"])), min_size=1, max_size=3
)
specs = st.fixed_dictionaries(
    {"selector": selectors},
    optional={
        "mode": st.sampled_from(["observe", "enforce"]),
        "devices": devices,
        "memory": memories,
        "compute": computes,
        "onBypass": st.sampled_from(["report", "kill"]),
        "views": st.fixed_dictionaries({"utilization": st.sampled_from(["device", "own"])}),
        "metricLabels": st.lists(
            st.text("abc_", min_size=1, max_size=6).filter(lambda t: t[:2] != "__"), max_size=8, unique=True
        ),
    },
)
names = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,20}[a-z0-9])?", fullmatch=True)
documents = st.builds(
    lambda name, spec: {
        "apiVersion": "fgpu.dev/v1alpha1",
        "kind": "GpuPolicy",
        "metadata": {"name": name},
        "spec": spec,
    },
    names,
    specs,
)


def as_yaml(*found: Any) -> bytes:
    """Return the documents as YAML text (JSON is YAML)."""
    return "".join(f"--- {json.dumps(document, ensure_ascii=False)}\n" for document in found).encode()


asking = st.sampled_from(["fgpu.dev/memory", "fgpu.dev/compute", "clearml-injector/fraction"])
fractions = st.floats(0, 4).map("{:.3f}".format)
workloads = st.builds(
    Workload,
    cgroup=st.just(7),
    path=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4).map(lambda parts: "/" + "/".join(parts)),
    name=st.just("w"),
    unit=st.none() | st.text("abc.", max_size=6),
    namespace=st.none() | st.text("abc", max_size=6),
    image=st.none() | st.text("abc/", max_size=6),
    labels=st.dictionaries(label_keys | asking, anything | sizes.map(str) | fractions, max_size=4),
    image_asks=st.dictionaries(asking, anything | sizes.map(str) | fractions, max_size=2),
    inside=st.booleans(),
)
gpus = st.lists(
    st.builds(Gpu, st.integers(0, 15), usable_bytes=st.integers(1, 1 << 40)), max_size=4, unique_by=lambda g: g.index
)
