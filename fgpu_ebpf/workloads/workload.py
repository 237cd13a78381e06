"""The workload of a cgroup: the unit, the container, the pod, and the labels in the attributes of the cgroup's folder.

The module runs in the agent's main thread and in commands. Only `engine_labels` sends requests to engines. If a user
other than root can write the attributes, only requests for limits are used.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf.workloads import cgroup_names
from fgpu_ebpf.workloads.cgroup_names import CgroupName, Engine

NAME_CHARACTERS = 128
MOST_LABELS = 64
MOST_LABEL_CHARACTERS = 256
MEMORY_LABEL = "fgpu.dev/memory"
COMPUTE_LABEL = "fgpu.dev/compute"
PRIORITY_LABEL = "fgpu.dev/priority"
FRACTION_LABEL = "clearml-injector/fraction"
# The annotations of pods that the KAI scheduler places, and the label that every such pod has.
KAI_MEMORY, KAI_FRACTION, KAI_QUEUE = "gpu-memory", "gpu-fraction", "kai.scheduler/queue"
KAI_PRIORITY = "priorityClassName"  # the label by which KAI chooses the class, before the field of the same name
# The annotations in which a scheduler records the booking for a pod.
HAMI, VOLCANO = "hami.io/vgpu-devices-allocated", "volcano.sh/vgpu-ids-new"
ALIYUN, ALIYUN_DEVICE = "ALIYUN_COM_GPU_MEM_POD", "ALIYUN_COM_GPU_MEM_DEV"
# The requests that a workload may make for itself.
ASKING = (
    MEMORY_LABEL, COMPUTE_LABEL, PRIORITY_LABEL, FRACTION_LABEL, KAI_MEMORY, KAI_FRACTION, HAMI, VOLCANO, ALIYUN,
    ALIYUN_DEVICE,
)  # fmt: skip
REQUESTS = {"memory": MEMORY_LABEL, "compute": COMPUTE_LABEL}

_XATTR = "user.fgpu."
_UNSAFE = re.compile(r"[^A-Za-z0-9._@:+=-]")
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")
_PAYLOADS = ("container", "payload")  # folders that crun makes inside a container's own folder, for the processes


class Subject(NamedTuple):
    """A container or pod that can be requested from an engine. `id`: the engine's id, or kubelet's uid of the pod."""

    id: str
    engine: Engine
    is_pod: bool = False


@dataclass(frozen=True, slots=True)
class Names:
    """The names that an engine reports for a container or pod. A name that is not reported is empty or None.

    `image_asks`: the labels in ASKING that come from the image. `labels` does not contain these labels.
    `is_cut`: whether further labels were left out, because there are too many.
    """

    name: str = ""
    pod: str | None = None
    namespace: str | None = None
    image: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    image_asks: Mapping[str, str] = field(default_factory=dict)
    is_cut: bool = False


class Booking(NamedTuple):
    """The memory that Kubernetes' scheduler has booked for a pod in ResourceClaims of another driver.

    `source`: the claims, as text. `bytes`: the bytes by UUID of the device, for all containers of the pod together.
    `unknown`: the reason why the numbers are not known; a pod with such a reason gets no memory.
    """

    source: str
    bytes: Mapping[str, int]
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """A cgroup and its names.

    Attributes:
        cgroup: the kernel's id of the cgroup.
        path: the path from the hierarchy's root.
        name: the name of the folder or container.
        unit: the innermost systemd service or scope around the cgroup, with systemd's escapes.
        container: the engine's id of the container around the cgroup.
        pod_uid: kubelet's uid of the pod.
        pod, namespace, image: names that named() sets, because only an engine can report these names.
        labels: labels from the folder's attributes; named() adds the labels that an engine reports.
        inside: whether the cgroup is below the container's or unit's own folder, where the workload can make cgroups.
        image_asks, is_cut: see Names.
        subject: the container or pod to request from an engine; None if the cgroup is no container or pod, or if a user
            other than root owns the folder around the cgroup.
        booking: the scheduler's booking for the pod, or None.
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
    booking: Booking | None = None
    is_cut: bool = False

    @property
    def is_pod(self) -> bool:
        """Return whether the cgroup is the folder of a whole pod."""
        return self.subject is not None and self.subject.is_pod


def identify(root: Path, path: str) -> Workload | None:
    """Return the workload of a cgroup, or None if the cgroup is gone or has an engine's monitor process.

    Args:
        root: the mount point of the hierarchy.
        path: the path of the cgroup below `root`.
    """
    parts = cgroup_names.split(path)
    if ".." in parts or cgroup_names.is_monitor(parts):
        return None
    folder = os.path.join(root, *parts)
    parsed = cgroup_names.parse(parts)
    try:
        found = os.stat(folder)
        labels = _labels(folder, trusted=found.st_uid == 0 and not parsed.inside)
        subject = _subject(root, parts, parsed)
    except OSError:
        return None
    if not stat.S_ISDIR(found.st_mode):
        return None
    return Workload(
        found.st_ino, "/" + "/".join(parts), _name(parts), parsed.unit, parsed.container, parsed.pod_uid, labels=labels,
        inside=parsed.inside, subject=subject,
    )  # fmt: skip


def _subject(root: Path, parts: list[str], parsed: CgroupName) -> Subject | None:
    """Return the subject of a cgroup, or None. Raise OSError if a folder cannot be read.

    The result is None without a subject, or if root does not own the folder around the cgroup. A user that owns this
    folder could give the cgroup the name of another user's container.
    """
    subject, depth = None, parsed.depth
    if parsed.container and parsed.engine and not parsed.nested:
        subject = Subject(parsed.container, parsed.engine)
    elif parsed.pod_uid and not parsed.container and parsed.pod_depth == len(parts):
        subject, depth = Subject(parsed.pod_uid, Engine.CRI, is_pod=True), parsed.pod_depth
    if subject is None or os.stat(os.path.join(root, *parts[: depth - 1])).st_uid != 0:
        return None
    return subject


def named(workload: Workload, names: Names) -> Workload:
    """Return the workload with an engine's names. Labels from the folder's attributes have precedence."""
    own = workload.inside or not names.name
    return replace(
        workload,
        name=workload.name if own else safe_name(names.name),
        pod=names.pod,
        namespace=names.namespace,
        image=names.image,
        labels={**names.labels, **workload.labels},
        image_asks=names.image_asks,
        is_cut=names.is_cut,
    )


def safe_name(text: str) -> str:
    """Replace each character except letters, digits and `._@:+=-` by `_`, and truncate the text to NAME_CHARACTERS."""
    return _UNSAFE.sub("_", text)[:NAME_CHARACTERS]


def _name(parts: list[str]) -> str:
    """Return the name of the folder, with systemd's escapes decoded.

    For the payload folder of crun, return the name of the folder around the payload folder.
    """
    if len(parts) > 1 and parts[-1] in _PAYLOADS and cgroup_names.is_container(parts[-2], "".join(parts[-3:-2])):
        parts = parts[:-1]
    name = _ESCAPED.sub(lambda m: chr(int(m[1], 16)), parts[-1] if parts else "root")
    return safe_name(name)


# -- labels of the folder ------------------------------------------------------------------------------------------


def _labels(folder: str, trusted: bool) -> dict[str, str]:
    """Return the attributes `user.fgpu.*` as labels. Without `trusted`, return only the requests in REQUESTS."""
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
