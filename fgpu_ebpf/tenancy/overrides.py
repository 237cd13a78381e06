"""Overrides: limits set by `fgpu set`, `fgpu run` and shares, which survive a restart of the agent but not a reboot.

The module runs in the agent's main loop. Overrides are stored in one file under /run. An invalid part of the file does
not mean that nothing was set: `unknown` returns the error, for one cgroup or for all.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fgpu_ebpf.linux import atomic_file
from fgpu_ebpf.policy import share_name
from fgpu_ebpf.policy.rules import Priority
from fgpu_ebpf.policy.units import MILLION, Amount, QuantityError

log = logging.getLogger("fgpu.agent")
MOST_WEIGHT = 10_000


@dataclass(frozen=True, slots=True)
class Override:
    """Limits set by hand for one cgroup, on each device. For a value of None or "", the policy's value applies.

    Attributes:
        cgroup: the id of the cgroup.
        path: the path of the cgroup from the hierarchy's root.
        name: the tenant's name, if a name was set.
        own: whether the agent made the cgroup for `fgpu run`.
        share: the share that the container requested at its start. The limits of policies apply to the share too.
        devices: the UUIDs of the devices that the container may use, or empty for any device.
        share_devices: the UUIDs of the devices of the share, or empty for any device. `devices` differs from these if
            devices were set by hand after the share.
        priority_class: the name in `priorities` of agent.yaml from which `priority` comes.
        kept: why the cgroup keeps the limits that the kernel has pinned, until other limits are set.
    """

    cgroup: int
    path: str
    memory_bytes: int | None
    name: str = ""
    own: bool = False
    limit_millionths: int | None = None
    weight: int | None = None
    priority: str = ""
    share: str = ""
    devices: tuple[str, ...] = ()
    memory_millionths: int | None = None  # a part of each device's usable memory, in place of memory_bytes
    kept: str = ""
    priority_class: str = ""
    share_devices: tuple[str, ...] = ()

    @property
    def memory(self) -> Amount | None:
        """The limit of memory, or None if not set."""
        if self.memory_bytes is None and self.memory_millionths is None:
            return None
        return Amount(self.memory_bytes or 0, self.memory_millionths or 0)

    @property
    def share_names(self) -> list[str]:
        """The names by which the container has requested its share: one for each device of a share of devices."""
        names = [share_name.bound(self.share, uuid) for uuid in self.share_devices] or [self.share]
        return names if self.share else []

    @property
    def has_limits(self) -> bool:
        """True if limits were set by hand, apart from a share."""
        return self.memory is not None or self.has_compute

    @property
    def has_compute(self) -> bool:
        """True if limits of compute time were set."""
        return self.limit_millionths is not None or self.weight is not None or bool(self.priority)


class Overrides:
    """All overrides, by cgroup id."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._all: dict[int, Override] = {}
        self._error = ""  # why the whole file could not be read, or empty
        self._errors: dict[int, str] = {}  # why the entry of a cgroup could not be read
        self._has_dropped = self._has_failed = False  # since the last write: removals, a failed retry
        self._read()

    def __iter__(self) -> Iterator[Override]:
        return iter(list(self._all.values()))

    def get(self, cgroup: int) -> Override | None:
        """Return the override of a cgroup, or None."""
        return self._all.get(cgroup)

    def put(self, override: Override) -> None:
        """Enter or replace an override. If the file cannot be written, raise OSError and do not enter the override."""
        after = self._all | {override.cgroup: override}
        self._write(after.values())
        self._all = after

    def drop(self, cgroups: Iterable[int]) -> None:
        """Remove overrides. If the file cannot be written, a later write_again() writes the file."""
        gone = set(cgroups) & set(self._all)
        if gone:
            self._all = {cgroup: override for cgroup, override in self._all.items() if cgroup not in gone}
            self._has_dropped = True
            self.write_again()

    def write_again(self) -> None:
        """Write the file if the file still has removed overrides."""
        if not self._has_dropped:
            return
        try:
            self._write(self._all.values())
        except OSError as error:
            if not self._has_failed:
                log.warning(
                    "%s cannot be written and still has removed overrides; the agent retries: %s", self._file, error
                )
            self._has_failed = True
        else:
            self._has_failed = False

    def unknown(self, cgroup: int) -> str:
        """Return why a cgroup's override could not be read at the agent's start, or an empty text without an error."""
        return self._error or self._errors.get(cgroup, "")

    def settle(self, kept: Iterable[Override]) -> None:
        """Record that the agent's start has decided about every cgroup. Raise OSError if the file cannot be written.

        If part of the file is invalid, the file is replaced, and the old file stays next to the new file with the
        suffix `.bad`.

        Args:
            kept: overrides for the cgroups whose entries could not be read.
        """
        if not (self._error or self._errors):
            return
        if self._file.is_dir():  # an engine creates a folder if a container mounts a missing file
            self._file.rmdir()
        elif self._file.exists():
            os.replace(self._file, self._file.with_name(f"{self._file.name}.bad"))
        self._all |= {override.cgroup: override for override in kept}  # also in the next write if this write fails
        self._write(self._all.values())
        self._error, self._errors = "", {}

    def _read(self) -> None:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            if not isinstance(found, list):
                raise ValueError("not a list")
        except FileNotFoundError:
            self._error = f"{self._file}, the file of overrides, is missing"
            return
        except (OSError, ValueError, RecursionError) as error:
            self._error = f"{self._file} cannot be read: {error}"
            log.error("%s: limits from before the start stay in force", self._error)
            return
        for entry in found:
            self._take(entry)

    def _take(self, entry: object) -> None:
        try:
            override = _override(entry)
            self._all[override.cgroup] = override
        except (ValueError, TypeError, KeyError, QuantityError) as error:
            text = f"{self._file} has an invalid entry: {error}"
            log.error("%s: limits from before the start stay in force", text)
            cgroup = entry.get("cgroup") if isinstance(entry, Mapping) else None
            if isinstance(cgroup, int):
                self._errors[cgroup] = text
            else:
                self._error = text

    def _write(self, overrides: Iterable[Override]) -> None:
        atomic_file.write(self._file, json.dumps([_entry(override) for override in overrides]))
        self._has_dropped = False


def _entry(override: Override) -> dict[str, object]:
    """Return the entry of an override for the file. Empty fields that older agents cannot read are left out."""
    entry = asdict(override)
    for name in ("devices", "kept", "memory_millionths", "priority_class"):
        if not entry[name]:
            del entry[name]
    return entry


def _override(entry: Any) -> Override:
    """Return the override of one entry of the file. Fields that this version does not have are ignored.

    Raises:
        ValueError, TypeError, KeyError: the entry is invalid.
    """
    known = {field.name for field in fields(Override)}
    said = {name: value for name, value in entry.items() if name in known} if isinstance(entry, Mapping) else {}
    devices = tuple(said.get("devices", ()))
    of_share = tuple(said.get("share_devices", devices))  # an older agent did not write the devices of a share apart
    override = Override(**{**said, "devices": devices, "share_devices": of_share})
    texts = dict.fromkeys(("path", "name", "priority", "share", "kept", "priority_class"), str)
    for name, kind in (*texts.items(), ("own", bool)):
        if not isinstance(getattr(override, name), kind):
            raise ValueError(f"{name}: {getattr(override, name)!r}")
    _check_number("cgroup", override.cgroup, (1 << 64) - 1)
    numbers = (("memory_bytes", 1 << 60), ("memory_millionths", MILLION))
    for name, most in (*numbers, ("limit_millionths", MILLION), ("weight", MOST_WEIGHT)):
        if getattr(override, name) is not None:
            _check_number(name, getattr(override, name), most)
    if override.priority and override.priority not in list(Priority):
        raise ValueError(f"priority: {override.priority!r}")
    if not all(isinstance(uuid, str) for uuid in (*override.devices, *override.share_devices)):
        raise ValueError(f"devices: {override.devices!r}, share_devices: {override.share_devices!r}")
    if override.share:
        share_name.parse(override.share)
    return override


def _check_number(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{name}: {value!r}")
