"""What the name of a cgroup says: the engine that made it, the container, the pod, the unit.

Owns: the folders of systemd, Docker, Podman, CRI engines, kubelet and LXC, with systemd's and the bare driver. Never:
looks at the host. Cannot fail: a path that means nothing has no engine, container, pod or unit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Engine(StrEnum):
    """Who made a container's cgroup. CRI: kubelet's folder around it says that it was an engine that kubelet asks."""

    DOCKER = "docker"
    PODMAN = "podman"
    CONTAINERD = "containerd"
    CRIO = "cri-o"
    CRI = "cri"
    NERDCTL = "nerdctl"
    RUNC = "runc"
    LXC = "lxc"


@dataclass(frozen=True, slots=True)
class CgroupName:
    """`container`: the innermost one around, and how many folders `depth` it is down; `inside`: below its own folder.

    So it is with units, where there is no container, and with containers in containers: somebody in the outer one made
    those. `pod_depth` 0: there is no pod, or it lies around the container.
    """

    engine: Engine | None = None
    container: str | None = None
    pod_uid: str | None = None
    unit: str | None = None
    inside: bool = False
    nested: bool = False
    depth: int = 0
    pod_depth: int = 0


RUN_FOLDER = "fgpu"  # where the cgroups of `fgpu run` are
_ID = r"(?P<id>[0-9a-f]{12,64})"
_PREFIXES = {
    "docker": Engine.DOCKER,
    "libpod": Engine.PODMAN,
    "libpod-payload": Engine.PODMAN,
    "cri-containerd": Engine.CONTAINERD,
    "crio": Engine.CRIO,
    "nerdctl": Engine.NERDCTL,
    "runc": Engine.RUNC,
}
# A folder that is a container's own: of systemd's scopes and of bare cgroups, and systemd's name under the bare driver.
_OWN = re.compile(rf"(?P<engine>{'|'.join(map(re.escape, _PREFIXES))})-{_ID}(?:\.scope)?")
_COLONS = re.compile(rf"(?:.*\.slice:)?(?P<engine>[a-z0-9-]{{1,40}}):{_ID}")
_LXC = re.compile(r"lxc\.payload\.(?P<id>[A-Za-z0-9._-]{1,64})")
_BARE = re.compile(_ID)  # only below a folder that engines make
_BARE_PARENTS = {
    "docker": Engine.DOCKER,
    "buildkit": Engine.DOCKER,
    "podman": Engine.PODMAN,
    "libpod_parent": Engine.PODMAN,
    "nerdctl": Engine.NERDCTL,
}
_BARE_POD = re.compile(r"(?:kubepods[a-z-]*-)?pod[0-9a-f_-]{32,36}")
_MONITOR = re.compile(r"(?:libpod|crio)-conmon-[0-9a-f]{12,64}(?:\.scope)?|lxc\.monitor\..*")
_POD = re.compile(
    r"(?:[a-z-]*kubepods[a-z-]*-)?pod"
    r"(?P<uid>[0-9a-f]{8}(?:[_-]?[0-9a-f]{4}){3}[_-]?[0-9a-f]{12})(?:\.slice.*)?"
)
_UNITS = (".service", ".scope")
# Folders for workloads: systemd's slices, those of engines and of kubelet. Engines whose containers are inside their
# own unit, where the driver of cgroups is not systemd.
_FOLDERS = frozenset({*_BARE_PARENTS, "kubepods", "burstable", "besteffort", RUN_FOLDER, "lxc", "machine"})
_ENGINE_UNITS = re.compile(
    r"(?:docker|containerd|crio|cri-docker|podman|buildkit|nerdctl|k3s|k3s-agent|rke2-server|rke2-agent|k0s.*)\.service"
)

_Found = tuple[Engine | None, str]


def split(path: str) -> list[str]:
    """The folders of a path."""
    return [part for part in path.split("/") if part]


def is_monitor(parts: list[str]) -> bool:
    """The cgroup is that of an engine's own helper beside a container."""
    around = ["", "", *parts]
    return any(
        _MONITOR.fullmatch(part) or (part == "conmon" and "libpod_parent" in (above, further))
        for further, above, part in zip(around, around[1:], parts, strict=False)
    )


def parse(parts: list[str]) -> CgroupName:
    """What these folders say, from the hierarchy's root inwards."""
    containers = [(depth, *found) for depth, found in enumerate(_containers(parts), 1) if found]
    units = [(depth, part) for depth, part in enumerate(parts, 1) if part.endswith(_UNITS)]
    pods = [(depth, uid) for depth, part in enumerate(parts, 1) if (uid := _pod_uid(part))]
    unit_depth, unit = units[-1] if units else (0, None)
    pod_depth, pod_uid = pods[-1] if pods else (0, None)
    if not containers:
        inside = 0 < unit_depth < len(parts)
        return CgroupName(None, None, pod_uid, unit, inside, pod_depth=pod_depth)
    depth, engine, container = containers[-1]
    if engine is None and pod_uid:
        engine = Engine.CRI
    nested = len(containers) > 1 or pod_depth > depth
    pod_depth = pod_depth if pod_depth > depth else 0
    return CgroupName(engine, container, pod_uid, unit, nested or depth < len(parts), nested, depth, pod_depth)


def _containers(parts: list[str]) -> list[_Found | None]:
    """For each folder: the engine and the id of the container whose own it is."""
    found = [_container(part, above) for above, part in zip(["", *parts], parts, strict=False)]
    for at, part in enumerate(parts[1:], 1):  # a folder of Podman's there is a pod, if there is a container in it
        if parts[at - 1] == "libpod_parent" and _BARE.fullmatch(part) and any(found[at + 1 : at + 2]):
            found[at] = None
    return found


def _container(part: str, above: str) -> _Found | None:
    if match := _OWN.fullmatch(part):
        return _PREFIXES[match["engine"]], match["id"]
    if match := _COLONS.fullmatch(part):
        return _PREFIXES.get(match["engine"]), match["id"]
    if match := _LXC.fullmatch(part):
        return Engine.LXC, match["id"]
    if _BARE.fullmatch(part) and (above in _BARE_PARENTS or _BARE_POD.fullmatch(above)):
        return _BARE_PARENTS.get(above), part
    return None


def is_container(part: str, above: str) -> bool:
    """The folder is a container's own; `above` is the one around it."""
    return _container(part, above) is not None


def is_pod(part: str) -> bool:
    """The folder is a pod's own."""
    return _pod_uid(part) is not None


def is_unit(part: str) -> bool:
    """The folder is a service or scope of systemd, and not one that has an engine's containers inside."""
    return part.endswith(_UNITS) and not _ENGINE_UNITS.fullmatch(part)


def is_folder(part: str) -> bool:
    """The folder is for several workloads: a limit on it is their group's."""
    is_slice = part.endswith(".slice") and not is_pod(part)
    return is_slice or part in _FOLDERS or _ENGINE_UNITS.fullmatch(part) is not None


def _pod_uid(part: str) -> str | None:
    match = _POD.fullmatch(part)
    return match["uid"].replace("_", "-") if match else None
