"""What was set by hand: `fgpu set` and `fgpu run`, kept over restarts of the agent, not over a reboot.

Owns: one file under /run. Never: decides what wins (`tenants` does). On failure: what cannot be understood of the file
is not taken for absent: `unknown` has the reason, for one cgroup or for all.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fgpu_ebpf import shares, wholefile
from fgpu_ebpf.policy import Priority
from fgpu_ebpf.quantities import MILLION, Amount, QuantityError

log = logging.getLogger("fgpu.agent")
MOST_WEIGHT = 10_000


@dataclass(frozen=True, slots=True)
class Override:
    """What was said of one cgroup, on each device; None and "": nothing, so that a policy holds.

    `own`: the agent made the cgroup itself, for `fgpu run`. `share`: the container asked for it by name when it was
    started; policies bound it. `devices`: UUIDs of those that it may use, and of no other; empty: any.
    `kept`: why the cgroup keeps what the kernel has pinned for it, until something else is said of it.
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
    memory_millionths: int | None = None  # of each device, in place of memory_bytes
    kept: str = ""

    @property
    def memory(self) -> Amount | None:
        """The limit of memory; None: nothing is said of it."""
        if self.memory_bytes is None and self.memory_millionths is None:
            return None
        return Amount(self.memory_bytes or 0, self.memory_millionths or 0)

    @property
    def says_limits(self) -> bool:
        """Something was set by hand, beside a share."""
        return self.memory is not None or self.says_compute

    @property
    def says_compute(self) -> bool:
        """Something of it is about compute time."""
        return self.limit_millionths is not None or self.weight is not None or bool(self.priority)


class Overrides:
    """All of them, by cgroup id."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._all: dict[int, Override] = {}
        self._fault = ""  # why nothing of the file is known
        self._faults: dict[int, str] = {}  # the same of one cgroup
        self._has_dropped = self._has_failed = False  # since the file was last written
        self._read()

    def __iter__(self) -> Iterator[Override]:
        return iter(list(self._all.values()))

    def get(self, cgroup: int) -> Override | None:
        """That of a cgroup."""
        return self._all.get(cgroup)

    def put(self, override: Override) -> None:
        """Enters or replaces one. Raises OSError: it would be forgotten, and is not taken."""
        after = self._all | {override.cgroup: override}
        self._write(after.values())
        self._all = after

    def drop(self, cgroups: Iterable[int]) -> None:
        """Forgets these, those that are there. Where the file cannot be written, write_again() does."""
        gone = set(cgroups) & set(self._all)
        if gone:
            self._all = {cgroup: override for cgroup, override in self._all.items() if cgroup not in gone}
            self._has_dropped = True
            self.write_again()

    def write_again(self) -> None:
        """Writes what was dropped, if the file still has it."""
        if not self._has_dropped:
            return
        try:
            self._write(self._all.values())
        except OSError as error:
            if not self._has_failed:
                log.warning("%s still has cgroups that are gone, and is written again: %s", self._file, error)
            self._has_failed = True
        else:
            self._has_failed = False

    def unknown(self, cgroup: int) -> str:
        """Why it is not known what was set on a cgroup before this start; empty: it is."""
        return self._fault or self._faults.get(cgroup, "")

    def settle(self, kept: Iterable[Override]) -> None:
        """The start has looked at every cgroup; of those in `kept`, what was set is not known. Raises OSError.

        The file is written anew where something of it was not understood, and the old one is left beside it.
        """
        if not (self._fault or self._faults):
            return
        if self._file.is_dir():  # engines make one where a container is given a file that is not there
            self._file.rmdir()
        elif self._file.exists():
            os.replace(self._file, self._file.with_name(f"{self._file.name}.bad"))
        self._all |= {override.cgroup: override for override in kept}  # written with the next one, if not now
        self._write(self._all.values())
        self._fault, self._faults = "", {}

    def _read(self) -> None:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            if not isinstance(found, list):
                raise ValueError("is no list")
        except FileNotFoundError:
            self._fault = f"{self._file}, which says what was set by hand, is not there"
            return
        except (OSError, ValueError, RecursionError) as error:
            self._fault = f"{self._file} cannot be read: {error}"
            log.error("%s: pinned limits stay as they are", self._fault)
            return
        for entry in found:
            self._take(entry)

    def _take(self, entry: object) -> None:
        try:
            override = _override(entry)
            self._all[override.cgroup] = override
        except (ValueError, TypeError, KeyError, QuantityError) as error:
            fault = f"{self._file} has an entry that cannot be understood: {error}"
            log.error("%s: pinned limits stay as they are", fault)
            cgroup = entry.get("cgroup") if isinstance(entry, Mapping) else None
            if isinstance(cgroup, int):
                self._faults[cgroup] = fault
            else:
                self._fault = fault

    def _write(self, overrides: Iterable[Override]) -> None:
        wholefile.write(self._file, json.dumps([_entry(override) for override in overrides]))
        self._has_dropped = False


def _entry(override: Override) -> dict[str, object]:
    """As the file has it: without fields that say nothing and that an older agent does not know."""
    entry = asdict(override)
    for name in ("devices", "kept", "memory_millionths"):
        if not entry[name]:
            del entry[name]
    return entry


def _override(entry: Any) -> Override:
    """One entry of the file; fields that this version does not know are left out. Raises ValueError and others."""
    known = {field.name for field in fields(Override)}
    said = {name: value for name, value in entry.items() if name in known} if isinstance(entry, Mapping) else {}
    override = Override(**{**said, "devices": tuple(said.get("devices", ()))})
    for name, kind in (("path", str), ("name", str), ("own", bool), ("priority", str), ("share", str), ("kept", str)):
        if not isinstance(getattr(override, name), kind):
            raise ValueError(f"{name}: {getattr(override, name)!r}")
    _check_number("cgroup", override.cgroup, (1 << 64) - 1)
    numbers = (("memory_bytes", 1 << 60), ("memory_millionths", MILLION))
    for name, most in (*numbers, ("limit_millionths", MILLION), ("weight", MOST_WEIGHT)):
        if getattr(override, name) is not None:
            _check_number(name, getattr(override, name), most)
    if override.priority and override.priority not in list(Priority):
        raise ValueError(f"priority: {override.priority!r}")
    if not all(isinstance(uuid, str) for uuid in override.devices):
        raise ValueError(f"devices: {override.devices!r}")
    if override.share:
        shares.parse(override.share)
    return override


def _check_number(name: str, value: object, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{name}: {value!r}")
