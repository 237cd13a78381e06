"""SELinux checks: whether the kernel's loaded policy lets containers access the files and sockets of fgpu.

This module runs in `fgpu doctor` and `fgpu setup`. The module lists the accesses that containers need, and the commands
that permit these accesses. No label and no policy is changed. On a host without SELinux there is no check.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf.check import Check
from fgpu_ebpf.containers import injection

ROOT = Path("/sys/fs/selinux")
CONTAINER = "system_u:system_r:container_t:s0"
FIX = (
    "semanage fcontext -a -t container_ro_file_t '/var/lib/fgpu(/.*)?'; "
    "semanage fcontext -a -t container_ro_file_t '/run/fgpu(/.*)?'; "
    "restorecon -R /var/lib/fgpu /run/fgpu; semodule -i fgpu.cil (the file is in docs/containers.md)"
)


class Need(NamedTuple):
    """An access of a container to an object of fgpu, in the words of the policy."""

    name: str
    label: str
    kind: str
    rights: tuple[str, ...]


def checks(run_dir: Path, root: Path = ROOT) -> Iterator[Check]:
    """Yield one check if SELinux enforces or is permissive; no check if SELinux is off."""
    try:
        enforces = (root / "enforce").read_text().strip() == "1"
    except OSError:
        return
    if not enforces:
        yield Check("selinux", True, "permissive: SELinux refuses nothing")
        return
    try:
        refused = [f"{need.name} ({', '.join(rights)})" for need in needs(run_dir) if (rights := _refused(root, need))]
    except OSError as error:
        yield Check("selinux", True, f"the SELinux policy cannot be queried about containers: {error.strerror}")
        return
    if refused:
        yield Check("selinux", False, f"containers are denied access to {'; '.join(refused)}", FIX)
    else:
        yield Check("selinux", True, "containers have access to the shim and its socket")


def needs(run_dir: Path) -> Iterator[Need]:
    """Yield the accesses to mounted files, and to the gatekeeper's process. Files without a label are left out."""
    reads = ("read", "open", "getattr")
    for place in injection.mounted(run_dir).values():
        rights = (*reads, "map", "execute") if place.suffix == ".so" else reads
        yield from _need(str(place), place, "file", rights)
    yield from _need("the shim's folder", run_dir / "shim", "dir", ("search",))
    yield from _need("the shim's socket", run_dir / "shim/shim.sock", "sock_file", ("write",))
    process = _gatekeeper(run_dir)
    if process:
        yield Need("the gatekeeper", process, "unix_stream_socket", ("connectto",))
        yield Need("the gatekeeper", process, "fd", ("use",))
        yield Need("the gatekeeper", process, "bpf", ("map_read", "map_write"))


def _need(name: str, place: Path, kind: str, rights: tuple[str, ...]) -> Iterator[Need]:
    label = label_of(place)
    if label:
        yield Need(name, label, kind, rights)


def label_of(place: Path) -> str:
    """Return the label of a file, or an empty text if the file has no label."""
    try:
        return os.getxattr(place, "security.selinux").rstrip(b"\0").decode()
    except OSError:
        return ""


def _gatekeeper(run_dir: Path) -> str:
    try:
        pid = int((run_dir / "gatekeeper.lock").read_text())
        return Path(f"/proc/{pid}/attr/current").read_text().rstrip("\0\n")
    except (OSError, ValueError):
        return ""


def _refused(root: Path, need: Need) -> list[str]:
    """Return the rights that the kernel refuses. Raise OSError if the kernel's policy lacks the label or the class."""
    kind = root / "class" / need.kind
    answer = ask(root, f"{CONTAINER} {need.label} {(kind / 'index').read_text().strip()}")
    allowed = int(answer.split()[0], 16)
    bits = {right: 1 << int((kind / "perms" / right).read_text()) - 1 for right in need.rights}
    return [right for right, bit in bits.items() if not allowed & bit]


def ask(root: Path, question: str) -> str:
    """Return the answer of selinuxfs's file `access`. Raise OSError on failure.

    Args:
        root: the mount point of selinuxfs.
        question: the label of the source, the label of the target, and the number of the class.

    Returns:
        Numbers in hexadecimal. The first number has a bit for each granted right.
    """
    place = os.open(root / "access", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(place, question.encode())
        return os.read(place, 4096).decode()
    finally:
        os.close(place)
