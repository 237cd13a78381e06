"""Who a cgroup is: its unit, its container and pod, and the labels that its folder carries.

Owns: what a cgroup is called, and which labels of it count. Never: asks an engine (`engines` does), or believes what
somebody other than root wrote beyond what the workload may ask for itself. On failure: None, for a cgroup that is gone.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fgpu_ebpf import cgroupnames
from fgpu_ebpf.cgroupnames import CgroupName, Engine

NAME_CHARACTERS = 128
MOST_LABELS = 64
MOST_LABEL_CHARACTERS = 256
MEMORY_LABEL = "fgpu.dev/memory"
COMPUTE_LABEL = "fgpu.dev/compute"
FRACTION_LABEL = "clearml-injector/fraction"
ASKING = (MEMORY_LABEL, COMPUTE_LABEL, FRACTION_LABEL)  # what a workload may ask for itself
REQUESTS = {"memory": MEMORY_LABEL, "compute": COMPUTE_LABEL}

_XATTR = "user.fgpu."
_UNSAFE = re.compile(r"[^A-Za-z0-9._@:+=-]")
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")
_PAYLOADS = ("container", "payload")  # where crun puts the processes, inside the container's own folder


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom an engine can be asked about: a container, or a pod by kubelet's uid of it."""

    id: str
    engine: Engine
    is_pod: bool = False


@dataclass(frozen=True, slots=True)
class Names:
    """What an engine says of a container or pod; empty and None: nothing.

    `image_asks`: those of ASKING that the image brought along, which are in `labels` no more.
    """

    name: str = ""
    pod: str | None = None
    namespace: str | None = None
    image: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    image_asks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Workload:
    """A cgroup and the names that it goes by.

    `cgroup` is the kernel's id, `path` starts at the hierarchy's root. `unit` is the innermost service or scope around,
    with systemd's escapes. `container` is the engine's id of it, also for what lies `inside`: a cgroup that the
    workload made below its own. What only an engine knows (pod, namespace, image, most labels) comes by `named`;
    `subject` is whom to ask it about, None where root's engines cannot know.
    """

    cgroup: int
    path: str
    name: str
    unit: str | None = None
    container: str | None = None
    pod_uid: str | None = None
    pod: str | None = None
    namespace: str | None = None
    image: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    inside: bool = False
    image_asks: Mapping[str, str] = field(default_factory=dict)
    subject: Subject | None = None


def identify(root: Path, path: str) -> Workload | None:
    """The workload of a cgroup: `path` below the hierarchy's `root`. None: it is gone, or an engine's own monitor."""
    parts = cgroupnames.split(path)
    if ".." in parts or cgroupnames.is_monitor(parts):
        return None
    folder = os.path.join(root, *parts)
    said = cgroupnames.parse(parts)
    try:
        found = os.stat(folder)
        labels = _labels(folder, trusted=found.st_uid == 0 and not said.inside)
        subject = _subject(root, parts, said)
    except OSError:
        return None
    if not stat.S_ISDIR(found.st_mode):
        return None
    return Workload(
        found.st_ino, "/" + "/".join(parts), _name(parts), said.unit, said.container, said.pod_uid, labels=labels,
        inside=said.inside, subject=subject,
    )  # fmt: skip


def _subject(root: Path, parts: list[str], said: CgroupName) -> Subject | None:
    """Whom to ask about, if root alone can have made the folder: anybody may call one as another's container is called.

    Raises OSError.
    """
    subject, depth = None, said.depth
    if said.container and said.engine and not said.nested:
        subject = Subject(said.container, said.engine)
    elif said.pod_uid and not said.container and said.pod_depth == len(parts):
        subject, depth = Subject(said.pod_uid, Engine.CRI, is_pod=True), said.pod_depth
    if subject is None or os.stat(os.path.join(root, *parts[: depth - 1])).st_uid != 0:
        return None
    return subject


def named(workload: Workload, names: Names) -> Workload:
    """The workload with what an engine says of it. What root wrote on the folder itself comes before."""
    own = workload.inside or not names.name
    return replace(
        workload,
        name=workload.name if own else safe_name(names.name),
        pod=names.pod,
        namespace=names.namespace,
        image=names.image,
        labels={**names.labels, **workload.labels},
        image_asks=names.image_asks,
    )


def safe_name(text: str) -> str:
    """Letters, digits and a few signs of a text, at most NAME_CHARACTERS."""
    return _UNSAFE.sub("_", text)[:NAME_CHARACTERS]


def _name(parts: list[str]) -> str:
    """The folder's own name, or that of the container around it; systemd's escapes undone, made safe and cut."""
    if len(parts) > 1 and parts[-1] in _PAYLOADS and cgroupnames.is_container(parts[-2], "".join(parts[-3:-2])):
        parts = parts[:-1]
    name = _ESCAPED.sub(lambda m: chr(int(m[1], 16)), parts[-1] if parts else "root")
    return safe_name(name)


# -- labels of the folder ------------------------------------------------------------------------------------------


def _labels(folder: str, trusted: bool) -> dict[str, str]:
    """The folder's attributes `user.fgpu.*`; where others than root could set them, what they may ask for alone."""
    try:
        names = [name for name in os.listxattr(folder) if name.startswith(_XATTR)]
    except OSError:
        return {}
    labels: dict[str, str] = {}
    for name in sorted(names)[:MOST_LABELS]:
        key = name.removeprefix(_XATTR)
        value = _value(folder, name)
        if value is not None and _printable(key) and (trusted or key in REQUESTS):
            labels[REQUESTS.get(key, key)] = value
    return labels


def _value(folder: str, name: str) -> str | None:
    try:
        value = os.getxattr(folder, name).decode()
    except (OSError, UnicodeDecodeError):
        return None
    return value if _printable(value) or not value else None


def _printable(text: str) -> bool:
    return 0 < len(text) <= MOST_LABEL_CHARACTERS and text.isprintable()
