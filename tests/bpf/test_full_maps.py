"""Full maps are counted, and never silent.

A process without an entry is refused. An allocation without one stays charged until its process exits.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Iterator

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.ledger import resolutions
from fgpu_ebpf.linux import bpf
from tests.bpf.conftest import CONTEXT, MIB, Kernel, anomalies, assert_corrected, assert_left, wait_until

ADMITTED = 1
AT_ONCE = 4096  # number of entries that are filled at once
CONTEXT_KIND = abi.Kind.CONTEXT
NOBODY = 1 << 23  # a number above every pid
VALUES = {
    "allocations": abi.Allocation,
    "threads": abi.Thread,
    "processes": abi.Process,
    "counters": ctypes.c_uint64,
}


class NoRoom(Exception):
    """The kernel's E2BIG."""


class Full:
    """A map that is full of entries without a process."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self._fd = bpf.pinned(kernel.pins / "maps" / name)
        self._name, self._entered = name, 0
        self.fill()
        assert self._entered > 1000

    def _key(self, n: int) -> bytes:
        if self._name == "allocations":
            return struct.pack("IIQQ", NOBODY, 0, 1, n)
        if self._name == "counters":
            return struct.pack("QQ", NOBODY, n)
        return (
            (NOBODY << 32 | n).to_bytes(8, "little") if self._name == "threads" else (NOBODY + n).to_bytes(4, "little")
        )

    def fill(self) -> None:
        """Fill the map to the last entry."""
        for n in (AT_ONCE, 1):
            with contextlib.suppress(NoRoom):
                while True:
                    self._enter(n)
                    self._entered += n

    def _enter(self, number: int) -> None:
        value = bytes(ctypes.sizeof(VALUES[self._name]))
        keys = map(self._key, range(self._entered, self._entered + number))
        try:
            bpf.update_all(self._fd, dict.fromkeys(keys, value))
        except OSError as error:
            raise NoRoom if error.errno == errno.E2BIG else error from error

    def make(self, room: int) -> None:
        """Free this many entries, or all entries of the test."""
        for _ in range(min(room, self._entered)):
            self._entered -= 1
            assert bpf.delete(self._fd, self._key(self._entered))

    def close(self) -> None:
        """Remove all entries without a process."""
        for first in range(0, self._entered, AT_ONCE):
            bpf.delete_all(self._fd, list(map(self._key, range(first, min(first + AT_ONCE, self._entered)))))
        os.close(self._fd)


@contextlib.contextmanager
def full(kernel: Kernel, name: str) -> Iterator[Full]:
    """Keep a map full until the end of the block."""
    whole = Full(kernel, name)
    try:
        yield whole
    finally:
        whole.close()


@pytest.fixture
def counted(kernel) -> Iterator[None]:
    """Check that the test met a full map, and that it was counted."""
    before = anomalies(kernel)["FULL"]
    yield
    assert anomalies(kernel)["FULL"] > before


# -- threads and processes


@pytest.mark.parametrize("name", ["threads", "processes"])
def test_a_process_without_room_for_its_entry_is_not_admitted(kernel, counted, level, client, name):
    with full(kernel, name):
        assert client(f"admit({4 * MIB})") is None, "the kernel gives no verdict"
        client(f"alloc(0x1000, {4 * MIB})")  # a bypass, which NVML shows
        assert level.used == 0
    assert client(f"admit({4 * MIB})") == ADMITTED
    client(f"alloc(0x2000, {4 * MIB})")
    client("free(0x1000)")
    assert level.used == 4 * MIB
    client.kill()
    assert_left(level, 4 * MIB)


def test_an_unrecorded_free_is_detected_when_the_pointer_is_returned_again(kernel, counted, level, client):
    client(f"alloc(0x1000, {4 * MIB})")
    client("import threading")
    with full(kernel, "threads"):
        client("thread = threading.Thread(target=lambda: free(0x1000))")
        client("(thread.start(), thread.join())")
        assert level.used == 4 * MIB
    client(f"alloc(0x1000, {6 * MIB})")
    assert (level.used, client.entry(kernel).overhead[0]) == (10 * MIB, 6 * MIB)
    assert_corrected(kernel, client, 2 * MIB)
    client.kill()
    assert_left(level, 6 * MIB)


# -- counters


def test_a_refusal_without_a_counter_of_its_own_is_counted(kernel, counted, level, client):
    with full(kernel, "counters"):
        assert client(f"admit({2048 * MIB})") == 0
    assert level.usage().refused == 1


# -- allocations


@pytest.fixture(scope="module")
def filled(kernel) -> Iterator[Full]:
    with full(kernel, "allocations") as whole:
        yield whole


@pytest.fixture
def allocations(filled: Full) -> Full:
    """Return a full map, even if an earlier test has freed entries."""
    filled.fill()
    return filled


def test_memory_without_an_entry_stays_charged_until_the_process_exits(kernel, allocations, counted, level, client):
    for i in range(23):
        assert client(f"admit({4 * MIB})") == ADMITTED
        client(f"alloc({0x1000 * (i + 1)}, {4 * MIB})")
    client(f"create(7, {6 * MIB})")
    client(f"map_(0x100000, {6 * MIB}, 7)")
    held = (23 * 4 + 6) * MIB
    assert level.used == held
    for i in range(23):
        client(f"free({0x1000 * (i + 1)})")
    client(f"unmap(0x100000, {6 * MIB})")
    client("release(7)")
    assert level.used == held, "the freed size is not known"
    assert client(f"admit({1024 * MIB - held + 1})") != ADMITTED
    assert client(f"admit({1024 * MIB - held})") == ADMITTED
    client.kill()
    assert_left(level, 1024 * MIB)


def test_a_mapping_without_an_entry_keeps_its_memory_charged(kernel, allocations, counted, level, client):
    allocations.make(1)
    client(f"create(7, {4 * MIB})")
    client(f"map_(0x100000, {4 * MIB}, 7)")
    client("release(7)")
    client(f"unmap(0x100000, {4 * MIB})")
    assert level.used == 4 * MIB
    client.kill()
    assert_left(level, 4 * MIB)


@pytest.mark.usefixtures("context_bytes")
def test_a_context_without_an_entry_stays_charged_until_the_process_exits(allocations, counted, level, client):
    client(f"admit(0, kind={int(CONTEXT_KIND)})")
    client("context(0xabc)")
    client(f"alloc(0x1000, {4 * MIB})")
    client("destroy(0xabc)")
    assert level.used == CONTEXT + 4 * MIB
    client.kill()
    assert_left(level, CONTEXT + 4 * MIB)


def test_memory_with_an_entry_is_released(kernel, allocations, level, client):
    before = anomalies(kernel)["FULL"]
    allocations.make(23)
    for i in range(23):
        client(f"alloc({0x1000 * (i + 1)}, {MIB})")
    assert level.used == 23 * MIB
    for i in range(23):
        client(f"free({0x1000 * (i + 1)})")
    assert level.used == 0
    assert anomalies(kernel)["FULL"] == before


def test_memory_stays_charged_after_a_failed_free_without_room_for_its_entry(
    allocations, counted, level, client, tmp_path
):
    allocations.make(1)
    client(f"alloc(0x1000, {4 * MIB})")
    begun, over = tmp_path / "begun", tmp_path / "over"
    client(f"linger({str(begun)!r}, {str(over)!r})")
    client.send("free(0x1000, code=1)")
    wait_until(begun.exists)
    allocations.fill()
    over.touch()
    client("0")  # the reply to the free
    client("0")
    assert level.used == 4 * MIB
    client("free(0x1000)")
    assert level.used == 4 * MIB, "the freed size is not known"
    client.kill()
    assert_left(level, 4 * MIB)


# -- decisions about cgroups


def test_unmanaged_cgroups_make_room_for_a_managed_one(kernel, level):
    ledger, first = kernel.ledger, NOBODY << 8
    values = {first + n: n % 2 * 2 for n in range(resolutions.MOST)}  # unmanaged, refused
    fd = bpf.pinned(kernel.pins / "maps/resolved")
    with contextlib.suppress(OSError):
        for cgroup, value in values.items():
            bpf.update(fd, struct.pack("Q", cgroup), struct.pack("I", value))
    try:
        assert ledger.resolutions.count() == resolutions.MOST
        with contextlib.suppress(OSError):
            ledger.resolve(level.cgroup, True)
        assert ledger.resolved(level.cgroup) is True
        ledger.resolve(first - 1, False)
        assert ledger.resolved(first - 1) is False
        assert ledger.resolutions.count() > resolutions.MOST // 2
    finally:
        for cgroup in [*values, first - 1]:
            bpf.delete(fd, struct.pack("Q", cgroup))
        os.close(fd)


def test_managed_cgroups_do_not_make_room(kernel):
    fd = bpf.pinned(kernel.pins / "maps/resolved")
    known = [NOBODY << 8 | n for n in range(resolutions.MOST)]
    with contextlib.suppress(OSError):
        for cgroup in known:
            bpf.update(fd, struct.pack("Q", cgroup), struct.pack("I", 1))
    try:
        with pytest.raises(OSError, match=r"\[Errno 7\]"):
            kernel.ledger.resolve(NOBODY, False)
    finally:
        for cgroup in known:
            bpf.delete(fd, struct.pack("Q", cgroup))
        os.close(fd)
