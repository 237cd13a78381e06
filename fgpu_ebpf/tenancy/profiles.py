"""Profiles: the shares that this host offers to Kubernetes, and their numbers, by `profiles:` in agent.yaml.

The module does no I/O and runs in the agent's main loop. An offered share is a number for Kubernetes' scheduler. The
limits of a container are decided when the container starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fgpu_ebpf.policy import share_name
from fgpu_ebpf.policy.rules import Device, DeviceChoice
from fgpu_ebpf.policy.units import MILLION, memory_text

MOST_NAME_CHARACTERS = 16  # in a share's name; kubelet's ids have 63 characters, and a UUID needs 40 characters
MOST_COUNT = 128  # the maximum number of shares of a profile on one device


class ProfileError(ValueError):
    """The error of profiles that do not fit on a device. The text has the numbers."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A share that the host offers.

    `count` is the number of shares on each device, or None for as many shares as fit. `devices` has the devices that
    offer the share, and is empty if every device offers the share.
    """

    share: str
    count: int | None = None
    devices: tuple[DeviceChoice, ...] = ()

    def is_of(self, device: Device) -> bool:
        """Return True if the profile is offered on the device."""
        return not self.devices or any(choice.takes(device) for choice in self.devices)


def size_bytes(share: str, device: Device) -> int:
    """Return the memory that one share uses on a device, in bytes. The share of a profile always sets memory."""
    amount = share_name.parse(share).amount
    assert amount
    return amount.of(device.usable_bytes)


def counts(profiles: Sequence[Profile], device: Device, overcommit: bool) -> dict[str, int]:
    """Return how many shares a device offers, by name. Shares that do not fit even once are left out.

    Profiles with a count have precedence, and must fit together unless `overcommit` is true. A profile without a count
    gets as many shares as fit in the remaining memory and in the device's time. Several profiles without a count
    overlap: the count of each profile is the count without the other profiles.

    Raises:
        ProfileError: the profiles with a count do not fit together.
    """
    here = [profile for profile in profiles if profile.is_of(device)]
    fixed = {profile.share: profile.count for profile in here if profile.count is not None}
    taken = sum(count * size_bytes(share, device) for share, count in fixed.items())
    if taken > device.usable_bytes and not overcommit:
        said = ", ".join(f"{count} of {share}" for share, count in fixed.items())
        have = f"{memory_text(taken)} of {memory_text(device.usable_bytes)} on device {device.index}"
        raise ProfileError(f"profiles: {said} would take {have}: lower a count, or allow overcommit")
    found = {}
    for profile in here:
        count = profile.count
        if count is None:
            count = _fitting(profile.share, max(0, device.usable_bytes - taken), device)
        if count:
            found[profile.share] = count
    return found


def _fitting(name: str, free_bytes: int, device: Device) -> int:
    """Return how many shares fit into `free_bytes`, and into the device's time if the share has a ceiling."""
    share = share_name.parse(name)
    by_time = MILLION // share.limit_millionths if share.limit_millionths else MOST_COUNT
    return min(free_bytes // size_bytes(name, device), by_time, MOST_COUNT)


def names(profiles: Iterable[Profile], devices: Sequence[Device]) -> list[str]:
    """Return the name of each share of one device that containers can request by these profiles."""
    return [share_name.bound(p.share, device.uuid_text) for p in profiles for device in devices if p.is_of(device)]
