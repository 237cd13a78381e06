"""SELinux: whether containers may reach what they get of ours, as the kernel answers by the policy that it has.

Owns: what they need, and the commands that give it. Never: changes a label or a policy. Where SELinux is off there is
nothing to say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf import inject
from fgpu_ebpf.checks import Check

ROOT = Path("/sys/fs/selinux")
CONTAINER = "system_u:system_r:container_t:s0"
MEND = (
    "semanage fcontext -a -t container_ro_file_t '/var/lib/fgpu(/.*)?'; "
    "semanage fcontext -a -t container_ro_file_t '/run/fgpu(/.*)?'; "
    "restorecon -R /var/lib/fgpu /run/fgpu; semodule -i fgpu.cil (docs/containers.md has it)"
)


@dataclass(frozen=True, slots=True)
class Need:
    """What a container does with an object of ours: the policy's words for both."""

    name: str
    label: str
    kind: str
    rights: tuple[str, ...]


def checks(run_dir: Path, root: Path = ROOT) -> Iterator[Check]:
    """One check where SELinux enforces; none where it is off."""
    try:
        enforces = (root / "enforce").read_text().strip() == "1"
    except OSError:
        return
    if not enforces:
        yield Check("selinux", True, "permissive: it refuses nothing")
        return
    try:
        refused = [f"{need.name} ({', '.join(rights)})" for need in needs(run_dir) if (rights := _refused(root, need))]
    except OSError as error:
        yield Check("selinux", True, f"its policy does not say what containers may: {error.strerror}")
        return
    if refused:
        yield Check("selinux", False, f"containers are refused {'; '.join(refused)}", MEND)
    else:
        yield Check("selinux", True, "containers reach the shim and its socket")


def needs(run_dir: Path) -> Iterator[Need]:
    """The files that are mounted, and the process that answers hello. What is not there has no label yet."""
    reads = ("read", "open", "getattr")
    for place in inject.mounted(run_dir):
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
    """Empty: there is none."""
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
    """Those of its rights that the kernel does not give. OSError: it knows no such label or class."""
    kind = root / "class" / need.kind
    answer = ask(root, f"{CONTAINER} {need.label} {(kind / 'index').read_text().strip()}")
    allowed = int(answer.split()[0], 16)
    bits = {right: 1 << int((kind / "perms" / right).read_text()) - 1 for right in need.rights}
    return [right for right, bit in bits.items() if not allowed & bit]


def ask(root: Path, question: str) -> str:
    """selinuxfs's `access`: source, target and class in, the rights in hexadecimal out. OSError."""
    place = os.open(root / "access", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(place, question.encode())
        return os.read(place, 4096).decode()
    finally:
        os.close(place)
