"""TARGET as people name it -> the path of a cgroup.

Owns: the forms: a tenant's name, a container's id or its beginning, pod/NS/NAME, unit/NAME, /cgroup/path, pid/N. Never:
guesses between two. On failure: TargetError with what to name instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from fgpu_ebpf import procfs
from fgpu_ebpf.enforcer import Enforcer
from fgpu_ebpf.identity import Workload
from fgpu_ebpf.workloads import TargetError, Workloads

SHORTEST_ID = 4
_PID = re.compile(r"pid/([0-9]{1,10})")
_PAYLOADS = ("container", "payload")  # where crun puts the processes, inside the container's own folder


def find(target: str, enforcer: Enforcer, workloads: Workloads) -> str:
    """The path of the cgroup that is meant; tenants come before other cgroups."""
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
        raise TargetError(f"no tenant {target!r}: name one of `fgpu status`, a container, a /cgroup/path or pid/N")
    if len(found) > 1:
        raise TargetError(f"{target!r} may be {', '.join(sorted(found)[:4])}: say which")
    return found[0]


def starting(pid: object, engine: int, workloads: Workloads) -> str:
    """The cgroup of a container that an engine is about to start: `pid` is its first process, `engine` the hook's.

    TargetError: it has none of its own, or the two do not mean the same processes by their pids.
    """
    if not isinstance(pid, int) or isinstance(pid, bool):
        raise TargetError("no process of the container is named")
    path, around = procfs.cgroup_path(pid), procfs.cgroup_path(engine)
    if path is None or not _same_pids(engine):
        raise TargetError(f"no process {pid}, or the engine runs in a pid namespace of its own: limit it by a policy")
    if path == "/" or path == around:
        raise TargetError("the container has no cgroup (version 2) of its own: let the engine make one")
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
    """Outermost cgroups of every workload that is meant."""
    is_meant = _question(target)
    found: list[str] = []
    for path in workloads.walk():
        workload = workloads.identify(path)
        if workload and is_meant(workload) and not any(path.startswith(outer + "/") for outer in found):
            found.append(path)
    return found


def _question(target: str) -> Callable[[Workload], bool]:
    kind, _, name = target.partition("/")
    if kind == "unit" and name:
        return lambda workload: workload.unit == name and not workload.inside
    if kind == "pod" and name:
        return lambda workload: f"{workload.namespace}/{workload.pod}" == name or workload.pod_uid == name
    return lambda workload: workload.name == target or _is_id(target, workload)


def _is_id(target: str, workload: Workload) -> bool:
    return len(target) >= SHORTEST_ID and bool(workload.container) and str(workload.container).startswith(target)
