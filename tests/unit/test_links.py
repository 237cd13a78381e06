"""Several links of one program to one file: their names, and that none is left open."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from fgpu_ebpf import bpf, links


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names in the order in which they were pinned; files stand for what the kernel keeps."""
    names: list[str] = []

    def pin(_: int, path: Path) -> None:
        if path.name.endswith("-full+1"):
            raise OSError(errno.ENOSPC, "no room")
        path.touch()
        names.append(path.name)

    monkeypatch.setattr(bpf, "pin", pin)
    return names


def opened(count: int) -> list[int]:
    return [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]


def is_open(fd: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("count", [1, 2, 23])
def test_where_the_first_is_all_are(tmp_path: Path, pinned: list[str], count: int) -> None:
    path, made = tmp_path / "call", opened(count)
    names = links.pin(made, path)
    assert names == links.pinned(path) == set(pinned) == set(os.listdir(tmp_path))
    assert (len(names), pinned[-1]) == (count, "call")
    assert {links.program_of(name) for name in names} == {"call"}
    assert not any(map(is_open, made))


def test_half_of_them_count_for_none(tmp_path: Path, pinned: list[str]) -> None:
    path, made = tmp_path / "call-full", opened(3)
    with pytest.raises(OSError, match="no room"):
        links.pin(made, path)
    assert pinned == ["call-full+2"]
    assert links.pinned(path) == set()
    assert not any(map(is_open, made))


def test_another_program_s_name_is_not_taken_for_this_one_s(tmp_path: Path, pinned: list[str]) -> None:
    links.pin(opened(2), tmp_path / "call-return")
    links.pin(opened(2), tmp_path / "call")
    assert links.pinned(tmp_path / "call") == {"call", "call+1"}


@pytest.mark.parametrize("count", [0, 2, 23])
def test_what_is_let_go_is_closed(count: int) -> None:
    made = opened(count)
    links.close(made)
    deadline = time.monotonic() + 5
    while any(map(is_open, made)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
