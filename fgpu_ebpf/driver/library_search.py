"""Search for the files of libcuda and the shim that a process maps, by their names and, if necessary, their contents.

This module runs in the agent's library workers, because reading a process's mappings can block on the process. A file
that is not libcuda is not read again while the file is unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fgpu_ebpf.driver import cuda_mappings
from fgpu_ebpf.driver.library_class import Stamp
from fgpu_ebpf.driver.probe_plan import REQUIRED
from fgpu_ebpf.linux import elf, mapped_files, procmaps
from fgpu_ebpf.linux.mapped_files import MappedFile
from fgpu_ebpf.linux.procmaps import File, Mapped

MOST_REMEMBERED = 1 << 14
_NAMES = ("libcuda.so.1", "libcuda.so")
_NO_COPY = (b"[vdso]", b"[vsyscall]", b"[uprobes]", b"[vectors]", b"[sigpage]")  # the kernel's own mappings


class Found(NamedTuple):
    """The files of one process.

    `files`: None if the mappings cannot be read, although the process may still be alive. `code`: the process executes
    memory that no file backs, so a copy of libcuda in this memory has no probes; only a search by contents sets `code`.
    `books`: the process is under an image's own limit.
    """

    files: list[MappedFile] | None
    code: bool = False
    books: bool = False


class Search:
    """The search for the files of libcuda and the shim. `known` returns whether a file is already probed."""

    def __init__(self, known: Callable[[File], bool]) -> None:
        self._known = known
        self._others: dict[File, Stamp] = {}  # files that are not libcuda, with their stamps when they were read

    def by_name(self, pid: int) -> Found:
        """Return the files of a process that have the names of libcuda or the shim."""
        files = cuda_mappings.fgpu_mappings(pid)
        return Found(files, books=bool(files) and cuda_mappings.keeps_books(pid))

    def by_contents(self, pid: int) -> Found:
        """Return the files of by_name(), and files with any other name that are libcuda by their contents."""
        named = self.by_name(pid)
        if named.files is None:
            return named
        try:
            with procmaps.opened(pid) as maps:
                code = list(procmaps.each(maps, procmaps.NEXT_CODE))
        except OSError:
            return Found(None)
        files = dict.fromkeys((*named.files, *self._libraries(pid, code)))
        return Found(list(files), any(map(_is_anonymous, code)), named.books)

    def _libraries(self, pid: int, code: list[Mapped]) -> Iterator[MappedFile]:
        mapped = {(one.dev, one.ino): one for one in code if one.ino}
        for file, one in mapped.items():
            if self._known(file) or self._is_libcuda(pid, file, one):
                yield MappedFile.of(one)

    def _is_libcuda(self, pid: int, file: File, one: Mapped) -> bool:
        try:
            fd = mapped_files.open_regular(f"/proc/{pid}/map_files/{one.start:x}-{one.end:x}", follow=True)
        except OSError:
            return False
        try:
            stamp = Stamp.of(fd)
            if self._others.get(file) == stamp:
                return False
            if is_libcuda(fd):
                return True
            self._remember(file, stamp)
            return False
        except OSError:  # a file that cannot be read does not hide the other files of the process
            return False
        finally:
            os.close(fd)

    def _remember(self, file: File, stamp: Stamp) -> None:
        if len(self._others) >= MOST_REMEMBERED:
            self._others.clear()
        self._others[file] = stamp


def is_libcuda(fd: int) -> bool:
    """Return whether an open file has libcuda's soname, or all required functions of a driver.

    Raise OSError on failure.
    """
    try:
        library = elf.Library(fd)
        return library.name in _NAMES or all(library.offset(name) is not None for name in REQUIRED)
    except elf.ElfError:
        return False


def _is_anonymous(one: Mapped) -> bool:
    return not one.ino and one.path not in _NO_COPY
