"""The texts about parked tenants. The functions do no I/O, and run in commands and in the agent's main loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fgpu_ebpf.policy.units import duration_text, memory_text

_WORDS = {
    "checking": "about to be parked",
    "parking": "being parked",
    "parked": "parked",
    "waiting": "parked, and waits to be woken",
    "waking": "being woken",
    "unknown": "in a state that the parker must report",
}


def is_away(parking: Mapping[str, Any] | None) -> bool:
    """Return whether a tenant does not run. `parking`: the tenant's ParkingView as JSON, or None."""
    return parking is not None and parking["state"] in _WORDS


def is_planned(parking: Mapping[str, Any] | None) -> bool:
    """Return whether a tenant has been idle for half of the time after which the policy parks the tenant."""
    if parking is None or parking.get("idle_seconds") is None:  # an older agent reports no idle time
        return False
    return bool(parking["idle_seconds"] * 2 >= parking["after_seconds"])


def plan(parking: Mapping[str, Any]) -> str:
    """Return when a tenant will be parked automatically, or an empty text if no policy parks the tenant."""
    text = ""
    if parking["idle_seconds"] is not None:
        idle, left = duration_text(parking["idle_seconds"]), duration_text(parking["parked_in_seconds"])
        text = f"idle for {idle}, will be parked in {left} if the tenant stays idle"
    return "; ".join(filter(None, (text, parking["refused"] and f"at the last attempt: {parking['refused']}")))


def sentence(parking: Mapping[str, Any], devices: Iterable[Mapping[str, Any]]) -> str:
    """Return the state of a tenant that does not run. `devices`: the tenant's devices, with `parked_bytes`."""
    bytes_ = sum(device["parked_bytes"] for device in devices)
    text = f"{_WORDS[parking['state']]}, for {parking['seconds']:.0f} s"
    text += f", {memory_text(bytes_)} in host memory" if bytes_ else ""
    return f"{text}: {parking['why']}" if parking["why"] else text
