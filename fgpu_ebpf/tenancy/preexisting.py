"""Processes that mapped the driver's library before fgpu was installed, or before a change of the layout of pages.

Preexisting processes are adopted and reported, and never killed. The agent searches for preexisting processes once and
stores the result in a file, which stays until `fgpu detach` or a reboot. Processes that start after the search do not
count, so that no tenant can claim to be preexisting. A process that blocks the search does not count either. If the
file exists and cannot be read, there are no preexisting processes. If the file cannot be written, the agent tries again
regularly. If no attempt succeeds, the next agent searches again. The module runs in the agent's main loop.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fgpu_ebpf.driver import cuda_mappings
from fgpu_ebpf.linux import atomic_file, procfs
from fgpu_ebpf.linux.mapped_files import MappedFile

log = logging.getLogger("fgpu.agent")
_SHIM = "libfgpu.so"
MOST_SECONDS = 30.0  # of a search, while processes that block it are skipped; less than the start's time limit


class PreexistingProcesses:
    """The preexisting processes. `known`: the start times by pid, in clock ticks since boot."""

    FILE = "elders.json"

    @classmethod
    def found(cls, run_dir: Path, layout_changes: bool = False) -> PreexistingProcesses:
        """Return the processes that an earlier agent has stored, or search for processes and store the result.

        Args:
            run_dir: the folder of the file.
            layout_changes: whether the layout of pages changes. If True, processes with a shim count too, because this
                version cannot read their requests.

        Raises:
            OSError: no thread can be started for the search.
        """
        place = run_dir / cls.FILE
        if place.exists() and not layout_changes:
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                said = json.loads(place.read_text(encoding="utf-8"))
                return cls({int(pid): int(start) for pid, start in said.items()})
            return cls()
        pids = procfs.pids()
        mapped = cuda_mappings.fgpu_mappings_of(pids, MOST_SECONDS)
        if blocking := set(pids) - mapped.keys():
            log.warning("the mappings of %d processes cannot be read: they do not count as preexisting", len(blocking))
        using = [pid for pid, files in mapped.items() if _uses_the_driver(files or (), layout_changes)]
        made = cls({pid: start for pid in using if (start := procfs.started(pid))}, place)
        made._store(logging.WARNING)
        return made

    def __init__(self, known: Mapping[int, int] | None = None, place: Path | None = None) -> None:
        """Initialize the set. `place`: the file in which the set is stored; None: the set is not stored."""
        self._known, self._place = dict(known or {}), place

    def _store(self, level: int = logging.DEBUG) -> None:
        if self._place:
            try:
                atomic_file.write(self._place, json.dumps(self._known))
                self._place = None
            except OSError as error:
                log.log(level, "cannot write the list of preexisting processes, which the next agent needs: %s", error)

    def __contains__(self, pid: object) -> bool:
        return pid in self._known

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def look(self) -> None:
        """Remove exited processes, even if another process has the pid now. Write the file if a write is due."""
        self._known = {pid: start for pid, start in self._known.items() if procfs.started(pid) == start}
        self._store()

    def places(self) -> frozenset[str]:
        """Return the cgroups that contain a preexisting process now, directly or in a cgroup inside."""
        self.look()
        paths = {path for pid in self._known if (path := procfs.cgroup_path(pid))}
        return frozenset(above for path in paths for above in procfs.and_above(path))


def _uses_the_driver(files: Sequence[MappedFile], with_the_shim: bool) -> bool:
    """Return True if the driver's library is mapped. A process with a shim counts only if `with_the_shim`."""
    names = [file.path.rpartition("/")[2] for file in files]
    return bool(names) and (with_the_shim or not any(name.startswith(_SHIM) for name in names))
