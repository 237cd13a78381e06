"""Search for the files of libcuda and the shim that a process maps, by their names.

This module runs in the agent's main thread and worker threads, and in `fgpu detach`. Reading the mappings of a process
can block on the process.
"""

from __future__ import annotations

from collections.abc import Iterable

from fgpu_ebpf.linux import breakpoints, procmaps, worker_threads
from fgpu_ebpf.linux.mapped_files import MappedFile

SEARCH_SECONDS = 5.0
BOOKS = b"/run/fgpu/books"  # the shim's own ledger for an image with its own limit


def fgpu_mappings(pid: int) -> list[MappedFile] | None:
    """Return the libcuda and shim files that a process has mapped executable, without duplicates.

    The result is None if the process has exited, has no memory of its own or has too many mappings. From Linux
    6.11 on, the function queries one executable mapping after the other, because the text of all mappings takes five
    times as long.
    """
    try:
        with procmaps.opened(pid) as maps:
            return list(dict.fromkeys(map(MappedFile.of, procmaps.with_names(maps, breakpoints.CUDA_NAMES))))
    except OSError:
        return None


def fgpu_mappings_of(pids: Iterable[int], most: float) -> dict[int, list[MappedFile] | None]:
    """Return the result of fgpu_mappings() for several processes, which are read in worker threads.

    The call ends if no reading has finished for SEARCH_SECONDS, and after `most` seconds. Processes that were not read,
    because they block the reading of their mappings, are left out. Raise OSError if no thread can be started.
    """
    return worker_threads.finished(fgpu_mappings, pids, SEARCH_SECONDS, most)


def keeps_books(pid: int) -> bool:
    """Return whether a process has mapped the ledger of an image's own limit; False if its mappings are unreadable."""
    try:
        with procmaps.opened(pid) as maps:
            return any(found.path.endswith(BOOKS) for found in procmaps.each(maps, procmaps.NEXT_SHARED))
    except OSError:
        return False
