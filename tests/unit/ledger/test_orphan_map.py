"""Tests of the check of many levels for orphaned bytes: a page is opened once, and a replaced page is opened again."""

from __future__ import annotations

import os
import struct

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.orphans import OrphanMap

LEVEL, OTHER = 7, 8


class Kernel:
    """The kernel's usage pages, as files in memory. `ids`: the ids of the pages, by level."""

    def __init__(self) -> None:
        self.ids: dict[int, int] = {}
        self.opened: list[int] = []
        self._files: dict[int, int] = {}
        self.orphans = OrphanMap({}, lambda *_: 0, self.open)

    def make(self, level: int, orphaned: int = 0) -> None:
        """Make the page of a level, in place of an earlier page."""
        self.ids[level] = max(self.ids.values(), default=0) + 1
        self._files[level] = os.memfd_create("page")
        os.ftruncate(self._files[level], abi.PAGE_BYTES)
        self.charge(level, orphaned)

    def charge(self, level: int, orphaned: int) -> None:
        """Set the orphaned bytes of the last device."""
        at = abi.UsagePage.orphaned.offset + abi.UsagePage.orphaned.size - 8
        os.pwrite(self._files[level], struct.pack("Q", orphaned), at)

    def open(self, level: int) -> int | None:
        self.opened.append(level)
        return os.dup(self._files[level]) if level in self.ids else None

    def found(self) -> list[int]:
        return self.orphans.levels_with_bytes([LEVEL, OTHER], self.ids)


@pytest.fixture
def kernel() -> Kernel:
    kernel = Kernel()
    kernel.make(LEVEL)
    kernel.make(OTHER, 5)
    return kernel


def test_a_page_is_opened_once_and_its_present_bytes_count(kernel: Kernel) -> None:
    assert kernel.found() == [OTHER]
    kernel.charge(LEVEL, 3)
    kernel.charge(OTHER, 0)
    assert kernel.found() == [LEVEL]
    assert kernel.opened == [LEVEL, OTHER]


def test_the_page_of_a_level_that_was_made_again_replaces_the_earlier_page(kernel: Kernel) -> None:
    assert kernel.found() == [OTHER]
    kernel.make(LEVEL, 3)
    assert kernel.found() == [LEVEL, OTHER]


def test_the_page_of_a_removed_level_is_unmapped(kernel: Kernel) -> None:
    assert kernel.found() == [OTHER]
    del kernel.ids[OTHER]
    assert kernel.found() == []
    kernel.make(OTHER, 1)
    assert kernel.found() == [OTHER]
    assert kernel.opened == [LEVEL, OTHER, OTHER]
