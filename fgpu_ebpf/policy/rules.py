"""The policies in force, and the limits that a workload gets.

The first policy that matches a workload applies. The workload's own labels can change its limits within the bounds of
the policy. A label or device that cannot be applied becomes a note in the decision. The functions do no I/O, and run in
the agent and in `fgpu policy`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple, Protocol

from fgpu_ebpf.policy import requests
from fgpu_ebpf.policy.globs import Globs
from fgpu_ebpf.policy.selector import CUT, Selector
from fgpu_ebpf.policy.units import MILLION, Amount, memory_text, millionths_text, shown
from fgpu_ebpf.workloads.workload import PRIORITY_LABEL, Booking, Workload


class Device(Protocol):
    """The properties of a GPU that policies use."""

    @property
    def index(self) -> int:
        """The index of the device in the ledger."""

    @property
    def uuid_text(self) -> str:
        """The UUID in the form of NVML: `GPU-…`."""

    @property
    def name(self) -> str:
        """The name of the model, as NVML reports it."""

    @property
    def usable_bytes(self) -> int:
        """The memory that all tenants together can get: the device's memory minus the driver's reserve."""


class Priority(StrEnum):
    """The priority of a tenant's turns."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


Classes = Mapping[str, Priority]  # the priority of each priority class or quality of service that agent.yaml names
NO_CLASSES: Classes = MappingProxyType({})


# -- the content of a policy -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """The devices with an index, UUID, beginning of a UUID, or model. One of `index`, `uuid` and `model` is set."""

    text: str
    index: int | None = None
    uuid: str = ""
    model: Globs | None = None

    def takes(self, device: Device) -> bool:
        """Return whether the choice includes this device."""
        if self.uuid:
            return device.uuid_text.lower().startswith(self.uuid)
        if self.model is None:
            return device.index == self.index
        return self.model.matches(device.name) or self.model.matches(device.name.removeprefix("NVIDIA "))


class Compute(NamedTuple):
    """A share of a device's time.

    `limit_ratio`: 1.0 without a ceiling. `priority_by`: the priority class from which the priority comes, and the label
    or setting with the class; an empty text if the priority is from the policy or `fgpu set`. `isolated`: on a
    concurrent device the workload's programs run without MPS.
    """

    limit_ratio: float = 1.0
    weight: int = 100
    priority: Priority = Priority.NORMAL
    quantum_ns: int = 20_000_000
    priority_by: str = ""
    isolated: bool = False


class Park(NamedTuple):
    """Rules for parking a workload.

    `after_ns`: the idle time before automatic parking, or 0 for never. `most_bytes`: the most device memory with which
    the workload is parked, or 0 for any. `deadline_ns`: how long the workload's requests wait at most while other
    workloads are parked for these requests, or 0 for the longest time that programs wait.
    """

    after_ns: int = 0
    most_bytes: int = 0
    deadline_ns: int = 0


NEVER_PARKED = Park()


class Memory(NamedTuple):
    """A limit, and the highest limit that the workload's own label can request (`most`).

    `contexts`: the number of contexts that the workload may have besides the limit.
    """

    limit: Amount
    most: Amount
    contexts: int = 0
    park: Park = NEVER_PARKED


class Policy(NamedTuple):
    """One policy. `source`: the file and line of the policy, such as `10-team.yaml:3`."""

    name: str
    source: str
    selector: Selector
    devices: tuple[DeviceChoice, ...]
    memory: Memory | None = None
    compute: Compute | None = None
    observe: bool = False
    kill: bool = False
    own_utilization: bool = False
    metric_labels: tuple[str, ...] = ()
    deny: bool = False


# -- the outcome for a workload --------------------------------------------------------------------------------------


class Limits(NamedTuple):
    """The limits of a workload.

    `devices` has the ledger indices of the devices that the workload may use. `memory` has the limit in bytes by ledger
    index, and is empty if the policy sets no limit. `contexts`: the number of contexts that are not part of the limit.
    `compute` is None if the workload is not gated. No label can change `park`.
    """

    policy: str
    observe: bool
    kill: bool
    devices: tuple[int, ...]
    memory: Mapping[int, int]
    compute: Compute | None
    own_utilization: bool
    metric_labels: tuple[str, ...]
    contexts: int = 0
    deny: bool = False
    park: Park = NEVER_PARKED


class Decision(NamedTuple):
    """The decision about a workload: its policy and limits, or None if no policy matches.

    `tried` has the names of the policies that were tried before, with the reasons why these policies do not match.
    `notes` has one line for each label or device that was not applied as written.
    """

    workload: Workload
    policy: Policy | None
    tried: tuple[tuple[str, str], ...]
    limits: Limits | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PolicySet:
    """All policies, in the order of their files. `files`: the names and contents of these files."""

    policies: tuple[Policy, ...] = field(default=())
    files: tuple[tuple[str, bytes], ...] = field(default=(), compare=False, repr=False)

    def resolve(
        self, workload: Workload, devices: Sequence[Device], classes: Classes = NO_CLASSES,
        adapters: Collection[str] = requests.ADAPTERS,
    ) -> Decision:  # fmt: skip
        """Return the decision of the first policy that matches. If no policy matches, the workload is unmanaged.

        A policy gives no memory if labels that were left out decide about its match, unless the policy only observes.

        Args:
            workload: the workload.
            devices: the host's devices.
            classes: the priorities of agent.yaml.
            adapters: the adapters of agent.yaml. Requests in labels of other adapters are ignored.
        """
        tried: list[tuple[str, str]] = []
        for policy in self.policies:
            is_unknown = policy.selector.depends_on_cut(workload)
            miss = policy.selector.miss(workload) if not is_unknown else CUT if policy.observe else ""
            if not miss:
                notes = [f"{CUT}: no memory"] if is_unknown else []
                workload = replace(workload, booking=Booking("", {}, CUT)) if is_unknown else workload
                asking = replace(
                    workload,
                    labels=requests.of_adapters(workload.labels, adapters),
                    image_asks=requests.of_adapters(workload.image_asks, adapters),
                )
                limits = _limits(policy, asking, devices, classes, notes)
                return Decision(workload, policy, tuple(tried), limits, tuple(notes))
            tried.append((policy.name, miss))
        return Decision(workload, None, tuple(tried), None, tuple(booking_notes(workload, devices)))


def _limits(
    policy: Policy, workload: Workload, devices: Sequence[Device], classes: Classes, notes: list[str]
) -> Limits:
    chosen = [device for device in devices if any(choice.takes(device) for choice in policy.devices)]
    if not chosen:
        notes.append(f"this host has no device {', '.join(choice.text for choice in policy.devices)}")
    return Limits(
        policy=policy.name,
        observe=policy.observe,
        kill=policy.kill,
        deny=policy.deny,
        devices=tuple(device.index for device in chosen),
        memory=_memory(policy.memory, workload, chosen, notes),
        compute=_compute(policy.compute, workload, classes, notes),
        own_utilization=policy.own_utilization,
        metric_labels=policy.metric_labels,
        contexts=policy.memory.contexts if policy.memory else 0,
        park=policy.memory.park if policy.memory else NEVER_PARKED,
    )


def booked(booking: Booking, device: Device) -> int | None:
    """Return the bytes that a booking allows on a device, or None if the booking does not contain the device."""
    if booking.unknown:
        return 0
    size = booking.bytes.get(device.uuid_text)
    return None if size is None else min(size, device.usable_bytes)


def booking_notes(workload: Workload, devices: Iterable[Device]) -> Iterator[str]:
    """Yield texts with the amounts that have been booked for the workload."""
    if workload.booking and not workload.booking.unknown:  # the Namer reports an unknown booking
        for device in devices:
            if (size := booked(workload.booking, device)) is not None:
                yield f"{workload.booking.source}: {memory_text(size)} of device {device.index}"


def _memory(memory: Memory | None, workload: Workload, devices: Sequence[Device], notes: list[str]) -> dict[int, int]:
    """Return the limits by ledger index. A booking has precedence over labels and, up to its `max`, over the policy.

    The booking is for the pod. A container in the pod gets less if the container requests less.
    """
    is_pod, booking, obstacle = workload.is_pod, workload.booking, "" if memory else "the policy sets no memory limit"
    asked = requests.memory(workload.labels, is_pod, obstacle, "", notes)
    image = requests.memory(workload.image_asks, is_pod, obstacle, "the image's ", notes)
    limits = {d.index: _bytes(memory, asked, image, d, notes) for d in devices} if memory else {}
    asks = bool(limits) and not is_pod and (asked or image)
    notes += booking_notes(workload, devices)
    for device in devices if booking else ():
        size = booking and booked(booking, device)
        if size is None:
            continue
        most = _most(memory, device) if memory else size
        limits[device.index] = min(size, most, limits[device.index] if asks else most)
        if size > most:
            notes.append(f"the policy allows {memory_text(most)} of device {device.index}")
    return limits


def _most(memory: Memory, device: Device) -> int:
    return max(memory.limit.of(device.usable_bytes), memory.most.of(device.usable_bytes))


_Asked = tuple[str, Amount] | None  # a label, and the amount that it requests


def _bytes(memory: Memory, asked: _Asked, image: _Asked, device: Device, notes: list[str]) -> int:
    limit = memory.limit.of(device.usable_bytes)
    if asked is not None:
        label, wanted, most = asked[0], asked[1].of(device.usable_bytes), _most(memory, device)
        limit = min(wanted, most)
        if wanted > most:
            sizes = f"{memory_text(wanted)} of device {device.index}, the policy allows {memory_text(most)}"
            notes.append(f"{label} requests {sizes}")
    if image is not None:
        limit = min(limit, image[1].of(device.usable_bytes))
    if limit > device.usable_bytes:
        notes.append(f"the limit of {memory_text(limit)} is more than tenants can get on device {device.index}")
    return limit


def _compute(compute: Compute | None, workload: Workload, classes: Classes, notes: list[str]) -> Compute | None:
    for prefix, labels in (("", workload.labels), ("the image's ", workload.image_asks)):
        compute = _asked_compute(compute, labels, workload.is_pod, prefix, notes)
    return _with_priority(compute, workload, classes, notes)


def _asked_compute(
    compute: Compute | None, labels: Mapping[str, str], is_pod: bool, prefix: str, notes: list[str]
) -> Compute | None:  # fmt: skip
    obstacle = "" if compute else "the policy gives no compute time"
    asked = requests.compute(labels, is_pod, obstacle, prefix, notes)
    if compute is None or asked is None:
        return compute
    label, ratio = asked[0], asked[1] / MILLION
    if ratio > compute.limit_ratio and not prefix:
        most = millionths_text(round(compute.limit_ratio * MILLION))
        notes.append(f"{label} requests {millionths_text(asked[1])}, the policy allows {most}")
    return compute._replace(limit_ratio=min(ratio, compute.limit_ratio))


def _with_priority(
    compute: Compute | None, workload: Workload, classes: Classes, notes: list[str]
) -> Compute | None:  # fmt: skip
    """Return the share with the lowest priority of the policy and of the classes that the workload names.

    A workload can choose its labels, so a class never raises the priority.
    """
    most = compute.priority if compute else Priority.HIGH
    asked = [("", *pair) for pair in requests.priority_classes(workload.labels)]
    asked += [("the image's ", *pair) for pair in requests.priority_classes(workload.image_asks)]
    for prefix, label, name in asked:
        wanted = classes.get(name)
        if wanted is None:
            if label == PRIORITY_LABEL:  # KAI's label also has classes that only KAI uses
                notes.append(f"{prefix}{label} is ignored: `priorities` in agent.yaml has no {shown(name)}")
        elif compute is None:
            notes.append(f"{prefix}{label} is ignored: the policy gives no compute time")
        elif _lower(wanted, compute.priority):
            compute = compute._replace(priority=wanted, priority_by=f"{prefix}{label}: {name}")
        elif _lower(most, wanted):
            notes.append(f"{prefix}{label} requests {wanted} priority by {name}, the policy allows {most}")
    return compute


def _lower(one: Priority, other: Priority) -> bool:
    ranks = list(Priority)
    return ranks.index(one) > ranks.index(other)
