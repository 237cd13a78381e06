"""The document `kind: GpuPolicy`: the keys, the permitted values, the JSON Schema, and the reading of a file.

The module runs in the thread that reads policy files, and in `fgpu policy schema`. The module imports pydantic.
Therefore the module is imported only if there is a file to read. A key without a value is an error and does not mean
the default, because the author may have forgotten the value. A file with an error gives no policy at all.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from fgpu_ebpf.policy import rules, selector
from fgpu_ebpf.policy.fields import (
    Bytes,
    Ceiling,
    Devices,
    IdleTime,
    Images,
    LabelKey,
    Limit,
    MetricLabels,
    Model,
    Names,
    Paths,
    PolicyName,
    Quantum,
    Several,
    Size,
    WaitTime,
    absent,
)
from fgpu_ebpf.policy.globs import name_globs, path_globs
from fgpu_ebpf.policy.units import amount_text
from fgpu_ebpf.policy.validation import config_errors
from fgpu_ebpf.policy.yaml_document import MOST_ERRORS, ConfigError, Document, InvalidFileError, documents

_EXAMPLE = {"cgroup": ["system.slice/docker-*.scope"]}
_USUAL = rules.Compute()
_EVERY_DEVICE = rules.DeviceChoice("*", model=name_globs(["*"]))


class Metadata(Model):
    """The name of the policy."""

    name: PolicyName = Field(description="The name, unique over all files.", examples=["notebooks"])


class MatchExpression(Model):
    """A test of one label. A missing label passes every `NotIn` test."""

    key: LabelKey = Field(description="The label's name.", examples=["tier"])
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(
        description="`NotIn` also matches if the label is absent."
    )
    values: Annotated[list[str], Several] = absent("Values of the label; only for `In` and `NotIn`.", ["a", "b"])

    @model_validator(mode="after")
    def _has_values(self) -> Self:
        needed = self.operator in ("In", "NotIn")
        if needed and not self.values:
            raise ValueError(f"{self.operator} needs values: write values: [a, b]")
        if not needed and self.values:
            raise ValueError(f"{self.operator} takes no values: leave the values out, or write In")
        return self


class Selector(Model):
    """The workloads that the policy selects. All keys must match. A list of patterns matches if one item matches."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    cgroup: Paths = absent(
        "The cgroup's path below the hierarchy's root: `*` and `?` match inside one name, `**` matches any folders.",
        "system.slice/docker-*.scope",
        "kubepods.slice/**/cri-containerd-*.scope",
    )
    namespace: Names = absent("The pod's namespace.", "team-*")
    image: Images = absent("The container's image; `*` also matches `/`.", "registry.example/*")
    unit: Names = absent("The innermost systemd service or scope, with systemd's escapes.", "jupyter-*.service")
    match_labels: Annotated[dict[LabelKey, str], Several] = absent(
        "Labels, all of which must match.", {"tier": "notebook"}
    )
    match_expressions: Annotated[list[MatchExpression], Several] = absent(
        "Conditions on labels, all of which must match."
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("is empty and would match every cgroup: write a key, or cgroup: ['**'] for every cgroup")
        return self


class Park(Model):
    """Rules for parking the workload, and the longest wait for other workloads.

    Requires `parking: on` in agent.yaml.
    """

    after: IdleTime = Field(
        description="The workload is parked when it has been idle for this time, from 10s to 720h. The next call of"
        " the driver wakes the workload.",
        examples=["10m"],
    )
    host_memory: Size = absent(
        "The most device memory that is copied to the host for the workload. A workload that holds"
        " more is not parked, not even by `fgpu park`.",
        "64GiB",
    )
    deadline: WaitTime = absent(
        "With `overcommit: park` in agent.yaml: how long a request of the workload waits on a full device while other"
        " workloads are parked for the request, from 1s to 2m; the default is 2m. After this time the program gets an"
        " out-of-memory error.",
        "30s",
    )


class Memory(Model):
    """The limit on each device, and the most that the workload's own label fgpu.dev/memory may request."""

    limit: Limit = Field(
        description="The largest amount of memory on each device. A percentage is a part of the memory for tenants,"
        " rounded down to 2 MiB. `0` gives no memory, and no `contexts` either.",
        examples=["8GiB", "50%", 0],
    )
    max: Bytes = absent("The most that the workload's own label may request; the default is `limit`.", "16GiB")
    contexts: Annotated[int, Field(ge=0, le=64)] = Field(
        0,
        description="How many CUDA contexts (one for each process) the workload may have on each device besides the"
        " limit. The limit that programs read does not include these contexts, which count against the device.",
    )
    park: Park = absent(
        "When an idle workload is parked automatically; if absent, only `fgpu park` parks the workload. With"
        " `overcommit: park` in agent.yaml the workload is also parked after 10 s without work, if another workload"
        " needs the room."
    )

    @model_validator(mode="after")
    def _max_is_not_less(self) -> Self:
        most, limit = self.max or self.limit, self.limit
        less = most.bytes < limit.bytes or most.millionths < limit.millionths
        if less and bool(most.bytes) == bool(limit.bytes):
            sizes = f"max {amount_text(most)} is less than limit {amount_text(limit)}"
            raise ValueError(f"{sizes}: raise max, or leave max out")
        return self


class Compute(Model):
    """The share of a device's time. Without a share, the workload is not gated."""

    limit: Ceiling = absent(
        "The largest part of a device's time, even if the device is idle; without this field, there is no ceiling.",
        "50%",
    )
    weight: Annotated[int, Field(ge=1, le=10_000)] = Field(
        100, description="A tenant's part of contended time, relative to the weights of other tenants."
    )
    priority: Literal["high", "normal", "low"] = Field(
        "normal",
        description="A tenant of higher priority gets its turn first, and ends the turn of a tenant of lower priority.",
    )
    quantum: Quantum = absent(
        "The length of a turn, from 1ms to 1s. Turns among tenants that never pause are up to twice as long. Default:"
        f" {_USUAL.quantum_ns // 1_000_000}ms.",
        "5ms",
    )
    isolation: Literal["shared", "own"] = Field(
        "shared",
        description="On a concurrent device: programs use MPS with other tenants' programs (`shared`), or run without"
        " MPS, so that a fatal fault of another program does not end these programs (`own`).",
    )


class Views(Model):
    """The views of a device that the workload gets."""

    utilization: Literal["device", "own"] = Field(
        "device",
        description="The utilization that programs read: of the whole GPU (`device`) or of the workload alone (`own`).",
    )


class Spec(Model):
    """The workloads that the policy selects, and their limits."""

    mode: Literal["observe", "enforce"] = Field(
        "enforce",
        description="`observe` admits every request, counts the requests that `enforce` would have refused, and does"
        " not reduce the memory size that programs read.",
    )
    selector: Selector = Field(description="The workloads that the policy selects.", examples=[_EXAMPLE])
    devices: Devices = absent(
        "Indices, UUIDs or their beginnings, or models; absent: every device.", [0], "GPU-1f3a", "*H200*"
    )
    memory: Memory = absent(
        "The limit of memory; without this field, the workload has no limit, and the memory is only counted."
    )
    compute: Compute = absent("The share of time; without this field, the workload takes no turns.")
    on_bypass: Literal["report", "kill", "deny"] = Field(
        "report",
        description="The action for a process that bypasses the shim: `kill` kills the process if the limit would be"
        " exceeded, and is not applied while a process that is older than fgpu is in the tenant; `deny` refuses the"
        " driver's device nodes to a process without the shim.",
    )
    views: Views = absent("The figures that programs of the workload read.")
    metric_labels: MetricLabels = absent("Labels of the workload to add to the metric `fgpu_tenant_info`.", ["team"])


class GpuPolicy(Model):
    """One policy. The first policy with a selector that matches a workload decides."""

    api_version: Literal["fgpu.dev/v1alpha1"] = Field(description="The version of this format.")
    kind: Literal["GpuPolicy"] = Field(description="The type of the document, always `GpuPolicy`.")
    metadata: Metadata = Field(description="The name of the policy.")
    spec: Spec = Field(
        description="The workloads that the policy selects, and their limits.", examples=[{"selector": _EXAMPLE}]
    )


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of one document, for editors.

    The schema does not contain the rules that relate two values.
    """
    schema = GpuPolicy.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


# -- document -> policy --------------------------------------------------------------------------------------------


def compiled(document: GpuPolicy, source: str) -> rules.Policy:
    """Return the policy that a valid document describes. `source`: the file and line of the document."""
    spec = document.spec
    return rules.Policy(
        name=document.metadata.name,
        source=source,
        selector=_selector(spec.selector),
        devices=tuple(spec.devices or [_EVERY_DEVICE]),
        memory=_memory(spec.memory) if spec.memory else None,
        compute=_compute(spec.compute) if spec.compute else None,
        observe=spec.mode == "observe",
        kill=spec.on_bypass == "kill",
        deny=spec.on_bypass == "deny",
        own_utilization=spec.views is not None and spec.views.utilization == "own",
        metric_labels=tuple(spec.metric_labels or ()),
    )


def _memory(model: Memory) -> rules.Memory:
    its = model.park
    park = rules.Park(its.after, its.host_memory or 0, its.deadline or 0) if its else rules.NEVER_PARKED
    return rules.Memory(model.limit, model.max or model.limit, model.contexts, park)


def _selector(model: Selector) -> selector.Selector:
    tests = [
        selector.LabelTest(k, selector.Operator.IN, frozenset((v,))) for k, v in (model.match_labels or {}).items()
    ]
    for e in model.match_expressions or ():
        tests.append(selector.LabelTest(e.key, selector.Operator(e.operator), frozenset(e.values or ())))
    return selector.Selector(
        cgroup=path_globs(model.cgroup) if model.cgroup else None,
        namespace=name_globs(model.namespace) if model.namespace else None,
        image=name_globs(model.image, forbidden="{}") if model.image else None,
        unit=name_globs(model.unit) if model.unit else None,
        labels=tuple(tests),
    )


def _compute(model: Compute) -> rules.Compute:
    return rules.Compute(
        limit_ratio=model.limit or _USUAL.limit_ratio,
        weight=model.weight,
        priority=rules.Priority(model.priority),
        quantum_ns=model.quantum or _USUAL.quantum_ns,
        isolated=model.isolation == "own",
    )


# -- file -> policies ----------------------------------------------------------------------------------------------


def read(file: str, data: bytes) -> tuple[list[rules.Policy], list[ConfigError]]:
    """Return the policies of a file in the order of the documents, and the errors. At least one list is empty."""
    policies: list[rules.Policy] = []
    wrong: list[ConfigError] = []
    try:
        for document in documents(file, data):
            _read_document(file, document, policies, wrong)
            if len(wrong) >= MOST_ERRORS:
                break
    except InvalidFileError as invalid:
        wrong.append(invalid.error)
    return ([] if wrong else policies), wrong[:MOST_ERRORS]


def _read_document(file: str, document: Document, policies: list[rules.Policy], wrong: list[ConfigError]) -> None:
    line = document.line(())
    if not isinstance(document.value, dict):
        wrong.append(ConfigError(file, line, "", "is not a policy: write apiVersion, kind, metadata and spec"))
        return
    try:
        policies.append(compiled(GpuPolicy.model_validate(document.value), f"{file}:{line}"))
    except ValidationError as error:
        wrong += config_errors(file, document, GpuPolicy, error)
