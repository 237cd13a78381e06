"""The document `kind: GpuPolicy`: its keys, what each may hold, and its JSON Schema.

Owns: what a policy file may say, and nothing of how it is read (`policyfile`) or applied (`policy`). Never: fills in
what was left empty by mistake: an empty value is refused. On failure: pydantic's ValidationError.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from fgpu_ebpf import policy
from fgpu_ebpf.globs import name_globs, path_globs
from fgpu_ebpf.policyvalues import (
    Bytes,
    Ceiling,
    Devices,
    Images,
    LabelKey,
    MetricLabels,
    Model,
    Names,
    Paths,
    PolicyName,
    Quantum,
    Several,
    absent,
)
from fgpu_ebpf.quantities import amount_text

_EXAMPLE = {"cgroup": ["system.slice/docker-*.scope"]}
_EVERY_DEVICE = policy.DeviceChoice("*", model=name_globs(["*"]))


class Metadata(Model):
    """What the policy is called."""

    name: PolicyName = Field(examples=["notebooks"])


class MatchExpression(Model):
    """One question about one label; a label that is not there is NotIn everything."""

    key: LabelKey = Field(examples=["tier"])
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: Annotated[list[str], Several] = absent()

    @model_validator(mode="after")
    def _has_values(self) -> Self:
        needed = self.operator in ("In", "NotIn")
        if needed and not self.values:
            raise ValueError(f"{self.operator} needs values: write values: [a, b]")
        if not needed and self.values:
            raise ValueError(f"{self.operator} takes no values: leave them out, or write In")
        return self


class Selector(Model):
    """Whom the policy is for: every key that is written must match, by one item of its list."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    cgroup: Paths = absent()
    namespace: Names = absent()
    image: Images = absent()
    unit: Names = absent()
    match_labels: Annotated[dict[LabelKey, str], Several] = absent()
    match_expressions: Annotated[list[MatchExpression], Several] = absent()

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("is empty and would match every cgroup: name some, or write cgroup: ['**'] if you mean it")
        return self


class Memory(Model):
    """The limit on each device, and how far the workload's own label fgpu.dev/memory may go."""

    limit: Bytes = Field(examples=["8GiB"])
    max: Bytes = absent()

    @model_validator(mode="after")
    def _max_is_not_less(self) -> Self:
        most, limit = self.max or self.limit, self.limit
        less = most.bytes < limit.bytes or most.millionths < limit.millionths
        if less and bool(most.bytes) == bool(limit.bytes):
            sizes = f"max {amount_text(most)} is less than limit {amount_text(limit)}"
            raise ValueError(f"{sizes}: raise max or leave it out")
        return self


class Compute(Model):
    """The share of a device's time; without it the workload is not gated."""

    limit: Ceiling = absent()
    weight: Annotated[int, Field(ge=1, le=10_000)] = 100
    priority: Literal["high", "normal", "low"] = "normal"
    quantum: Quantum = absent()


class Views(Model):
    """What the workload is shown."""

    utilization: Literal["device", "own"] = "device"


class Spec(Model):
    """Whom the policy is for, and what they get."""

    mode: Literal["observe", "enforce"] = "enforce"
    selector: Selector = Field(examples=[_EXAMPLE])
    devices: Devices = absent()
    memory: Memory = absent()
    compute: Compute = absent()
    on_bypass: Literal["report", "kill"] = "report"
    views: Views = absent()
    metric_labels: MetricLabels = absent()


class GpuPolicy(Model):
    """One policy: the first whose selector matches a workload decides."""

    api_version: Literal["fgpu.dev/v1alpha1"]
    kind: Literal["GpuPolicy"]
    metadata: Metadata
    spec: Spec = Field(examples=[{"selector": _EXAMPLE}])


def json_schema() -> dict[str, Any]:
    """The JSON Schema of one document, for editors. What needs two values to judge, it lets pass."""
    schema = GpuPolicy.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


# -- document -> policy --------------------------------------------------------------------------------------------


def compiled(document: GpuPolicy, source: str) -> policy.Policy:
    """The policy that a valid document describes."""
    spec = document.spec
    return policy.Policy(
        name=document.metadata.name,
        source=source,
        selector=_selector(spec.selector),
        devices=tuple(spec.devices or [_EVERY_DEVICE]),
        memory=policy.Memory(spec.memory.limit, spec.memory.max or spec.memory.limit) if spec.memory else None,
        compute=_compute(spec.compute) if spec.compute else None,
        observe=spec.mode == "observe",
        kill=spec.on_bypass == "kill",
        own_utilization=spec.views is not None and spec.views.utilization == "own",
        metric_labels=tuple(spec.metric_labels or ()),
    )


def _selector(model: Selector) -> policy.Selector:
    tests = [policy.LabelTest(k, policy.Operator.IN, frozenset((v,))) for k, v in (model.match_labels or {}).items()]
    for e in model.match_expressions or ():
        tests.append(policy.LabelTest(e.key, policy.Operator(e.operator), frozenset(e.values or ())))
    return policy.Selector(
        cgroup=path_globs(model.cgroup) if model.cgroup else None,
        namespace=name_globs(model.namespace) if model.namespace else None,
        image=name_globs(model.image, forbidden="{}") if model.image else None,
        unit=name_globs(model.unit) if model.unit else None,
        labels=tuple(tests),
    )


def _compute(model: Compute) -> policy.Compute:
    usual = policy.Compute()
    return policy.Compute(
        limit_ratio=model.limit or usual.limit_ratio,
        weight=model.weight,
        priority=policy.Priority(model.priority),
        quantum_ns=model.quantum or usual.quantum_ns,
    )
