"""Several links of one program to one file have different names, and none stays open."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fgpu_ebpf.driver import links
from fgpu_ebpf.linux import bpf
from tests.support.wait import eventually


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of names in the order in which they are pinned. Files stand for the kernel's links."""
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
def test_each_link_is_pinned_under_its_own_name(tmp_path: Path, pinned: list[str], count: int) -> None:
    made = opened(count)
    names = links.pin(made, tmp_path / "call")
    assert names == set(pinned) == set(os.listdir(tmp_path))
    assert (len(names), pinned[0]) == (count, "call")
    assert not any(map(is_open, made))


def test_no_link_stays_open_if_one_cannot_be_pinned(tmp_path: Path, pinned: list[str]) -> None:
    made = opened(3)
    with pytest.raises(OSError, match="no room"):
        links.pin(made, tmp_path / "call-full")
    assert pinned == ["call-full"]
    assert not any(map(is_open, made))


def test_the_removal_of_a_missing_link_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "mark").mkdir()
    (tmp_path / "call").touch()
    links.remove([tmp_path / "gone", tmp_path / "mark", tmp_path / "call"])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("count", [0, 2, 23])
def test_a_released_link_is_closed(count: int) -> None:
    made = opened(count)
    links.close(made)
    eventually(lambda: not any(map(is_open, made)))
