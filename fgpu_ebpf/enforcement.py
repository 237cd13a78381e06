"""How far the limits of a tenant are enforced: the one word that every surface shows.

Owns: the words and the rule that picks one. Pure. The view calls the rule; all others read the word from its Snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

_ASKS = frozenset({"unprobed", "standalone"})
_OUTSIDE_TURNS = frozenset({"outside_turns", "empty_turns"})  # their memory is held; their time is not
_KILLED_IN_TIME = frozenset({"no_admission", "no_shim"})  # the kernel sees the call of such a process before it returns


class Enforcement(StrEnum):
    """As metrics export it, the strongest first; `words` says what it means where a limit may be exceeded."""

    KERNEL = "kernel"
    COOPERATIVE = "cooperative"
    COUNTED = "counted"
    OBSERVE = "observe"
    NONE = "none"

    @property
    def words(self) -> str:
        """What is so; empty where the limit holds."""
        match self:
            case Enforcement.KERNEL:
                return ""
            case Enforcement.COOPERATIVE:
                return "held as far as each process asks before it allocates"
            case Enforcement.COUNTED:
                return "a process is only counted: it does not ask before it allocates and may exceed the limit"
            case Enforcement.OBSERVE:
                return "the policy observes: nothing is refused"
            case Enforcement.NONE:
                return "no limit is in force"


UNHELD = frozenset({Enforcement.COOPERATIVE, Enforcement.COUNTED, Enforcement.NONE})  # and nothing asked for that


def enforcement(unenforced: str, observe: bool, kill: bool, bypassing: Iterable[str]) -> Enforcement:
    """Of one tenant. `kill`: onBypass: kill is in force; `bypassing`: in which ways its processes go around the shim.

    The weakest counts: one process that is only counted can take all that the device has.
    """
    if unenforced:
        return Enforcement.NONE
    if observe:
        return Enforcement.OBSERVE
    ways = set(bypassing) - _OUTSIDE_TURNS - (_KILLED_IN_TIME if kill else set())
    if ways - _ASKS:
        return Enforcement.COUNTED
    return Enforcement.COOPERATIVE if ways else Enforcement.KERNEL


def denial(tenant: Mapping[str, Any]) -> str:
    """What a tenant lacks, of a Snapshot's JSON or a level of `fgpu explain`; empty: it has what it is to have."""
    if not tenant["denied"]:
        return ""
    somewhere = any(device["limit_bytes"] for device in tenant["devices"])
    return f"gets nothing{' on some devices' if somewhere else ''}: {tenant['denied']}"


def sentence(tenant: Mapping[str, Any]) -> str:
    """Of a tenant of a Snapshot's JSON, where a process is only counted; else empty."""
    if tenant["enforcement"] != Enforcement.COUNTED:
        return ""
    pids = sorted({p["pid"] for p in tenant["processes"] if p["how"] and p["how"] not in _ASKS | _OUTSIDE_TURNS})
    which = f" (pid {', '.join(map(str, pids[:5]))}{', ...' if len(pids) > 5 else ''})" if pids else ""
    return f"{tenant['tenant']}: {Enforcement.COUNTED.words}{which}: fgpu explain {tenant['tenant']}"
