"""The shares of containers in a pod that a policy matches too, for which the pod gets a sufficient limit.

The module runs in the agent's main loop.
"""

from __future__ import annotations

from collections.abc import Iterable

from fgpu_ebpf.policy.rules import Decision, Device, booked
from fgpu_ebpf.policy.share_name import parse
from fgpu_ebpf.tenancy.device_commitments import counts_by_device
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.overrides import Override
from fgpu_ebpf.tenancy.tenant import Source, Tenant
from fgpu_ebpf.tenancy.tenant_tree import below
from fgpu_ebpf.workloads.cgroups import Workloads


def with_shares(
    decision: Decision, overrides: Iterable[Override], workloads: Workloads, devices: Iterable[Device]
) -> Decision:
    """Return a decision whose limits are at least the sum of the shares in a pod, up to the policy's `memory.max`.

    On a device that the pod's claims determine, the limit is unchanged.

    Args:
        decision: the decision about any workload. If the workload is no pod, the decision is returned unchanged.
        overrides: all overrides. Overrides of containers that have ended do not count.
        workloads: the cgroups of the host.
        devices: the host's devices.
    """
    policy, limits, workload = decision.policy, decision.limits, decision.workload
    if not workload.is_pod or policy is None or policy.memory is None or limits is None:
        return decision
    inside = [each for each in overrides if each.share and each.path.startswith(below(workload.path))]
    shares = [
        (each.devices, amount)
        for each in inside
        if (amount := parse(each.share).amount) and workloads.cgroup(each.path) == each.cgroup
    ]
    memory = dict(limits.memory)
    for device in (device for device in devices if device.index in memory):
        if workload.booking and booked(workload.booking, device) is not None:
            continue
        own = (amount for named, amount in shares if not named or device.uuid_text in named)
        total = sum(amount.of(device.usable_bytes) for amount in own)
        memory[device.index] = max(memory[device.index], min(total, policy.memory.most.of(device.usable_bytes)))
    return decision._replace(limits=limits._replace(memory=memory))


def shortage(tenant: Tenant, enforcer: Enforcer) -> str:
    """Commit the limit of the group around a tenant with a share, on the devices of the share.

    Returns:
        Why the group gets less than the shares in the group, or an empty text if the group gets enough or there is no
        group.

    Raises:
        OSError: the limit cannot be written to the kernel's map.
    """
    commitments = enforcer.commitments
    unit = commitments.unit(tenant)
    if unit is None or unit is tenant or counts_by_device(tenant):
        return ""
    inside = [each for each in enforcer if each.source is Source.SHARE and each.path.startswith(below(unit.path))]
    common, undecided = tenant.limits.keys() & unit.limits.keys(), commitments.undecided(unit)
    for index in common:
        needed = min(unit.limits[index], sum(each.limits.get(index, 0) for each in inside))
        is_short = index in undecided or commitments.in_force(unit)[index] < needed
        if is_short and (text := commitments.shortage_on(unit, index)):
            return text
    for index in common & undecided:
        enforcer.use_device(unit.cgroup, index)
    return ""
