"""Fuzzing of policy files: each file gives valid policies for any workload, or errors that a person can read."""

from __future__ import annotations

from dataclasses import dataclass

from fgpu_ebpf.policy import schema
from fgpu_ebpf.policy.rules import PolicySet
from fgpu_ebpf.workloads.workload import Workload

WORDS = (
    *(b"apiVersion: fgpu.dev/v1alpha1\n", b"kind: GpuPolicy\n", b"metadata:", b"name:", b"spec:", b"selector:"),
    *(b"cgroup:", b"namespace:", b"image:", b"unit:", b"matchLabels:", b"matchExpressions:", b"key:", b"operator:"),
    *(b"In", b"Exists", b"values:", b"devices:", b"memory:", b"limit:", b"max:", b"compute:", b"weight:", b"priority:"),
    *(b"quantum:", b"onBypass:", b"kill", b"views:", b"utilization:", b"metricLabels:", b"mode:", b"enforce", b"own"),
    *(b"8GiB", b"50%", b"20ms", b"[", b"]", b"{", b"}", b", ", b"- ", b"&a ", b"*a", b"!!int ", b"---\n", b"**", b"'"),
)  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    index: int = 0
    uuid_text: str = "GPU-1f3a5b00-0000-0000-0000-000000000000"
    name: str = "NVIDIA H200"
    usable_bytes: int = 140 << 30


WORKLOADS = (
    Workload(cgroup=7, path="/a", name="w"),
    Workload(cgroup=7, path="/system.slice/docker-1f3a.scope", name="w", unit="jupyter-1.service", namespace="dev",
             image="registry.example/a", labels={"tier": "notebook", "fgpu.dev/memory": "8GiB"}),
)  # fmt: skip


class Fuzzer:
    """A fuzzer of one file."""

    def __call__(self, data: bytes) -> None:
        policies, errors = schema.read("p.yaml", data)
        assert not (policies and errors)
        lines = len(data.decode(errors="replace").splitlines()) + data.count(b"\r") + 2
        for error in errors:
            said = str(error)
            assert 0 <= error.line <= lines, said
            assert said.isprintable(), said
            assert len(said) < 1000, said
        for workload in WORKLOADS:
            PolicySet(tuple(policies)).resolve(workload, [Gpu()])

    def close(self) -> None:
        """Do nothing: it holds no resources."""
