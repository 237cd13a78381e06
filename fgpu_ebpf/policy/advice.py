"""Warnings about valid policies: patterns that match nothing, and devices with an unexpected meaning.

The module runs in `fgpu policy check`, does no I/O, and uses no property of the host, so that each warning holds on
every host.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from fgpu_ebpf.policy.rules import DeviceChoice, Policy
from fgpu_ebpf.workloads.cgroup_names import UNIT_SUFFIXES

_MOUNT = "sys/fs/cgroup"
UNPARKED = "memory.park: has no effect while parking is off: set `parking: on` in agent.yaml, and restart the agent"
_INDEX = re.compile(r"(?:/dev/)?(?:gpu|cuda|nvidia|device)[ :_-]?([0-9]{1,2})", re.IGNORECASE)


def warnings(policy: Policy) -> Iterator[str]:
    """Yield a warning for each pattern that cannot match, and for each device that is written like an index.

    A warning is one line with the key and a suggested correction.
    """
    selector = policy.selector
    for text in selector.cgroup.texts if selector.cgroup else ():
        path = text.strip("/")
        if path == _MOUNT or path.startswith(f"{_MOUNT}/"):
            better = path.removeprefix(_MOUNT).strip("/") or "**"
            yield f"selector.cgroup: {text!r} matches nothing: paths begin below /{_MOUNT}: did you mean {better!r}?"
    for text in selector.unit.texts if selector.unit else ():
        if not _may_be_unit(text):
            kinds = " or ".join(UNIT_SUFFIXES)
            yield f"selector.unit: {text!r} matches nothing: the name of a unit ends with {kinds} and has no slash"
    for text in selector.namespace.texts if selector.namespace else ():
        if "/" in text:
            yield f"selector.namespace: {text!r} matches nothing: the name of a namespace has no slash"
    for text in selector.image.texts if selector.image else ():
        if text.endswith("/"):
            yield f"selector.image: {text!r} matches nothing: the name of an image does not end with a slash"
    yield from (said for device in policy.devices if (said := _of_device(device)))


def wants_parking(policy: Policy) -> bool:
    """Return whether a policy parks idle workloads, which agent.yaml has to permit."""
    return bool(policy.memory and policy.memory.park.after_ns)


def _may_be_unit(text: str) -> bool:
    """Return whether a pattern can match the name of a service or scope.

    The pattern must have no slash, and the pattern's end after the last wildcard must fit a suffix of the names of
    services or scopes.
    """
    end = re.split(r"[*?]", text)[-1]
    return "/" not in text and any(end.endswith(suffix) or suffix.endswith(end) for suffix in UNIT_SUFFIXES)


def _of_device(device: DeviceChoice) -> str:
    index = _INDEX.fullmatch(device.text)
    if not index:
        return ""
    what = "the beginning of a UUID" if device.uuid else "the name of a model"
    return f"devices: {device.text!r} is read as {what}, not as an index: did you mean {int(index[1])}?"
