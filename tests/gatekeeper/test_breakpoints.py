"""A file counts as probed for a process only if the process's own memory has the breakpoint."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.linux import bpf, breakpoints, mapped_files
from fgpu_ebpf.linux.procmaps import File
from tests.gatekeeper.conftest import Keeper
from tests.gatekeeper.hello_client import Child, hello, in_cgroup, until

Make = Callable[..., Path]
PUSH, PAGE = b"\x55", mmap.PAGESIZE
CHECK = PAGE + 23  # a probed instruction: the file's second page
LIBC = ctypes.CDLL(None)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
HOLD = """
import mmap, os, sys
with open(sys.argv[1], "rb") as file:
    held = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC)
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Return three pages of an instruction that can be probed."""
    path = tmp_path / "libcuda.so.1"
    path.write_bytes(PUSH * (3 * PAGE))
    return path


@pytest.fixture
def probe() -> Iterator[Callable[..., None]]:
    """Return a function that puts a breakpoint into a file."""
    events: list[int] = []
    yield lambda path, at=CHECK: events.append(bpf.open_uprobe(str(path), at, False))
    for event in events:
        os.close(event)


def file_of(path: Path) -> File:
    return mapped_files.as_mapped(str(path))


def map_file(path: Path, flags: int = mmap.MAP_PRIVATE, offset: int = 0, bytes_: int = 3 * PAGE) -> None:
    """Map a file until this process exits."""
    protection = mmap.PROT_READ | mmap.PROT_EXEC
    with path.open("rb") as file:
        assert LIBC.mmap(None, bytes_, protection, flags, file.fileno(), offset) not in (None, 2**64 - 1)


def privately(path: Path) -> None:
    map_file(path)


def twice(path: Path) -> None:
    map_file(path, bytes_=PAGE)
    map_file(path, offset=PAGE, bytes_=PAGE)


def shared(path: Path) -> None:
    map_file(path, mmap.MAP_SHARED)


def in_part(path: Path) -> None:
    """Map the file except for the page with the breakpoint."""
    map_file(path, bytes_=PAGE)


def once_good_once_shared(path: Path) -> None:
    map_file(path)
    map_file(path, mmap.MAP_SHARED)


def written_over(path: Path) -> None:
    """Map the file and restore the original instruction, as a process may do in its own memory."""
    with path.open("rb") as file:
        at = LIBC.mmap(None, 3 * PAGE, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, file.fileno(), 0)
    assert LIBC.mprotect(ctypes.c_void_p(at), 3 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) == 0
    assert ctypes.string_at(at + CHECK, 1) == breakpoints.CODE
    ctypes.memmove(at + CHECK, PUSH, 1)


def too_often(path: Path) -> None:
    for _ in range(breakpoints.MOST_MAPPINGS + 1):
        map_file(path, bytes_=PAGE)
        LIBC.mmap(None, PAGE, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)  # keeps mappings apart


SEEN = {privately: True, twice: True, shared: False, in_part: False, once_good_once_shared: False,
        written_over: False, too_often: False}  # fmt: skip


@pytest.mark.parametrize("how", SEEN, ids=lambda how: how.__name__)
def test_a_process_is_answered_only_if_its_memory_has_the_breakpoints(
    keeper: Keeper, ledger: Ledger, tenant: Make, library: Path, probe: Callable[..., None], how: Callable[[Path], None]
) -> None:
    probe(library)
    ledger.enter_file(*file_of(library), CHECK)

    def ask() -> int:
        how(library)
        reply = hello(keeper.run)
        return reply.answer.code if reply else -1

    held = keeper.count("hello_held")
    assert in_cgroup(tenant(), ask) == (abi.Code.MANAGED if SEEN[how] else -1)
    if not SEEN[how]:
        until(lambda: keeper.count("hello_held") == held + 1)
    ledger.forget_file(*file_of(library))


def test_a_waiting_process_is_answered_once_the_breakpoint_exists(
    patient: Keeper, ledger: Ledger, tenant: Make, library: Path, probe: Callable[..., None]
) -> None:
    """The process has mapped the file already. The gatekeeper reads the file's contents in its memory repeatedly."""
    ledger.enter_file(*file_of(library), CHECK)

    def ask() -> int:
        map_file(library)
        reply = hello(patient.run, patience=60)
        return reply.answer.code if reply else -1

    held = patient.grows("hello_held")
    child = Child(tenant(), ask)
    held()
    time.sleep(0.2)
    assert not child.has_said()
    probe(library)
    assert child.result() == abi.Code.MANAGED
    ledger.forget_file(*file_of(library))


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """Mount a container's root with two layers."""
    for folder in ("lower", "upper", "work", "root"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lower/libcuda.so.1").write_bytes(PUSH * (3 * PAGE))
    layers = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", tmp_path / "root"], check=True)
    yield tmp_path / "root/libcuda.so.1"
    subprocess.run(["umount", "--lazy", tmp_path / "root"], check=True)


def holder(path: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"\n"
    return process


def test_a_copied_up_file_needs_new_breakpoints_for_later_processes(overlay: Path, probe: Callable[..., None]) -> None:
    """Overlayfs keeps (dev, ino): the breakpoints stay on the inode of the lower layer."""
    probe(overlay)
    file, before = file_of(overlay), holder(overlay)
    with overlay.open("ab"):  # as `: >>libcuda.so.1` does
        pass
    assert file_of(overlay) == file
    after = holder(overlay)
    seen = {name: breakpoints.is_set(process.pid, file, CHECK) for name, process in (("old", before), ("new", after))}
    assert seen == {"old": True, "new": False}
    with overlay.open("rb") as opened:
        assert not breakpoints.is_set_in_new_mappings(opened.fileno(), CHECK)
        probe(overlay)
        assert breakpoints.is_set_in_new_mappings(opened.fileno(), CHECK)
    assert [breakpoints.is_set(process.pid, file, CHECK) for process in (before, after)] == [True, True]
    for process in (before, after):
        process.communicate()


def test_a_breakpoint_in_a_file_s_contents_proves_no_probe(library: Path) -> None:
    library.write_bytes(breakpoints.CODE * (3 * PAGE))
    with library.open("rb") as file:
        assert not breakpoints.is_set_in_new_mappings(file.fileno(), CHECK)
        assert breakpoints.choose(file.fileno(), [CHECK]) is None


def test_only_suitable_offsets_are_chosen_as_the_checked_breakpoint(library: Path) -> None:
    """A breakpoint proves nothing at a five-byte no-operation, which the kernel may replace by a call.

    It also proves nothing at an offset where the file itself has a breakpoint instruction, that the map cannot hold, or
    that has another meaning in the map.
    """
    text = bytearray(PUSH * (3 * PAGE))
    text[100:105] = b"\x0f\x1f\x44\x00\x00"
    text[200:201] = breakpoints.CODE
    library.write_bytes(text)
    with library.open("rb") as file:
        assert breakpoints.choose(file.fileno(), [breakpoints.UNCHECKED, 100, 200, 300, 400]) == 300
        assert breakpoints.choose(file.fileno(), [1 << 32]) is None


def test_a_truncated_file_causes_no_error(library: Path) -> None:
    with library.open("r+b") as file:
        file.truncate(0)
        assert not breakpoints.is_set_in_new_mappings(file.fileno(), CHECK)


def test_a_process_that_no_longer_maps_the_file_causes_no_error(library: Path) -> None:
    assert breakpoints.is_set(os.getpid(), file_of(library), CHECK) is None
    assert breakpoints.is_set(1 << 22, file_of(library), CHECK) is None
