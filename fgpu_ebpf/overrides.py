"""What was set by hand: `fgpu set` and `fgpu run`, kept over restarts of the agent, not over a reboot.

Owns: one file under /run. Never: decides what wins (`tenants` does). On failure: a file that cannot be read is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fgpu_ebpf import wholefile
from fgpu_ebpf.quantities import Amount


@dataclass(frozen=True, slots=True)
class Override:
    """What was said of one cgroup, on each device; None and "": nothing, so that a policy holds.

    `own`: the agent made the cgroup itself, for `fgpu run`. `share`: the container asked for it by name when it was
    started; policies bound it. `devices`: UUIDs of those that the share is of, and of no other; empty: of each.
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

    @property
    def memory(self) -> Amount | None:
        """The limit of memory; None: nothing is said of it."""
        if self.memory_bytes is None and self.memory_millionths is None:
            return None
        return Amount(self.memory_bytes or 0, self.memory_millionths or 0)

    @property
    def says_compute(self) -> bool:
        """Something of it is about compute time."""
        return self.limit_millionths is not None or self.weight is not None or bool(self.priority)


class Overrides:
    """All of them, by cgroup id."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._all = {override.cgroup: override for override in self._read()}

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
        """Forgets these, those that are there."""
        gone = set(cgroups) & set(self._all)
        if gone:
            self._all = {cgroup: override for cgroup, override in self._all.items() if cgroup not in gone}
            self._write(self._all.values())

    def _read(self) -> Iterable[Override]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return [Override(**{**entry, "devices": tuple(entry.get("devices", ()))}) for entry in found]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            return []

    def _write(self, overrides: Iterable[Override]) -> None:
        wholefile.write(self._file, json.dumps([_entry(override) for override in overrides]))


def _entry(override: Override) -> dict[str, object]:
    """As the file has it: without fields that say nothing and that an older agent does not know."""
    entry = asdict(override)
    if not override.devices:
        del entry["devices"]
    if override.memory_millionths is None:
        del entry["memory_millionths"]
    return entry
