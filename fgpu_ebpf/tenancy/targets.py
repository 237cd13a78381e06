"""The conversion of a command's TARGET to the path of a cgroup.

The forms of a target are: a tenant's name, a container's id or its beginning, pod/NS/NAME, unit/NAME, /cgroup/path,
pid/N. An ambiguous target raises TargetError with the cgroups that match. The module runs in the agent's main loop.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from fgpu_ebpf.linux import procfs
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.tenant import Tenant
from fgpu_ebpf.workloads.cgroups import TargetError, Workloads
from fgpu_ebpf.workloads.workload import Workload

SHORTEST_ID = 4
_PID = re.compile(r"pid/([0-9]{1,10})")
_PAYLOADS = ("container", "payload")  # cgroups of crun for the processes, inside the container's own cgroup


def find(target: str, enforcer: Enforcer, workloads: Workloads) -> str:
    """Return the path of the target's cgroup. Tenants have precedence over other cgroups.

    Raise TargetError on failure.
    """
    if target.startswith("/"):
        workloads.folder(target)
        return "/" + "/".join(part for part in target.split("/") if part)
    if pid := _PID.fullmatch(target):
        path = procfs.cgroup_path(int(pid[1]))
        if path is None:
            raise TargetError(f"no process {pid[1]}")
        return path
    tenant = enforcer.named(target)
    if tenant:
        return tenant.path
    found = _search(target, workloads)
    if not found:
        forms = "a tenant of `fgpu status`, a container, pod/NS/NAME, unit/NAME, /cgroup/path or pid/N"
        raise TargetError(f"no tenant {target!r}: name {forms}")
    if len(found) > 1:
        raise TargetError(f"{target!r} is ambiguous ({', '.join(sorted(found)[:4])}): name one of these cgroups")
    return found[0]


def tenant(path: str, enforcer: Enforcer) -> Tenant:
    """Return the innermost tenant that contains a cgroup. Raise TargetError if there is no tenant."""
    cgroup = next(iter(enforcer.levels(path)), None)
    found = None if cgroup is None else enforcer.get(cgroup)
    if found is None:
        raise TargetError(f"{path} is in no tenant and has no limit")
    return found


def starting(pid: object, engine: int, workloads: Workloads) -> str:
    """Return the path of the cgroup of a container that an engine is starting.

    Args:
        pid: the container's first process.
        engine: the process of the engine's hook.
        workloads: the cgroup hierarchy.

    Raises:
        TargetError: the container has no cgroup of its own, or the engine is in another pid namespace.
    """
    if not isinstance(pid, int) or isinstance(pid, bool):
        raise TargetError("the request contains no pid of the container")
    path, around = procfs.cgroup_path(pid), procfs.cgroup_path(engine)
    if path is None or not _same_pids(engine):
        raise TargetError(f"no process {pid}, or the engine runs in another pid namespace: use a policy")
    if path == "/" or path == around:
        raise TargetError(
            "the container has no cgroup (version 2) of its own: configure the engine to create such a cgroup"
        )
    outer, _, last = path.rpartition("/")
    inner = workloads.identify(path)
    above = workloads.identify(outer) if last in _PAYLOADS else None
    return outer if inner and above and above.container and above.container == inner.container else path


def _same_pids(pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino == os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return False


def _search(target: str, workloads: Workloads) -> list[str]:
    """Return the outermost cgroups of every workload that matches the target."""
    matches = _matcher(target)
    found: list[str] = []
    for path in workloads.walk():
        workload = workloads.identify(path)
        if workload and matches(workload) and not any(path.startswith(outer + "/") for outer in found):
            found.append(path)
    return found


def _matcher(target: str) -> Callable[[Workload], bool]:
    kind, _, name = target.partition("/")
    if kind == "unit" and name:
        return lambda workload: workload.unit == name and not workload.inside
    if kind == "pod" and name:
        return lambda workload: f"{workload.namespace}/{workload.pod}" == name or workload.pod_uid == name
    return lambda workload: workload.name == target or _is_id(target, workload)


def _is_id(target: str, workload: Workload) -> bool:
    return len(target) >= SHORTEST_ID and bool(workload.container) and str(workload.container).startswith(target)
