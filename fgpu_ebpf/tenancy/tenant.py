"""The limits of a workload as a tenant, from the policy and the override. Overrides have precedence.

The module does no I/O and runs in the agent's main loop. `enforcer` decides whether the limits fit.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.level_limits import outside_of, whole_mib
from fgpu_ebpf.policy.rules import NEVER_PARKED, Compute, Decision, Device, Park, Policy, Priority, booked
from fgpu_ebpf.policy.share_name import Share, parse
from fgpu_ebpf.policy.units import Amount
from fgpu_ebpf.scheduling.fair_queue import MILLION
from fgpu_ebpf.scheduling.fair_queue import Share as TimeShare
from fgpu_ebpf.tenancy.overrides import Override
from fgpu_ebpf.workloads.workload import COMPUTE_LABEL, MEMORY_LABEL, NAME_CHARACTERS, Workload, safe_name


class Source(StrEnum):
    """The origin of a limit."""

    POLICY = "policy"
    SET = "set"
    RUN = "run"
    SHARE = "share"
    CLAIM = "claim"  # a claim of a driver other than fgpu's; no policy matches the pod
    KEPT = "kept"  # pinned in the kernel; unknown to the agent whether other limits are wanted


@dataclass(frozen=True, slots=True)
class Tenant:
    """A managed cgroup.

    `limits` has bytes by ledger index, or NO_LIMIT if use is only counted. The tenant may not use a device that is left
    out. `outside` has the part of these limits that is for contexts and that views do not show. `policy` is empty if no
    policy matches. `named_devices` is true if the tenant's devices were named for this tenant alone. In this case the
    limit counts on all these devices from the tenant's first process on.
    """

    workload: Workload
    name: str
    source: Source
    policy: str
    limits: Mapping[int, int]
    observe: bool = False
    kill: bool = False
    compute: Compute | None = None
    own_utilization: bool = False
    metric_labels: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    named_devices: bool = False
    outside: Mapping[int, int] = field(default_factory=dict)
    deny: bool = False
    park: Park = NEVER_PARKED

    @property
    def cgroup(self) -> int:
        """The cgroup's id."""
        return self.workload.cgroup

    @property
    def path(self) -> str:
        """The path of the cgroup from the hierarchy's root."""
        return self.workload.path

    @property
    def flags(self) -> int:
        """The flags for the kernel's map of limits."""
        observe = abi.LimitFlag.OBSERVE if self.observe else 0
        kill = abi.LimitFlag.KILL if self.kill else 0
        return observe | kill | (abi.LimitFlag.DENY if self.deny and not self.observe else 0)

    @property
    def shares(self) -> Mapping[int, TimeShare]:
        """The shares of time by ledger index; empty if the tenant is not gated."""
        if self.compute is None or self.observe:
            return {}
        c = self.compute
        rank = list(Priority).index(c.priority)
        share = TimeShare(round(c.limit_ratio * MILLION), c.weight, rank, c.quantum_ns, c.isolated)
        return dict.fromkeys(self.limits, share)

    @property
    def by_hand(self) -> bool:
        """True if the limits were set for this cgroup alone."""
        return self.source not in (Source.POLICY, Source.CLAIM, Source.KEPT)

    def is_in_force_as(self, other: Tenant) -> bool:
        """Return True if both tenants result in the same entries in the kernel's maps."""
        mine = self.limits, self.outside, self.flags
        return mine == (other.limits, other.outside, other.flags) and self.shares == other.shares


def tenant_of(
    decision: Decision, override: Override | None, devices: Sequence[Device], context_bytes: Callable[[int], int]
) -> Tenant | None:
    """Return the tenant of a workload, or None if the workload is not managed.

    An override has precedence over the policy. The policy's mode and the number of contexts besides the limit are
    unchanged. `context_bytes`: the size of a context by ledger index.
    """
    limits, workload = decision.limits, decision.workload
    booking = workload.booking if workload.is_pod else None  # the pod's limit holds for all containers of the pod
    if limits is None and booking is None and override is None:
        return None
    tenant = Tenant(workload, _name(workload), Source.POLICY, "", {})
    if limits:
        tenant = replace(
            tenant,
            policy=limits.policy,
            limits={index: limits.memory.get(index, abi.NO_LIMIT) for index in limits.devices},
            observe=limits.observe,
            kill=limits.kill,
            deny=limits.deny,
            compute=limits.compute,
            own_utilization=limits.own_utilization,
            metric_labels={label: workload.labels.get(label, "") for label in limits.metric_labels},
            notes=decision.notes,
            park=limits.park,
        )
    elif booking:
        sizes = {device.index: booked(booking, device) for device in devices}
        limited = {index: abi.NO_LIMIT if size is None else size for index, size in sizes.items()}
        tenant = replace(tenant, source=Source.CLAIM, limits=limited, named_devices=True)
    if override is not None:
        tenant = _by_hand(tenant, override, devices)
    return _with_contexts(tenant, limits.contexts, context_bytes) if limits and limits.contexts else tenant


def with_labels(tenant: Tenant, names: Iterable[str]) -> Tenant:
    """Return a tenant whose metrics have these labels of the workload too."""
    labels = {name: tenant.workload.labels.get(name, "") for name in names}
    return replace(tenant, metric_labels={**tenant.metric_labels, **labels}) if labels else tenant


def _with_contexts(tenant: Tenant, contexts: int, context_bytes: Callable[[int], int]) -> Tenant:
    """Raise each limit by the size of these contexts. A limit of 0, which denies the device, is unchanged."""
    limited = [index for index, limit in tenant.limits.items() if limit not in (0, abi.NO_LIMIT)]
    outside = {index: whole_mib(contexts * context_bytes(index)) for index in limited}
    limits = {index: limit + outside.get(index, 0) for index, limit in tenant.limits.items()}
    return replace(tenant, limits=limits, outside=outside)


def kept_tenant(
    workload: Workload, limits: Mapping[int, int], flags: Mapping[int, int], share: TimeShare | None
) -> Tenant:
    """Return a tenant with the limits, flags and share that the kernel has pinned for a cgroup.

    Args:
        workload: the cgroup.
        limits: bytes by ledger index.
        flags: the flags of the limits by ledger index.
        share: the share of time, or None if the tenant is not gated.
    """
    said = functools.reduce(operator.or_, flags.values(), 0)
    compute = None
    if share:
        priority = list(Priority)[min(share.rank, len(Priority) - 1)]
        ratio = share.limit_millionths / MILLION
        compute = Compute(ratio, share.weight, priority, share.quantum_ns, isolated=share.isolated)
    return Tenant(
        workload, _name(workload), Source.KEPT, "", limits, compute=compute,
        observe=bool(said & abi.LimitFlag.OBSERVE), kill=bool(said & abi.LimitFlag.KILL),
        outside={index: bytes_ for index, its in flags.items() if (bytes_ := outside_of(its))},
        deny=bool(said & abi.LimitFlag.DENY),
    )  # fmt: skip


def _by_hand(tenant: Tenant, override: Override, devices: Sequence[Device]) -> Tenant:
    """Apply the set fields of an override.

    A field that is not set has the value of the share, or else of the policy.
    """
    tenant = replace(tenant, named_devices=bool(override.devices))
    if override.share:
        tenant = _by_share(tenant, parse(override.share), override.devices, devices)
        if not override.has_limits:
            return tenant
    chosen = tenant.limits if _is_chosen(tenant) else dict.fromkeys((d.index for d in devices), abi.NO_LIMIT)
    named = {d.index for d in devices if d.uuid_text in override.devices or not override.devices}
    chosen = {index: limit for index, limit in chosen.items() if index in named}
    limits = _memory_by_hand(chosen, override.memory, devices)
    return replace(
        tenant,
        name=override.name or tenant.name,
        source=Source.RUN if override.own else Source.SET,
        limits=limits,
        compute=_compute_by_hand(tenant.compute, override),
        notes=() if limits else tenant.notes,
    )


def _memory_by_hand(limits: Mapping[int, int], memory: Amount | None, devices: Iterable[Device]) -> Mapping[int, int]:
    """Replace the limit on each device that the tenant may use, or keep the limits if `memory` is None."""
    if memory is None:
        return limits
    return {device.index: memory.of(device.usable_bytes) for device in devices if device.index in limits}


def _is_chosen(tenant: Tenant) -> bool:
    """Return True if a policy, a share or a claim determines the tenant's devices, even if no device is allowed."""
    return bool(tenant.policy) or tenant.source in (Source.SHARE, Source.CLAIM)


def requests(share: Share, policy: Policy) -> dict[str, str]:
    """Return the requests of a share as labels, only for memory or compute that the policy limits too."""
    memory = {MEMORY_LABEL: share.memory} if share.memory and policy.memory else {}
    compute = {COMPUTE_LABEL: share.compute} if share.compute and policy.compute else {}
    return memory | compute


def _by_share(tenant: Tenant, share: Share, of: Sequence[str], devices: Iterable[Device]) -> Tenant:
    """Apply the limits of a share that the policy does not set. `tenant` has the limits that share and policy set.

    Args:
        tenant: the tenant by its policy, which was resolved with the labels of requests().
        share: the share.
        of: the UUIDs of the permitted devices, or empty for any device.
        devices: the host's devices.
    """
    limits = dict(tenant.limits if tenant.policy else {device.index: abi.NO_LIMIT for device in devices})
    for device in devices:
        if share.amount and limits.get(device.index) == abi.NO_LIMIT:
            limits[device.index] = share.amount.of(device.usable_bytes)
        if of and device.uuid_text not in of:
            limits.pop(device.index, None)
    compute = tenant.compute
    if compute is None and share.limit_millionths:
        compute = Compute(limit_ratio=share.limit_millionths / MILLION)
    return replace(tenant, source=Source.SHARE, limits=limits, compute=compute)


def _compute_by_hand(compute: Compute | None, override: Override) -> Compute | None:
    if not override.has_compute:
        return compute
    compute = compute or Compute()
    if override.limit_millionths is not None:
        compute = compute._replace(limit_ratio=override.limit_millionths / MILLION)
    if override.weight is not None:
        compute = compute._replace(weight=override.weight)
    if override.priority:
        named = f"priority class: {override.priority_class}" if override.priority_class else ""
        compute = compute._replace(priority=Priority(override.priority), priority_by=named)
    return compute


def _name(workload: Workload) -> str:
    """Return `namespace/pod/container` or `namespace/pod` for a known pod, else the name of the container or cgroup."""
    if workload.pod:
        own = [workload.name] if workload.container else []
        parts = (workload.namespace or "default", workload.pod, *own)
        return "/".join(map(safe_name, parts))[:NAME_CHARACTERS]
    return workload.name
