"""Degree to which the limits of a tenant are enforced: the word that status, metrics, page and explain show.

The snapshot builder applies the rule; all others read the word from its Snapshot. The module does no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from fgpu_ebpf.policy.units import memory_text

_COOPERATES = frozenset({"unprobed", "standalone"})
_OUTSIDE_TURNS = frozenset({"outside_turns", "empty_turns"})  # their memory is limited; their time is not
_KILLED_IN_TIME = frozenset({"no_admission", "no_shim"})  # the kernel sees the call of such a process before it returns


class Enforcement(StrEnum):
    """The words as metrics export them, the strongest first."""

    KERNEL = "kernel"
    COOPERATIVE = "cooperative"
    COUNTED = "counted"
    OBSERVE = "observe"
    NONE = "none"

    @property
    def words(self) -> str:
        """Explanation of the word if a limit may be exceeded; empty if the limit holds."""
        match self:
            case Enforcement.KERNEL:
                return ""
            case Enforcement.COOPERATIVE:
                return "enforced only for allocations that each process requests"
            case Enforcement.COUNTED:
                return "a process is only counted: it does not ask before it allocates and may exceed the limit"
            case Enforcement.OBSERVE:
                return "the policy observes: nothing is refused"
            case Enforcement.NONE:
                return "no limit is in force"


UNHELD = frozenset({Enforcement.COOPERATIVE, Enforcement.COUNTED, Enforcement.NONE})  # unlike OBSERVE, not by request


def enforcement(unenforced: str, observe: bool, kill: bool, bypassing: Iterable[str]) -> Enforcement:
    """Return the word for one tenant. The weakest process decides: one that is only counted can take the whole device.

    Args:
        unenforced: why no limit of the host is in force; empty: limits are in force.
        observe: the tenant's policy only observes.
        kill: `onBypass: kill` is in force.
        bypassing: how the tenant's processes bypass the shim.
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
    """Return what a tenant (of a Snapshot's JSON or a level of `fgpu explain`) is denied; empty: nothing."""
    if not tenant["denied"]:
        return ""
    somewhere = any(device["limit_bytes"] for device in tenant["devices"])
    return f"gets nothing{' on some devices' if somewhere else ''}: {tenant['denied']}"


def excess(device: Mapping[str, Any]) -> str:
    """Return what a tenant has to free on a device of a level of `fgpu explain` to get more; empty: nothing."""
    over = device["excess_bytes"]
    return f"it gets nothing more until it has freed {memory_text(over)}" if over else ""


def sentence(tenant: Mapping[str, Any]) -> str:
    """Return a sentence about a tenant of a Snapshot's JSON if one of its processes is only counted, else empty."""
    if tenant["enforcement"] != Enforcement.COUNTED:
        return ""
    pids = sorted({p["pid"] for p in tenant["processes"] if p["how"] and p["how"] not in _COOPERATES | _OUTSIDE_TURNS})
    which = f" (pid {', '.join(map(str, pids[:5]))}{', ...' if len(pids) > 5 else ''})" if pids else ""
    return f"{tenant['tenant']}: {Enforcement.COUNTED.words}{which}: fgpu explain {tenant['tenant']}"
