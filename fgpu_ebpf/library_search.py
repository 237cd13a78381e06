"""Which files of libcuda and the shim a process maps: by their names, and where that is not all, by what they are.

Runs in: the threads of the agent's library workers, since reading a process's mappings can wait for the process. Never:
believes a name that a process has chosen to be the only one; looks at a file twice that has not changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fgpu_ebpf import elf, mappings, procfs
from fgpu_ebpf.library_class import Stamp
from fgpu_ebpf.mappings import File, Mapped
from fgpu_ebpf.probe_plan import REQUIRED
from fgpu_ebpf.procfs import Mapping

MOST_REMEMBERED = 1 << 14
_NAMES = ("libcuda.so.1", "libcuda.so")
_NO_COPY = (b"[vdso]", b"[vsyscall]", b"[uprobes]", b"[vectors]", b"[sigpage]")  # the kernel's own


@dataclass(frozen=True, slots=True)
class Found:
    """Of one process. `files` None: its mappings cannot be read, though it may live.

    `code`: it was searched, and executes memory that no file backs, in which a copy of libcuda could not be probed.
    `books`: it keeps an image's own limit.
    """

    files: list[Mapping] | None
    code: bool = False
    books: bool = False


class Search:
    """`known` says whether a file is probed already."""

    def __init__(self, known: Callable[[File], bool]) -> None:
        self._known = known
        self._others: dict[File, Stamp] = {}  # files that are no libcuda

    def by_name(self, pid: int) -> Found:
        """The files that have the names of libcuda or the shim."""
        files = procfs.fgpu_mappings(pid)
        return Found(files, books=bool(files) and procfs.keeps_books(pid))

    def by_contents(self, pid: int) -> Found:
        """The files that are libcuda, whatever their names are, and those with its names."""
        named = self.by_name(pid)
        if named.files is None:
            return named
        try:
            maps = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return Found(None)
        try:
            code = list(mappings.each(maps, mappings.NEXT_CODE))
        except OSError:
            return Found(None)
        finally:
            os.close(maps)
        files = dict.fromkeys((*named.files, *self._libraries(pid, code)))
        return Found(list(files), any(map(_of_no_file, code)), named.books)

    def _libraries(self, pid: int, code: list[Mapped]) -> Iterator[Mapping]:
        mapped = {(one.dev, one.ino): one for one in code if one.ino}
        for file, one in mapped.items():
            if self._known(file) or self._is_libcuda(pid, file, one):
                yield Mapping.of(one)

    def _is_libcuda(self, pid: int, file: File, one: Mapped) -> bool:
        try:
            fd = procfs.open_regular(f"/proc/{pid}/map_files/{one.start:x}-{one.end:x}", follow=True)
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
        finally:
            os.close(fd)

    def _remember(self, file: File, stamp: Stamp) -> None:
        if len(self._others) >= MOST_REMEMBERED:
            self._others.clear()
        self._others[file] = stamp


def is_libcuda(fd: int) -> bool:
    """Whether an open file calls itself libcuda, or has all functions that a driver must have. Raises OSError."""
    try:
        library = elf.Library(fd)
        return library.name in _NAMES or all(library.offset(name) is not None for name in REQUIRED)
    except elf.ElfError:
        return False


def _of_no_file(one: Mapped) -> bool:
    return not one.ino and one.path not in _NO_COPY
