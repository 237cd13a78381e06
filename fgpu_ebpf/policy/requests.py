"""Requests for limits in the labels and annotations of a workload, in the formats of fgpu and of schedulers.

A scheduler records the amounts that are booked for a pod in the pod's annotations. The policy bounds every request. The
functions do no I/O, and run in the agent and in `fgpu policy`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from fgpu_ebpf.policy.units import MILLION, Amount, QuantityError, amount, fraction, mebibytes, millionths, shown
from fgpu_ebpf.workloads.workload import (
    ALIYUN,
    ALIYUN_DEVICE,
    COMPUTE_LABEL,
    FRACTION_LABEL,
    HAMI,
    KAI_FRACTION,
    KAI_MEMORY,
    KAI_PRIORITY,
    KAI_QUEUE,
    MEMORY_LABEL,
    PRIORITY_LABEL,
    VOLCANO,
)

_Value = TypeVar("_Value")
PERCENT = MILLION // 100
_NUMBER = re.compile(r"[0-9]{1,9}")
_BOOKED = re.compile(r"[^,:;]*,[^,:;]*,(?P<mib>[0-9]{1,9}),(?P<percent>[0-9]{1,9})")


class Around(NamedTuple):
    """The text of the other label that a source needs, and whether the workload is a whole pod."""

    needed: str
    is_pod: bool


@dataclass(frozen=True)
class Source(Generic[_Value]):
    """A label or annotation that can hold a request.

    `read` returns None if the text requests nothing, and raises QuantityError if the text is invalid. `needs`: another
    label, without which this label is ignored.
    """

    label: str
    read: Callable[[str, Around], _Value | None]
    needs: str = ""


# -- annotations of HAMi and Volcano: `UUID,NVIDIA,3000,30:` for each device, `;` between containers ---------------


def _booked(text: str) -> list[list[tuple[int, int]]]:
    """Return (MiB, percent) of each device, for each container with devices.

    Raise QuantityError if the text is invalid.

    The sources of the format are HAMi's `EncodeContainerDevices` (pkg/device/devices.go) and Volcano's
    `encodeContainerDevices` (pkg/scheduler/api/devices/nvidia/vgpu/utils.go).
    """
    containers = []
    for container in filter(None, text.split(";")):
        devices = [_BOOKED.fullmatch(device) for device in filter(None, container.split(":"))]
        numbers = [(int(device["mib"]), int(device["percent"])) for device in devices if device]
        if len(numbers) < len(devices):
            raise QuantityError(f"{shown(text)} is not a list of UUID,TYPE,MIB,PERCENT")
        if numbers:
            containers.append(numbers)
    return containers


def _sum_or_most(containers: Sequence[Sequence[int]], is_pod: bool) -> int:
    """Return the amount that a pod needs on one device, or the amount of the pod's largest container.

    The annotation lists the containers by their position in the pod, which the engine does not report. The limit of the
    pod's own cgroup is for all containers together.
    """
    return (sum if is_pod else max)([max(devices) for devices in containers])


def _booked_memory(text: str, around: Around) -> Amount | None:
    sizes = [[mib for mib, _ in devices] for devices in _booked(text)]
    return mebibytes(str(_sum_or_most(sizes, around.is_pod))) if sizes else None


def _booked_compute(text: str, around: Around) -> int | None:
    """Return the booked ceiling in millionths, or None without a ceiling. A device with 0 percent has no ceiling."""
    parts = [[percent for _, percent in devices] for devices in _booked(text)]
    if not parts or not all(percent for devices in parts for percent in devices):
        return None
    return min(_sum_or_most(parts, around.is_pod) * PERCENT, MILLION)


# -- annotations of Aliyun's gpushare: the pod's memory and the device's, in the same unit, which is MiB or GiB --------


def _part_of_device(text: str, around: Around) -> Amount:
    """Return the requested part of a device's memory, in the format of gpushare-scheduler-extender.

    The source of the format is `GetUpdatedPodAnnotationSpec` (pkg/utils/pod.go of gpushare-scheduler-extender).
    """
    if not (_NUMBER.fullmatch(text) and _NUMBER.fullmatch(around.needed)) or not 0 < int(text) <= int(around.needed):
        raise QuantityError(f"{shown(text)} of {shown(around.needed)} is not a part of a device's memory")
    return Amount(millionths=int(text) * MILLION // int(around.needed) or 1)


# -- the adapters: by name in `adapters:` of agent.yaml, the labels that only this adapter reads -----------------------

NVIDIA_DRA = "nvidia-dra"  # this adapter reads no label: see `kubernetes.nvidia_claims`
ADAPTERS: Mapping[str, Collection[str]] = {
    NVIDIA_DRA: (),
    "kai": (KAI_MEMORY, KAI_FRACTION, KAI_PRIORITY),
    "hami": (HAMI,),
    "volcano": (VOLCANO,),
    "aliyun": (ALIYUN, ALIYUN_DEVICE),
    "clearml": (FRACTION_LABEL,),
}


def of_adapters(labels: Mapping[str, str], adapters: Collection[str]) -> Mapping[str, str]:
    """Return the labels without the labels of all adapters that are not in `adapters`."""
    ignored = {label for name, own in ADAPTERS.items() if name not in adapters for label in own}
    return {key: value for key, value in labels.items() if key not in ignored} if ignored else labels


# -- all sources, in the order of precedence -------------------------------------------------------------------------

_MEMORY: tuple[Source[Amount], ...] = (
    Source(MEMORY_LABEL, lambda text, _: amount(text)),
    Source(KAI_MEMORY, lambda text, _: mebibytes(text), KAI_QUEUE),
    Source(KAI_FRACTION, lambda text, _: fraction(text), KAI_QUEUE),
    Source(HAMI, _booked_memory),
    Source(VOLCANO, _booked_memory),
    Source(ALIYUN, _part_of_device, ALIYUN_DEVICE),
    Source(FRACTION_LABEL, lambda text, _: fraction(text)),
)
_COMPUTE: tuple[Source[int], ...] = (
    Source(COMPUTE_LABEL, lambda text, _: millionths(text)),
    Source(HAMI, _booked_compute),
    Source(VOLCANO, _booked_compute),
)


def memory(
    labels: Mapping[str, str], is_pod: bool, obstacle: str, prefix: str, notes: list[str]
) -> tuple[str, Amount] | None:
    """Return the first valid request for memory, with its label.

    Args:
        labels: the labels and annotations of the workload or of its image.
        is_pod: whether the workload is a whole pod.
        obstacle: why the policy allows no request, or an empty text.
        prefix: the text before a label's name in the notes.
        notes: the list to which a line is added for each request that is ignored.
    """
    return _first(_MEMORY, labels, is_pod, obstacle, prefix, notes)


def compute(
    labels: Mapping[str, str], is_pod: bool, obstacle: str, prefix: str, notes: list[str]
) -> tuple[str, int] | None:
    """Return the request for a ceiling of device time in millionths. The arguments are the arguments of memory()."""
    return _first(_COMPUTE, labels, is_pod, obstacle, prefix, notes)


def priority_classes(labels: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each label with a priority class, and the class: fgpu's label, and KAI's label on a pod that KAI places.

    The source of KAI's label is `calcPodGroupPriorityClass` (default_grouper.go of KAI's pod grouper). KAI prefers the
    label of the pod's owner, which no engine reports.
    """
    for label, needed in ((PRIORITY_LABEL, PRIORITY_LABEL), (KAI_PRIORITY, KAI_QUEUE)):
        if label in labels and needed in labels:
            yield label, labels[label]


def _first(
    sources: Iterable[Source[_Value]], labels: Mapping[str, str], is_pod: bool, obstacle: str, prefix: str,
    notes: list[str],
) -> tuple[str, _Value] | None:  # fmt: skip
    for source in sources:
        text = labels.get(source.label)
        if text is None or (source.needs and source.needs not in labels):
            continue
        try:
            found = source.read(text, Around(labels.get(source.needs, ""), is_pod))
        except QuantityError as error:
            notes.append(f"{prefix}{source.label} is ignored: {obstacle or error}")
            continue
        if found is not None and not obstacle:
            return source.label, found
        if found is not None:
            notes.append(f"{prefix}{source.label} is ignored: {obstacle}")
    return None
