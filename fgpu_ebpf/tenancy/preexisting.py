"""Processes that mapped the driver's library before fgpu was installed, or before a change of the layout of pages.

They are adopted and reported, never killed. They are found once and kept in a file until `fgpu detach` or a reboot. A
process that starts later is never counted, so that no tenant can claim to be preexisting. If the file cannot be
written, the next agent finds no such process; if it cannot be read, there is none. The enforcer uses this module, in
the agent's main loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from fgpu_ebpf.driver import cuda_mappings
from fgpu_ebpf.linux import atomic_file, procfs

log = logging.getLogger("fgpu.agent")
_SHIM = "libfgpu.so"


class PreexistingProcesses:
    """The preexisting processes. `known`: start time in ticks since boot, by pid."""

    FILE = "elders.json"

    @classmethod
    def found(cls, run_dir: Path, layout_changes: bool = False) -> PreexistingProcesses:
        """Return the processes that an earlier agent has recorded; otherwise search for them.

        Args:
            layout_changes: the layout of pages changes, so that processes with a shim count too: this version does not
                understand their requests.
        """
        place = run_dir / cls.FILE
        if place.exists() and not layout_changes:
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                said = json.loads(place.read_text(encoding="utf-8"))
                return cls({int(pid): int(start) for pid, start in said.items()})
            return cls()
        known = {
            pid: start
            for pid in procfs.pids()
            if _uses_the_driver(pid, layout_changes) and (start := procfs.started(pid))
        }
        try:
            atomic_file.write(place, json.dumps(known))
        except OSError as error:
            log.warning("cannot write the list of preexisting processes, which a restart needs: %s", error)
        return cls(known)

    def __init__(self, known: Mapping[int, int] | None = None) -> None:
        self._known = dict(known or {})

    def __contains__(self, pid: object) -> bool:
        return pid in self._known

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def look(self) -> None:
        """Remove processes that have exited, even if another process has the pid by now."""
        self._known = {pid: start for pid, start in self._known.items() if procfs.started(pid) == start}

    def places(self) -> frozenset[str]:
        """Return the cgroups that they are in now, and all cgroups around those."""
        self.look()
        paths = {path for pid in self._known if (path := procfs.cgroup_path(pid))}
        return frozenset(above for path in paths for above in procfs.and_above(path))


def _uses_the_driver(pid: int, with_the_shim: bool) -> bool:
    """Return True if the process maps the driver's library. One with a shim counts only if `with_the_shim`."""
    names = [mapped.path.rpartition("/")[2] for mapped in cuda_mappings.fgpu_mappings(pid) or ()]
    return bool(names) and (with_the_shim or not any(name.startswith(_SHIM) for name in names))
