"""Translation of cgroup paths in kernel events to the cgroup namespace of this process.

Tracepoints name a cgroup by its path from the root of the hierarchy. An agent may run in a cgroup namespace, for
example in a system container. Its file system and /proc then show paths from the root of the namespace. This module
runs in any thread.
"""

from __future__ import annotations

import os
import threading
from functools import cache

from fgpu_ebpf.linux import procfs
from fgpu_ebpf.linux.libc import LIBC, check

CLONE_NEWCGROUP = 0x02000000
HOST_NAMESPACE = 0xEFFFFFFB  # PROC_CGROUP_INIT_INO: the inode of the first cgroup namespace


@cache
def root_path() -> str:
    """Return the path of this namespace's root in the hierarchy; empty: the host's namespace, or an unknown path.

    The path is read in the namespace of process 2, a kernel thread in the host's namespaces. Inside a pid namespace
    this kernel thread is not visible, so the path is unknown.
    """
    if os.stat("/proc/self/ns/cgroup").st_ino == HOST_NAMESPACE:
        return ""
    whole: list[str] = []
    thread = threading.Thread(target=lambda: whole.extend(_paths_from_host()))
    thread.start()  # setns() changes the namespace of one thread
    thread.join()
    return whole[0].removesuffix((procfs.cgroup_path(os.getpid()) or "/").rstrip("/")) if whole else ""


def _paths_from_host() -> list[str]:
    """Enter the host's cgroup namespace, and return the path of this thread's cgroup; empty: the kernel refuses."""
    try:
        namespace = os.open("/proc/2/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC)
        try:
            check("setns", LIBC.setns(namespace, CLONE_NEWCGROUP))
        finally:
            os.close(namespace)
        return [os.fsdecode(procfs.read("/proc/thread-self/cgroup").rpartition(b"0::")[2].rstrip(b"\n"))]
    except OSError:
        return []


def inside(path: str) -> str | None:
    """Convert a path from the root of the hierarchy to a path in this namespace; None: the cgroup lies outside."""
    root = root_path()
    if not path.startswith(root) or path[len(root) :][:1] not in ("", "/"):
        return None
    return path[len(root) :] or "/"
