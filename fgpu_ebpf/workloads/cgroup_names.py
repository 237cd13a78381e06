"""The meaning of a cgroup's path: the engine that made the cgroup, the container, the pod, the systemd unit.

The module recognizes the names that systemd, Docker, Podman, CRI engines, kubelet and LXC give to cgroups, with the
cgroup drivers systemd and cgroupfs. The functions have no state, do no I/O and run in any thread of the agent, the
gatekeeper and the commands.
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple


class Engine(StrEnum):
    """The program that made a container's cgroup. CRI is an engine of kubelet that only the pod's folder identifies."""

    DOCKER = "docker"
    PODMAN = "podman"
    CONTAINERD = "containerd"
    CRIO = "cri-o"
    CRI = "cri"
    NERDCTL = "nerdctl"
    RUNC = "runc"
    LXC = "lxc"


class CgroupName(NamedTuple):
    """The names in the path of a cgroup.

    Attributes:
        engine: the engine that made the container.
        container: the id of the innermost container around the cgroup.
        pod_uid: kubelet's uid of the innermost pod.
        unit: the innermost service or scope of the host's systemd, not of a systemd in a container of systemd-nspawn.
        inside: whether the cgroup is below the container's own folder, or below the unit's folder if there is no
            container.
        nested: whether the container is inside another container, or is around its pod instead of inside the pod.
        depth: the number of folders from the root to the container's own folder.
        pod_depth: the number of folders from the root to the pod's folder; 0 without a pod, or if the container is
            inside the pod.
    """

    engine: Engine | None = None
    container: str | None = None
    pod_uid: str | None = None
    unit: str | None = None
    inside: bool = False
    nested: bool = False
    depth: int = 0
    pod_depth: int = 0


RUN_FOLDER = "fgpu"  # the folder of the cgroups of `fgpu run`
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
# The names of a container's own folder: scopes of systemd, plain cgroups, and systemd's notation with the driver
# cgroupfs.
_OWN = re.compile(rf"(?P<engine>{'|'.join(map(re.escape, _PREFIXES))})-{_ID}(?:\.scope)?")
_COLONS = re.compile(rf"(?:.*\.slice:)?(?P<engine>[a-z0-9-]{{1,40}}):{_ID}")
_LXC = re.compile(r"lxc\.payload\.(?P<id>[A-Za-z0-9._-]{1,64})")
_BARE = re.compile(_ID)  # a container's name only if an engine made the folder around it
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
UNIT_SUFFIXES = (".service", ".scope")
# The folders that contain several workloads: slices of systemd (see is_folder), folders of engines and of kubelet.
# _ENGINE_UNITS has systemd units of engines. Containers are inside the unit if the cgroup driver is not systemd.
# _SLURM is the scope with all jobs of a node; some packages, such as Debian's, put the node's name into this name.
_FOLDERS = frozenset({*_BARE_PARENTS, "kubepods", "burstable", "besteffort", RUN_FOLDER, "lxc", "machine"})
_ENGINE_UNITS = re.compile(
    r"(?:docker|containerd|crio|cri-docker|podman|buildkit|nerdctl|k3s|k3s-agent|rke2-server|rke2-agent|k0s.*)\.service"
)
_SLURM = re.compile(r"(?:.+_)?slurmstepd\.scope")

# The units of systemd-nspawn and of systemd-machined. The init of such a container makes the units inside these units.
_MACHINE = re.compile(r"systemd-nspawn@.*\.service|machine-.*\.scope")

_Found = tuple[Engine | None, str]


def split(path: str) -> list[str]:
    """Return the names of the folders in a path, without empty names."""
    return [part for part in path.split("/") if part]


def is_monitor(parts: list[str]) -> bool:
    """Return whether the cgroup has an engine's own helper process for a container, such as conmon."""
    around = ["", "", *parts]
    return any(
        _MONITOR.fullmatch(part) or (part == "conmon" and "libpod_parent" in (above, further))
        for further, above, part in zip(around, around[1:], parts, strict=False)
    )


def parse(parts: list[str]) -> CgroupName:
    """Return the names in a path. `parts`: the folders of the path, from the hierarchy's root inwards."""
    containers = [(depth, *found) for depth, found in enumerate(_containers(parts), 1) if found]
    machine = next((depth for depth, part in enumerate(parts, 1) if _MACHINE.fullmatch(part)), len(parts))
    units = [(depth, part) for depth, part in enumerate(parts[:machine], 1) if part.endswith(UNIT_SUFFIXES)]
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
    """Return (engine, container id) for each folder that is a container's own cgroup, and None for other folders."""
    found = [_container(part, above) for above, part in zip(["", *parts], parts, strict=False)]
    for at, part in enumerate(parts[1:], 1):  # a folder in libpod_parent is a pod if it contains a container
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
    """Return whether a folder is a container's own folder. `above` is the name of the folder around that folder."""
    return _container(part, above) is not None


def is_pod(part: str) -> bool:
    """Return whether the folder is a pod's own folder."""
    return _pod_uid(part) is not None


def is_job(above: str) -> bool:
    """Return whether a folder is the cgroup of a job of Slurm. `above` is the name of the folder around that folder."""
    return _SLURM.fullmatch(above) is not None


def is_unit(part: str) -> bool:
    """Return whether the folder is a service or scope of systemd, except units that contain several workloads."""
    return part.endswith(UNIT_SUFFIXES) and not is_folder(part)


def is_folder(part: str) -> bool:
    """Return whether a cgroup of this name contains several workloads, so that its limit is a group's limit."""
    is_slice = part.endswith(".slice") and not is_pod(part)
    return is_slice or part in _FOLDERS or any(unit.fullmatch(part) for unit in (_ENGINE_UNITS, _SLURM))


def _pod_uid(part: str) -> str | None:
    match = _POD.fullmatch(part)
    return match["uid"].replace("_", "-") if match else None
