"""Texts about tenants that are parked. The functions do no I/O; commands and the agent's main loop use them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fgpu_ebpf.policy.units import memory_text

_WORDS = {
    "checking": "about to be parked",
    "parking": "being parked",
    "parked": "parked",
    "waiting": "parked, and waits to be woken",
    "waking": "being woken",
    "unknown": "in a state that the parker has to find out",
}


def is_away(parking: Mapping[str, Any] | None) -> bool:
    """Return whether a tenant does not run. `parking`: its ParkingView as JSON, or None."""
    return parking is not None and parking["state"] in _WORDS


def sentence(parking: Mapping[str, Any], devices: Iterable[Mapping[str, Any]]) -> str:
    """Return the state of a tenant that does not run. `devices`: its devices, each with `parked_bytes`."""
    bytes_ = sum(device["parked_bytes"] for device in devices)
    text = f"{_WORDS[parking['state']]}, for {parking['seconds']:.0f} s"
    text += f", {memory_text(bytes_)} in host memory" if bytes_ else ""
    return f"{text}: {parking['why']}" if parking["why"] else text
