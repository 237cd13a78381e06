"""The degree of enforcement of a tenant's limits: the word in `fgpu status`, `fgpu explain`, metrics and web page.

The rule is applied when a Snapshot is built, in the agent's main loop. The commands, the metrics and the web page read
the word from the Snapshot. no_limit() is for the text above all tenants. The commands import this module, and not
`snapshot`, because the import of its data classes takes longer. The module does no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from fgpu_ebpf.policy.units import memory_text

RELEASED = "released devices"  # the name of the check that fails while the agent has released the devices
_COOPERATES = frozenset({"unprobed", "standalone"})
_OUTSIDE_TURNS = frozenset({"outside_turns", "empty_turns"})  # processes with limited memory and unlimited time
_KILLED_IN_TIME = frozenset({"no_admission", "no_shim"})  # a probe runs in the call of such a process, and can kill it


class Enforcement(StrEnum):
    """The words that metrics export, from the strongest enforcement to the weakest."""

    KERNEL = "kernel"
    COOPERATIVE = "cooperative"
    COUNTED = "counted"
    OBSERVE = "observe"
    NONE = "none"

    @property
    def words(self) -> str:
        """An explanation of the enforcement if a limit may be exceeded, or an empty text if the limit holds."""
        match self:
            case Enforcement.KERNEL:
                return ""
            case Enforcement.COOPERATIVE:
                return "the limit holds only for allocations that the programs request from fgpu"
            case Enforcement.COUNTED:
                return "a process is only counted: it allocates without requesting admission and may exceed the limit"
            case Enforcement.OBSERVE:
                return "the policy's mode is observe: nothing is refused"
            case Enforcement.NONE:
                return "no limit is in force"


# OBSERVE is not included, because the policy requests it.
UNHELD = frozenset({Enforcement.COOPERATIVE, Enforcement.COUNTED, Enforcement.NONE})


def enforcement(unenforced: str, observe: bool, kill: bool, bypassing: Iterable[str]) -> Enforcement:
    """Return the word for one tenant.

    The least limited process determines the word, because a process that is only counted can use the whole device.

    Args:
        unenforced: why no limit on the host is in force; an empty text if limits are in force.
        observe: whether the mode of the tenant's policy is `observe`.
        kill: whether `onBypass: kill` is in force.
        bypassing: the ways in which the tenant's processes bypass the shim.
    """
    if unenforced:
        return Enforcement.NONE
    if observe:
        return Enforcement.OBSERVE
    ways = set(bypassing) - _OUTSIDE_TURNS - (_KILLED_IN_TIME if kill else set())
    if ways - _COOPERATES:
        return Enforcement.COUNTED
    return Enforcement.COOPERATIVE if ways else Enforcement.KERNEL


def denial(tenant: Mapping[str, Any]) -> str:
    """Return the text about a denied limit, or an empty text if no limit was denied.

    `tenant`: a tenant in a Snapshot's JSON, or a level of `fgpu explain`.
    """
    if not tenant["denied"]:
        return ""
    limits = [device["limit_bytes"] for device in tenant["devices"]]
    if limits and all(limits):
        return f"the limit is not in force: {tenant['denied']}"
    return f"no memory is admitted{' on some devices' if any(limits) else ''}: {tenant['denied']}"


def excess(device: Mapping[str, Any]) -> str:
    """Return the text about memory above the limit, which blocks further requests, or an empty text.

    `device`: a device of a level of `fgpu explain`.
    """
    over = device["excess_bytes"]
    return f"no more memory is admitted until {memory_text(over)} are freed" if over else ""


def sentence(tenant: Mapping[str, Any]) -> str:
    """Return a sentence about a tenant with a process that is only counted, or an empty text.

    `tenant`: a tenant in a Snapshot's JSON.
    """
    if tenant["enforcement"] != Enforcement.COUNTED:
        return ""
    pids = sorted({p["pid"] for p in tenant["processes"] if p["how"] and p["how"] not in _COOPERATES | _OUTSIDE_TURNS})
    which = f" (pid {', '.join(map(str, pids[:5]))}{', ...' if len(pids) > 5 else ''})" if pids else ""
    return f"{tenant['tenant']}: {Enforcement.COUNTED.words}{which}; see fgpu explain {tenant['tenant']}"


def no_limit(snapshot: Mapping[str, Any]) -> str:
    """Return the warning to show above a Snapshot, which is given as JSON.

    The warning is empty if all limits are in force and the devices are not released.
    """
    if snapshot["unenforced"]:
        return f"No limit is enforced: {snapshot['unenforced']}"
    if released := snapshot.get("lacks", {}).get(RELEASED):
        return f"Released devices: {released[0]}"
    incomplete = snapshot.get("incomplete")  # an agent of an older version does not report `incomplete`
    return f"Some limits may be out of date: {incomplete}" if incomplete else ""
