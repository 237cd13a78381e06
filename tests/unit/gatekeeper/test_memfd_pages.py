"""Tests of control and status pages: which processes can write them, what a reader gets, and what close() leaves."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.abi import ControlPage, Row
from fgpu_ebpf.gatekeeper.memfd_pages import ControlMemory, StatusMemory, row_bytes


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:fgpu")


def raw(fd: int) -> bytes:
    return os.pread(fd, abi.PAGE_BYTES, 0)


def reopened(fd: int) -> int:
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR)


CONTROL_FORMS: list[Callable[[int], object]] = [
    lambda fd: os.write(fd, b"x"),
    lambda fd: os.write(reopened(fd), b"x"),
    lambda fd: mmap.mmap(fd, abi.PAGE_BYTES),
    lambda fd: mmap.mmap(reopened(fd), abi.PAGE_BYTES),
    lambda fd: os.ftruncate(reopened(fd), 0),
    lambda fd: os.ftruncate(reopened(fd), 8192),
    lambda fd: fcntl.fcntl(reopened(fd), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    lambda fd: os.posix_fallocate(reopened(fd), 0, 8192),
]


def test_readers_read_what_the_creator_writes_to_a_control_page() -> None:
    memory = ControlMemory()
    memory.page.epoch = 7
    memory.page.gates[3] = 1
    seen = ControlPage.from_buffer_copy(raw(memory.descriptor))
    assert (seen.epoch, list(seen.gates)) == (7, [0, 0, 0, 1] + [0] * 12)
    assert os.fstat(memory.descriptor).st_mode & 0o777 == 0o444
    memory.close()


@pytest.mark.parametrize("form", CONTROL_FORMS)
def test_a_control_page_cannot_be_written_resized_or_sealed_through_its_descriptor(
    form: Callable[[int], object],
) -> None:
    memory = ControlMemory()
    memory.page.epoch = 7
    with pytest.raises(OSError, match=r"Bad file|not permitted|denied"):
        form(memory.descriptor)
    assert ControlPage.from_buffer_copy(raw(memory.descriptor)).epoch == 7
    memory.page.epoch = 8  # no seal was added that would prevent the writer from writing
    assert len(raw(memory.descriptor)) == abi.PAGE_BYTES
    memory.close()


def test_a_status_page_is_written_through_its_descriptor_and_keeps_its_size() -> None:
    memory = StatusMemory()
    mine = mmap.mmap(memory.descriptor, abi.PAGE_BYTES)
    abi.StatusPage.from_buffer(mine).devices[2].launches = 1009
    assert memory.page.devices[2].launches == 1009
    assert memory.page.version == abi.LAYOUT
    for size in (0, 100, 8192):
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(memory.descriptor, size)
    with pytest.raises(OSError, match="not permitted"):
        fcntl.fcntl(memory.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    memory.close()


@pytest.mark.parametrize("kind", [ControlMemory, StatusMemory])
def test_closing_a_page_leaves_no_descriptor_and_no_mapping(kind: type[ControlMemory] | type[StatusMemory]) -> None:
    gc.collect()  # objects of other tests in cycles may own descriptors
    before, mapped = descriptors(), mappings()
    for _ in range(101):
        memory = kind()
        view = memory.page.devices
        memory.close()
        assert not hasattr(memory, "page")
        del view
    assert descriptors() == before
    assert mappings() == mapped


def test_a_page_that_was_left_can_be_written_until_its_last_reference_is_gone() -> None:
    before, mapped = descriptors(), mappings()
    memory = ControlMemory()
    memory.leave()
    memory.page.epoch = 7
    assert memory.page.epoch == 7
    del memory
    assert (descriptors(), mappings()) == (before, mapped)


def test_a_duplicated_descriptor_reads_a_page_after_its_creator_has_closed_the_page() -> None:
    memory = ControlMemory()
    memory.page.epoch = 7
    kept = os.dup(memory.descriptor)
    memory.close()
    assert ControlPage.from_buffer_copy(raw(kept)).epoch == 7
    os.close(kept)


def test_rows_are_published_under_the_sequence_word_and_bounded_in_number() -> None:
    memory = ControlMemory()
    memory.show(row_bytes([(11, 0, 1 << 40), (13, 1, 17)]))
    seen = ControlPage.from_buffer_copy(raw(memory.descriptor))
    assert (seen.sequence, seen.row_count) == (2, 2)
    assert [(r.pid, r.device, r.bytes) for r in seen.rows[:2]] == [(11, 0, 1 << 40), (13, 1, 17)]
    memory.show(b"")
    assert (memory.page.sequence, memory.page.row_count) == (4, 0)
    assert len(row_bytes([(1, 1, 1)] * 500)) == abi.ROWS * ctypes.sizeof(Row)
    memory.close()


def read_for(fd: int, seconds: float) -> tuple[int, int]:
    """Read tables for this time, and until the sequence word has confirmed 21 of them.

    Return how many it confirmed, and how many of these were torn.
    """
    memory = mmap.mmap(fd, abi.PAGE_BYTES, prot=mmap.PROT_READ)
    good = torn = 0
    end = time.monotonic() + seconds
    first, size = ControlPage.rows.offset, 64 * ctypes.sizeof(Row)
    at = ControlPage.sequence.offset
    while (now := time.monotonic()) < end or (good <= 20 and now < end + 60):
        before = memory[at : at + 4]
        table = memory[first : first + size]
        if before[0] % 2 == 0 and memory[at : at + 4] == before:
            good += 1
            torn += len({table[n : n + 16] for n in range(0, size, 16)}) != 1
    return good, torn


def test_a_reader_that_checks_the_sequence_word_never_reads_a_torn_table() -> None:
    memory = ControlMemory()
    tables = [row_bytes([(n, n, n << 32 | n)] * 64) for n in range(1, 200)]
    memory.show(tables[0])
    read, write = os.pipe()
    reader = os.fork()
    if reader == 0:
        try:
            os.write(write, repr(read_for(memory.descriptor, 0.5)).encode())
        finally:
            os._exit(0)
    while os.waitpid(reader, os.WNOHANG) == (0, 0):
        for table in tables:
            memory.show(table)
            time.sleep(0)
    good, torn = eval(os.read(read, 100))
    assert good > 20
    assert torn == 0
    memory.close()


def test_the_word_of_a_page_is_never_torn() -> None:
    memory = ControlMemory()
    values = {0x1111111111111111, 0xEEEEEEEEEEEEEEEE}
    memory.page.heartbeat_ns = 0x1111111111111111
    pid = os.fork()
    if pid == 0:
        seen = mmap.mmap(memory.descriptor, abi.PAGE_BYTES, prot=mmap.PROT_READ)
        words = memoryview(seen).cast("Q")
        at = ControlPage.heartbeat_ns.offset // 8
        end = time.monotonic() + 0.4
        bad = 0
        while time.monotonic() < end:
            bad += sum(words[at] not in values for _ in range(1000))
        os._exit(min(bad, 100))
    page = memory.page
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        for _ in range(1000):
            page.heartbeat_ns = 0xEEEEEEEEEEEEEEEE
            page.heartbeat_ns = 0x1111111111111111
    memory.close()
    assert os.waitstatus_to_exitcode(ended[1]) == 0, "the reader read a value that was never written"
