"""Device nodes of the NVIDIA driver: their major numbers on this host, and their names.

This module runs in the agent's main thread. Only the major number of nvidiactl and nvidia0 is fixed. The kernel chooses
the other major numbers when a module of the driver is loaded.
"""

from __future__ import annotations

from pathlib import Path

DEVICES = Path("/proc/devices")
FRONTEND = 195  # nvidiactl, nvidia-modeset and nvidia0 to nvidia253
_CONTROL, _MODESET = 255, 254  # minor numbers
_PREFIX = "nvidia"


def majors() -> dict[int, str]:
    """Return the major numbers of the driver's character devices, with the names in /proc/devices."""
    found = {FRONTEND: _PREFIX}
    text = DEVICES.read_text(encoding="ascii", errors="replace").partition("Block devices:")[0]
    for line in text.splitlines():
        number, _, name = line.strip().partition(" ")
        if number.isdigit() and name.startswith(_PREFIX):
            found[int(number)] = name
    return found


def name(major: int, minor: int) -> str:
    """Return the usual name of a node below /dev, for example `nvidia0`; `195:7` style for an unknown node."""
    if major == FRONTEND:
        return {_CONTROL: "nvidiactl", _MODESET: "nvidia-modeset"}.get(minor, f"{_PREFIX}{minor}")
    return majors().get(major, f"{major}:{minor}")
