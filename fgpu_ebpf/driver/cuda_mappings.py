"""The files of libcuda and the shim that a process maps, by their names.

The agent uses this module in its main thread and its worker threads, and so does `fgpu detach`. Reading the mappings of
a process can block on the process.
"""

from __future__ import annotations

from fgpu_ebpf.linux import breakpoints, procmaps
from fgpu_ebpf.linux.mapped_files import MappedFile

BOOKS = b"/run/fgpu/books"  # the ledger that the shim keeps for an image with a limit of its own


def fgpu_mappings(pid: int) -> list[MappedFile] | None:
    """Return the libcuda and shim files that a process has mapped executable, each once.

    None: unknown, because the process is gone, has no memory of its own or maps too much. The kernel is asked for
    one executable file after the other: the text of all mappings takes five times as long to make and to read.
    """
    try:
        with procmaps.opened(pid) as maps:
            return list(dict.fromkeys(map(MappedFile.of, procmaps.with_names(maps, breakpoints.CUDA_NAMES))))
    except OSError:
        return None


def keeps_books(pid: int) -> bool:
    """Return whether a process has mapped the ledger of an image's own limit; False if that cannot be read."""
    try:
        with procmaps.opened(pid) as maps:
            return any(found.path.endswith(BOOKS) for found in procmaps.each(maps, procmaps.NEXT_SHARED))
    except OSError:
        return False
