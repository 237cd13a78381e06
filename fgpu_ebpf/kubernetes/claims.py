"""Reader of ResourceClaims: the shares of devices that the scheduler has allocated to a claim on this node.

The functions have no state and do no I/O. A claim is not trusted. Every number is bounded by the device, and text of a
claim is quoted in messages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from fgpu_ebpf.kubernetes.slots import Device, Host
from fgpu_ebpf.policy import share_name
from fgpu_ebpf.policy.share_name import Share
from fgpu_ebpf.policy.units import shown

DRIVER = "gpu.fgpu.dev"
MEMORY, COMPUTE = "memory", "compute"
MIB = 1 << 20
LEAST_MIB, MOST_MIB = 2, 999_999  # of a share: the driver's unit of allocation, and the longest number of a name
_UID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NAME = re.compile(r"[a-z0-9](?:[-.a-z0-9]{0,251}[a-z0-9])?")
_QUANTITY = re.compile(r"(?P<number>[0-9]{1,20}(?:\.[0-9]{1,9})?)(?P<unit>[KMGTPE]i|[numkMGTPE]|[eE][0-9]{1,2}|)")
_UNITS = {"": Fraction(1)} | {unit: Fraction(1000) ** power for power, unit in enumerate("num", -3)}
_UNITS |= {unit: Fraction(1000) ** power for power, unit in enumerate("kMGTPE", 1)}
_UNITS |= {f"{unit}i": Fraction(1024) ** power for power, unit in enumerate("KMGTPE", 1)}


class ClaimError(ValueError):
    """A claim cannot be used on this node. The text is a sentence for the event of the pod."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A device that the scheduler has allocated to a request of a claim, and the share of this device."""

    request: str
    pool: str
    device: str
    share: Share
    share_id: str = ""
    """The id that distinguishes this share from other shares of the device; empty: the whole device was allocated."""


def device_name(uuid: str) -> str:
    """Return the name of a device in the ResourceSlice. Unlike an index, the name does not change at a boot."""
    return uuid.lower()


def path(namespace: str, name: str, uid: str) -> str:
    """Return the path of a claim at the API server. Raise ClaimError if a part is not valid."""
    if not (_NAME.fullmatch(namespace) and _NAME.fullmatch(name) and _UID.fullmatch(uid)):
        raise ClaimError(f"{shown(namespace)}/{shown(name)} with the uid {shown(uid)} is not a ResourceClaim")
    return f"/apis/resource.k8s.io/v1/namespaces/{namespace}/resourceclaims/{name}"


def is_uid(text: str) -> bool:
    """Return whether a text is the UID of an object."""
    return _UID.fullmatch(text) is not None


def quantity(text: str) -> Fraction:
    """Parse a quantity of Kubernetes that is not negative, such as `8Gi`, `1500m` or `2e3`.

    Raise ClaimError on failure.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ClaimError(f"{shown(text)} is not a quantity of 0 or more, such as 8Gi or 30")
    unit = match["unit"]
    return Fraction(match["number"]) * (_UNITS[unit] if unit in _UNITS else 10 ** int(unit[1:]))


def grants(claim: Mapping[str, Any], uid: str, node: str, host: Host) -> list[Grant]:
    """Return the devices of this node that are allocated to a claim.

    Args:
        claim: the ResourceClaim, as the API server returns it.
        uid: the UID that kubelet has for the claim.
        node: the name of this node, which is the name of its pool.
        host: the agent's last answer.

    Raises:
        ClaimError: the claim was replaced by another claim, is not allocated, or has a device that cannot be assigned.
    """
    try:
        found = claim["metadata"]["uid"]
        if found != uid:
            raise ClaimError(f"the ResourceClaim was replaced by another claim with the uid {shown(str(found))}")
        allocation = (claim.get("status") or {}).get("allocation") or {}
        results = [one for one in (allocation.get("devices") or {}).get("results") or () if one.get("driver") == DRIVER]
        if not results:
            raise ClaimError(f"the ResourceClaim has no allocated device of {DRIVER}")
        return [_grant(one, node, host) for one in results]
    except (KeyError, TypeError, AttributeError) as error:
        raise ClaimError(f"the ResourceClaim has an unknown form: {type(error).__name__} {error}") from error


def _grant(result: Mapping[str, Any], node: str, host: Host) -> Grant:
    request, pool, name = (str(result[key]) for key in ("request", "pool", "device"))
    if pool != node:
        raise ClaimError(f"the device {shown(name)} is of the pool {shown(pool)}, which is not this node's pool")
    if result.get("adminAccess"):
        raise ClaimError(f"request {shown(request)} requests admin access, which {DRIVER} does not grant")
    device = next((each for uuid, each in host.devices.items() if device_name(uuid) == name), None)
    if device is None:
        raise ClaimError(f"this node has no device {shown(name)}")
    if device.fault:
        raise ClaimError(f"{device.uuid}: {device.fault}")
    return Grant(request, pool, name, _share(result.get("consumedCapacity"), device), str(result.get("shareID") or ""))


def with_status(namespace: str, name: str, uid: str, granted: Sequence[Grant], now: str) -> dict[str, Any]:
    """Return the fields of a claim's status that this driver owns, as an object for a server-side apply.

    Args:
        namespace: the namespace of the claim.
        name: the name of the claim.
        uid: the UID of the claim. The API server refuses the write if another claim has the name by now.
        granted: the prepared devices of the claim.
        now: the time in the form of RFC 3339.
    """
    head = {"namespace": namespace, "name": name, "uid": uid}
    claim = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": head}
    return claim | {"status": {"devices": [_device_status(grant, now) for grant in granted]}}


def _device_status(grant: Grant, now: str) -> dict[str, Any]:
    share = grant.share
    data = {MEMORY: share.memory} | ({COMPUTE: share.compute} if share.compute else {})
    time = f" and {share.compute} of the device's time" if share.compute else ""
    message = f"each container of this claim gets at most {share.memory}{time}, or less under a policy"
    ready = {"type": "Ready", "status": "True", "reason": "Prepared", "message": message, "lastTransitionTime": now}
    found = {"driver": DRIVER, "pool": grant.pool, "device": grant.device, "conditions": [ready], "data": data}
    return found | ({"shareID": grant.share_id} if grant.share_id else {})


def _share(consumed: Mapping[str, Any] | None, device: Device) -> Share:
    """Return the share of a device. `consumed`: None if the whole device was allocated to this claim."""
    whole = min(device.capacity_bytes // MIB, MOST_MIB)
    if consumed is None:
        return share_name.parse(share_name.bound(f"{whole}mib", device.uuid))
    if MEMORY not in consumed:
        raise ClaimError(f"the ResourceClaim consumes no {MEMORY} of {device.uuid}")
    size = min(quantity(str(consumed[MEMORY])) // MIB, whole)
    if size < LEAST_MIB:
        raise ClaimError(f"the ResourceClaim consumes less than {LEAST_MIB}Mi of {MEMORY} of {device.uuid}")
    percent = min(int(quantity(str(consumed.get(COMPUTE, "0")))), 100)
    ceiling = f"-{percent}pct" if percent else ""  # 0: no ceiling
    return share_name.parse(share_name.bound(f"{size}mib{ceiling}", device.uuid))
