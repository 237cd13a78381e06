"""Tests of the mapped files of a process: the text of /proc/PID/maps gives the same results as the kernel's query."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path

import pytest

from fgpu_ebpf.linux import procmaps

NAMES = ("plain", "with a space", "with\nnewlines\n", "with\rreturns", "back\\slash", "back\\134slash")


@pytest.fixture
def maps(tmp_path: Path):
    """Return a descriptor of /proc/self/maps. This process maps files with unusual names and one deleted file."""
    held = []
    for name in NAMES:
        path = tmp_path / name
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            held.append(mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED))
    (tmp_path / NAMES[0]).unlink()
    fd = os.open("/proc/self/maps", os.O_RDONLY)
    yield fd
    os.close(fd)
    for mapped in held:
        mapped.close()


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch):
    """Return a function that simulates a kernel without the query from then on."""
    return lambda: monkeypatch.setattr(procmaps, "_PROCMAP_QUERY", 0xC0686699)


@pytest.mark.parametrize("which", [procmaps.NEXT_EXECUTABLE, procmaps.NEXT_SHARED])
def test_the_text_has_the_same_mappings_as_the_kernel_s_query(maps, unasked, which):
    asked = list(procmaps.each(maps, which))
    unasked()
    assert list(procmaps.each(maps, which)) == asked
    assert asked


def test_unusual_file_names_are_read_from_the_text(maps, unasked, tmp_path):
    unasked()
    found = [os.fsdecode(mapped.path) for mapped in procmaps.each(maps, procmaps.NEXT_SHARED)]
    # The kernel escapes only newlines, and not the backslash: in a name, the text of that escape is read as a newline.
    assert {path.removeprefix(f"{tmp_path}/") for path in found} >= {"plain (deleted)", *NAMES[1:]}


def test_the_mapping_at_an_address_is_found_by_the_query_and_in_the_text(maps, unasked):
    inside = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p).value
    asked = procmaps.find(maps, inside)
    unasked()
    assert procmaps.find(maps, inside) == asked
    assert asked.start <= inside < asked.end
    with pytest.raises(FileNotFoundError):
        procmaps.find(maps, 0)


def test_too_much_text_is_refused(maps, unasked, monkeypatch):
    unasked()
    monkeypatch.setattr(procmaps, "MOST_BYTES", 1000)
    with pytest.raises(OSError, match="too many") as refused:
        list(procmaps.each(maps, procmaps.NEXT_EXECUTABLE))
    assert refused.value.errno == errno.E2BIG
