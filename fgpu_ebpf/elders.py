"""Processes that had the driver's library mapped before fgpu came to this host: adopted, reported, never killed.

Owns: who they are (found once, kept in a file until `fgpu detach` or reboot), and where they are now. Never: counts one
that came later: to be older than fgpu is nothing that a tenant can claim. On failure: where the file cannot be written
the next agent finds nobody older; where it cannot be read there is nobody.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from fgpu_ebpf import procfs, wholefile

log = logging.getLogger("fgpu.agent")
_SHIM = "libfgpu.so"


class Elders:
    """`known`: pid -> when it was started, in ticks since boot."""

    FILE = "elders.json"

    @classmethod
    def found(cls, run_dir: Path) -> Elders:
        """Those that an agent before this one has found since fgpu came, else those that are there now."""
        place = run_dir / cls.FILE
        if place.exists():
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                said = json.loads(place.read_text(encoding="utf-8"))
                return cls({int(pid): int(start) for pid, start in said.items()})
            return cls()
        known = {pid: start for pid in procfs.pids() if _uses_the_driver(pid) and (start := procfs.started(pid))}
        try:
            wholefile.write(place, json.dumps(known))
        except OSError as error:
            log.warning("cannot keep who was here before (%s): they are like any others after a restart", error)
        return cls(known)

    def __init__(self, known: Mapping[int, int] | None = None) -> None:
        self._known = dict(known or {})

    def __contains__(self, pid: object) -> bool:
        return pid in self._known

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def look(self) -> None:
        """Forgets those that have ended; a pid that is another's by now is nobody's."""
        self._known = {pid: start for pid, start in self._known.items() if procfs.started(pid) == start}

    def places(self) -> frozenset[str]:
        """The cgroups that they are in, and all around those, as they are now."""
        self.look()
        paths = {path for pid in self._known if (path := procfs.cgroup_path(pid))}
        return frozenset(above for path in paths for above in procfs.and_above(path))


def _uses_the_driver(pid: int) -> bool:
    """Without the shim: a program that has it came when fgpu was there."""
    names = [mapped.path.rpartition("/")[2] for mapped in procfs.fgpu_mappings(pid) or ()]
    return bool(names) and not any(name.startswith(_SHIM) for name in names)
