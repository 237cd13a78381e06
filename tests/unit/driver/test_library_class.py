"""Tests of classes of files: which files of libcuda and the shim are trusted, and for how long."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.driver import library_class
from fgpu_ebpf.driver.library_class import DIGEST, Role, Stamp, Trust
from tests.unit.root_kit import needs_root

FILE, OTHER, SHIM = (1, 23), (1, 101), (2, 7)
TWIN = (2, 23)  # FILE's inode number on another file system
STAMP = Stamp(5, 1, 2)
A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "libcuda.so.1"
    path.write_bytes(b"contents")
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def test_the_host_s_files_are_classified_by_inode_and_other_files_by_contents() -> None:
    trust = Trust({SHIM: "/store/1/libfgpu.so"}, {"a" * 64: 5}, [B])
    trust.trust_file(FILE, Role.HOST)
    found = [trust.role(file) for file in (FILE, SHIM, OTHER, TWIN)]
    assert found == [Role.HOST, Role.SHIM, Role.UNKNOWN, Role.UNKNOWN]
    for digest, role in ((A, Role.SHIM), (B, Role.LISTED), (C, Role.UNKNOWN), ("", Role.UNKNOWN)):
        trust.learn(OTHER, STAMP, digest)
        assert trust.role(OTHER, STAMP) is role
    trust.trust_contents(C)
    assert trust.listed == sorted([B, C])
    trust.learn(OTHER, STAMP, C)
    assert trust.role(OTHER, STAMP) is Role.LISTED
    trust.learn(FILE, STAMP, A)
    assert trust.role(FILE, STAMP) is Role.HOST


@pytest.mark.parametrize("changed", [Stamp(6, 1, 2), Stamp(5, 2, 2), Stamp(5, 1, 3), None])
def test_a_file_that_has_changed_since_its_digest_is_unknown(changed: Stamp | None) -> None:
    trust = Trust(listed=[A])
    trust.learn(FILE, STAMP, A)
    assert trust.role(FILE, STAMP) is Role.LISTED
    assert trust.role(FILE, changed) is Role.UNKNOWN
    assert trust.digest(FILE, changed) is None, "the digest of a changed file was kept"
    trust.forget(FILE)
    assert trust.role(FILE, STAMP) is Role.UNKNOWN


def test_the_number_of_recorded_files_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_class, "MOST_KNOWN", 5)
    trust = Trust()
    for n in range(23):
        trust.learn((1, n), STAMP, A)
        assert trust.digest((1, n), STAMP) == A
    assert len(trust._known) <= 5


def test_only_a_file_with_the_length_of_a_shim_may_be_a_shim() -> None:
    trust = Trust(shims={"a" * 64: 5})
    assert trust.may_be_a_shim(STAMP)
    assert not trust.may_be_a_shim(Stamp(6, 1, 2))


def test_a_digest_is_computed_from_the_contents(opened: int) -> None:
    found = library_class.digest(opened, Stamp.of(opened))
    assert found == f"sha256:{hashlib.sha256(b'contents').hexdigest()}"
    assert DIGEST.fullmatch(found)


def test_a_file_that_changes_while_it_is_read_has_no_digest(opened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for change in (lambda: os.write(opened, b"x"), lambda: os.ftruncate(opened, 1), lambda: os.ftruncate(opened, 50)):
        stamp = Stamp.of(opened)
        monkeypatch.setattr(library_class.time, "sleep", lambda _, change=change: change())
        assert library_class.digest(opened, stamp) == ""


@pytest.fixture
def coarse(tmp_path: Path) -> Iterator[int]:
    """Return the descriptor of a file with coarse time stamps: writes within one tick have the same time."""
    subprocess.run(["mount", "-t", "ramfs", "coarse", tmp_path], check=True)
    fd = os.open(tmp_path / "libcuda.so.1", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)
    subprocess.run(["umount", tmp_path], check=True)


@needs_root("it mounts a file system")
def test_a_change_right_after_a_digest_has_another_time(coarse: int) -> None:
    for n in range(23):
        os.pwrite(coarse, bytes([n]), 0)
        stamp = Stamp.of(coarse)
        before = library_class.digest(coarse, stamp)
        os.pwrite(coarse, bytes([n + 1]), 0)
        assert before
        assert Stamp.of(coarse) != stamp


def test_an_oversized_file_has_no_digest(opened: int) -> None:
    os.ftruncate(opened, library_class.MOST_BYTES + 1)
    assert library_class.digest(opened, Stamp.of(opened)) == ""


def test_cookies_of_driver_roles_contain_function_and_class() -> None:
    for role, of in (
        (Role.HOST, abi.Class.HOST),
        (Role.LISTED, abi.Class.LISTED),
        (Role.UNKNOWN, abi.Class.UNKNOWN),
    ):
        for function in abi.Function:
            cookie = role.cookie(function)
            assert (cookie & abi.FUNCTION_MASK, cookie >> abi.CLASS_SHIFT) == (function, of)
        assert role.is_driver
    assert not Role.SHIM.is_driver
    assert not Role.NONE.is_driver
