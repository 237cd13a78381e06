"""Slots, the units that kubelet counts: a slot is room for one container with one profile on one device.

This module runs in the asyncio loop of the device plugin and does no I/O. This module defines the ids of slots, and
decides which slots can be assigned and which slots are preferred.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fgpu_ebpf.policy.share_name import bound
from fgpu_ebpf.policy.units import memory_text, shown

MOST_SLOTS = 1000  # a host must have fewer in all profiles, so that lists stay far below kubelet's maximum of 4 MiB
ADMISSION_SECONDS = 10.0  # between kubelet's requests for two containers of one pod; each may wait for room
PROMISE_SECONDS = 300.0  # from kubelet's request to the container's start; the image may have to be pulled
_BETWEEN = "::"


class SlotError(ValueError):
    """An id is invalid, or one container cannot have these slots together. The text has the reason."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile on one device, as the agent reports it.

    `bytes`: the size of one share. `count`: the number of slots. `taken`: the number of shares that containers have.
    `fits`: how many more shares fit now.
    """

    share: str
    memory: str
    compute: str
    bytes: int
    count: int
    taken: int
    fits: int


@dataclass(frozen=True, slots=True)
class Device:
    """A device of this host. `fault`: the reason why no share of the device may be assigned, else empty."""

    uuid: str
    index: int
    numa: int | None
    fault: str
    free_bytes: int
    capacity_bytes: int
    profiles: Mapping[str, Profile]


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot, by the parts of its id."""

    uuid: str
    share: str
    number: int

    @property
    def id(self) -> str:
        """The id, such as `GPU-…::8gib-50pct::3`. A restart of the plugin does not change the id."""
        return _BETWEEN.join((self.uuid, self.share, str(self.number)))


@dataclass(frozen=True, slots=True)
class Host:
    """The agent's last answer. `mounts`: the shim's mounts (source, target).

    `fault`: the reason why no share of any device may be assigned, else empty. `started`: how many containers have got
    a share since the agent's start, by the share's name with its device. Earlier versions of the agent have no count.
    """

    fault: str
    devices: Mapping[str, Device]
    mounts: Sequence[tuple[str, str]] = ()
    started: Mapping[str, int] = field(default_factory=dict)

    def arrived(self, before: Host) -> dict[tuple[str, str], int]:
        """Return how many containers have got a share since an earlier answer, by device and share.

        `taken` alone does not count a container if another container with the same share has ended. `started` alone
        does not count a container if the agent has restarted.
        """
        return {
            (uuid, share): max(
                profile.taken - old.profiles[share].taken,
                self.started.get(bound(share, uuid), 0) - before.started.get(bound(share, uuid), 0),
            )
            for uuid, device in self.devices.items()
            if (old := before.devices.get(uuid))
            for share, profile in device.profiles.items()
            if share in old.profiles
        }

    def ended(self, uuid: str, share: str) -> int:
        """Return a number that grows by one when a container with this share of this device ends."""
        device = self.devices.get(uuid)
        taken = device.profiles[share].taken if device and share in device.profiles else 0
        return self.started.get(bound(share, uuid), 0) - taken

    @property
    def shares(self) -> list[str]:
        """The profiles of all devices, in the order of the host's settings."""
        return list(dict.fromkeys(share for device in self.devices.values() for share in device.profiles))

    def slots(self, share: str) -> list[Slot]:
        """Return all slots of a profile, device by device."""
        found = [(device.uuid, device.profiles[share]) for device in self.devices.values() if share in device.profiles]
        return [Slot(uuid, share, number) for uuid, profile in found for number in range(profile.count)]

    def count(self) -> int:
        """Return the number of slots of all profiles."""
        return sum(profile.count for device in self.devices.values() for profile in device.profiles.values())


def host_of(answer: Mapping[str, Any]) -> Host:
    """Return the agent's answer as a Host. Raise KeyError or TypeError if the agent's version has no slots."""
    devices = {}
    for said in answer["devices"]:
        profiles = {entry["share"]: Profile(**entry) for entry in said["profiles"]}
        devices[said["uuid"]] = Device(**{**said, "profiles": profiles})
    mounts = [(source, target) for source, target in answer["mounts"]]
    return Host(answer["fault"], devices, mounts, answer.get("started", {}))


def _of(slots: Iterable[Slot], uuid: str, share: str) -> list[Slot]:
    """Return the slots of a profile on a device, in their order."""
    return [slot for slot in slots if (slot.uuid, slot.share) == (uuid, share)]


@dataclass(slots=True)
class _Promise:
    """Containers of one pod that are about to start in a slot, one after the other: init containers, and then another.

    `since`: the time of the last allocation. `waiting`: the number of containers that have not started. `ended`: the
    value of Host.ended() before the start of the latest container, or None if none has started.
    """

    since: float
    waiting: int = 0
    ended: int | None = None


class Book:
    """The slots that kubelet has allocated. A part of these slots is promised, but not taken yet.

    kubelet does not report to a device plugin that a container has exited, so the agent's numbers decide. A slot is
    promised from its allocation until the agent counts the container, for PROMISE_SECONDS at most. kubelet allocates a
    slot once for each container of a pod that uses the slot, at one time: a later allocation is for another pod. While
    such a container runs, the next one needs no memory. A slot has one running container at most.
    """

    def __init__(self, is_counted: bool = True) -> None:
        """Start without allocated slots.

        Args:
            is_counted: whether the agent counts the containers that get these slots. Otherwise all slots of a device
                without a fault are healthy, and nothing is promised.
        """
        self._is_counted = is_counted
        self.host = Host("the agent has not reported its shares yet", {})
        self._promised: dict[Slot, _Promise] = {}
        self._given: dict[Slot, None] = {}  # the latest slot last

    def look(self, host: Host, now: float | None = None) -> None:
        """Record an answer of the agent, and end the promises for containers that the agent counts now."""
        now = time.monotonic() if now is None else now
        before, self.host = self.host, host
        self._promised = {slot: p for slot, p in self._promised.items() if now - p.since <= PROMISE_SECONDS}
        for (uuid, share), count in host.arrived(before).items():
            for _ in range(count):
                self._start(uuid, share, before.ended(uuid, share))

    def _start(self, uuid: str, share: str, ended: int) -> None:
        """End the promise for one container that has started, if possible in a slot without an earlier container."""
        slots = _of(self._promised, uuid, share)
        if not slots:
            return
        slot = max(slots, key=lambda slot: (self._promised[slot].ended is None, self._promised[slot].waiting))
        promise = self._promised[slot]
        promise.waiting, promise.ended = promise.waiting - 1, ended
        if not promise.waiting:
            del self._promised[slot]

    def promise(self, slots: Iterable[Slot], now: float | None = None) -> None:
        """Record that containers are about to start in these slots, if the agent counts these containers."""
        if not self._is_counted:
            return
        now = time.monotonic() if now is None else now
        for slot in slots:
            promise = self._promised.get(slot)
            if promise is None or now - promise.since > ADMISSION_SECONDS:  # a pod that never started has no slot
                promise = self._promised[slot] = _Promise(now)
            promise.since, promise.waiting = now, promise.waiting + 1
            self._given.pop(slot, None)
            self._given[slot] = None

    def _held(self, device: Device, share: str, but: Sequence[Slot] = ()) -> int:
        """Return how many slots of a profile, except `but`, have memory that is promised and not taken.

        If a container has ended, it may be the container of any slot. But if the other slots are all taken, then no
        container of a promised slot has ended.
        """
        profile, ended = device.profiles[share], self.host.ended(device.uuid, share)
        states = [self._promised[slot].ended for slot in _of(self._promised, device.uuid, share) if slot not in but]
        new = states.count(None)
        empty = max(0, profile.count - len(_of(but, device.uuid, share)) - new - profile.taken)
        return new + min(empty, sum(state not in (None, ended) for state in states))

    def room(self, device: Device, share: str, but: Sequence[Slot] = ()) -> int:
        """Return how many more shares of a profile fit on a device, in addition to promised slots not in `but`."""
        profile = device.profiles[share]
        if profile.fits * profile.bytes > device.free_bytes:  # overcommit is allowed
            return profile.fits
        held = sum(self._held(device, other, but) * about.bytes for other, about in device.profiles.items())
        return max(0, device.free_bytes - held) // profile.bytes

    def healthy(self, share: str) -> set[Slot]:
        """Return the slots to report as healthy: taken slots, promised slots, and free slots that fit.

        kubelet does not report which slots are taken, so the result has the right number of slots: first the slots that
        kubelet allocated most recently, then slots with the lowest numbers.
        """
        found: set[Slot] = set()
        if self.host.fault:
            return found
        for device in self.host.devices.values():
            if device.fault or share not in device.profiles:
                continue
            profile = device.profiles[share]
            own = [Slot(device.uuid, share, number) for number in range(profile.count)]
            known = _of(reversed(self._given), device.uuid, share)
            room = self._held(device, share) + self.room(device, share)
            many = profile.taken + room if self._is_counted else profile.count
            found.update([slot for slot in dict.fromkeys([*known, *own]) if slot.number < profile.count][:many])
        return found

    def read(self, share: str, ids: Sequence[str]) -> list[Slot]:
        """Return the slots of the ids that one container requests. Raise SlotError on failure."""
        slots = [self._slot(share, id_) for id_ in ids]
        twice = [uuid for uuid, count in Counter(slot.uuid for slot in slots).items() if count > 1]
        if twice:
            raise SlotError(f"one container cannot have two shares of one device ({twice[0]}): request a larger share")
        return slots

    def _slot(self, share: str, id_: str) -> Slot:
        uuid, _, rest = id_.partition(_BETWEEN)
        device = self.host.devices.get(uuid)
        profile = device.profiles.get(share) if device else None
        number = rest.removeprefix(share + _BETWEEN)
        slot = Slot(uuid, share, int(number) if number.isascii() and number.isdigit() and len(number) < 4 else 0)
        if profile is None or slot.number >= profile.count or slot.id != id_:
            raise SlotError(f"{shown(id_)} is not the id of a slot of fgpu.dev/{share}")
        return slot

    def shortage(self, slots: Iterable[Slot]) -> str:
        """Return the reason why these slots cannot be assigned now, or an empty text."""
        if self.host.fault:
            return self.host.fault
        for slot in slots:
            device = self.host.devices[slot.uuid]
            if device.fault:
                return f"{slot.uuid}: {device.fault}"
            if not self.room(device, slot.share, but=[slot]):
                size, free = memory_text(device.profiles[slot.share].bytes), memory_text(device.free_bytes)
                of = memory_text(device.capacity_bytes)
                promised = "without deducting shares promised to other containers"
                return f"{size} do not fit on {slot.uuid}: {free} of {of} are free, {promised}"
        return ""

    def prefer(self, share: str, available: Sequence[str], must: Sequence[str], size: int) -> list[str]:
        """Return ids for one container, each on a different device. Raise SlotError on failure.

        Devices on which the share fits come first. Among these devices, devices on the NUMA node of chosen devices
        come first, then the fullest device, so that other devices stay empty.
        """
        chosen = self.read(share, must)
        free: dict[str, list[Slot]] = defaultdict(list)
        for id_ in available:
            slot = self._slot(share, id_)
            free[slot.uuid].append(slot)
        for slot in chosen:
            free.pop(slot.uuid, None)
        while len(chosen) < size and free:
            uuid = min(free, key=lambda uuid: self._order(uuid, share, chosen))
            chosen.append(min(free.pop(uuid), key=lambda slot: slot.number))
        return [slot.id for slot in chosen]

    def _order(self, uuid: str, share: str, chosen: Sequence[Slot]) -> tuple[bool, bool, int, int]:
        device = self.host.devices[uuid]
        nodes = {self.host.devices[slot.uuid].numa for slot in chosen}
        room = self.room(device, share)
        return room < 1, bool(nodes) and device.numa not in nodes, room, device.index
