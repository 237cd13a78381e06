"""Room for the copy, by the files of both versions of cgroups."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from fgpu_ebpf.parker import room
from fgpu_ebpf.parker.protocol import RequestError
from fgpu_ebpf.parker.room import Copy

GIB, ENDED = 1 << 30, 9
Make = Callable[..., None]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """Return a function that makes a cgroup around the process with these files."""
    groups: list[tuple[str, Path]] = []

    def cgroups(pid: int, controller: str) -> Iterator[tuple[str, Path]]:
        assert controller == "memory"
        if pid == ENDED:
            raise RequestError(f"process {pid} has ended")
        yield from groups if pid == 7 else groups[-1:]

    def make(path: str, **files: object) -> None:
        folder = tmp_path / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / f"memory.{name}").write_text(f"{text}\n")
        groups.append((path, folder))

    monkeypatch.setattr(room, "cgroups", cgroups)
    monkeypatch.setattr(room, "_available", lambda: 100 * GIB)
    return make


def refusal(size: int, *others: Copy) -> str:
    with pytest.raises(RequestError) as raised:
        room.check(Copy([7], size), others)
    return str(raised.value)


def test_each_limit_of_version_2_counts_with_a_margin(make: Make) -> None:
    make("/a/inner", max="max", high="max", current=GIB)
    make("/a", max=12 * GIB, high=10 * GIB, current=GIB)
    room.check(Copy([7], 8 * GIB))
    assert refusal(9 * GIB) == (
        "the cgroup /a has room for 9.00 GiB (memory.high is 10.00 GiB), and the copy may need 10.08 GiB"
    )
    assert "memory.max is 12.00 GiB" in refusal(11 * GIB)


def test_file_pages_that_were_not_used_lately_are_room(make: Make) -> None:
    make("/a", max=4 * GIB, current=4 * GIB, stat=f"anon {GIB}\ninactive_file {3 * GIB}")
    room.check(Copy([7], 2 * GIB))
    assert "has room for 3.00 GiB" in refusal(3 * GIB)


def test_limits_of_version_1_count(make: Make) -> None:
    make("/", limit_in_bytes=9223372036854771712, usage_in_bytes=50 * GIB)
    make("/b", limit_in_bytes=4 * GIB, usage_in_bytes=3 * GIB, stat=f"inactive_file 5\ntotal_inactive_file {GIB}")
    room.check(Copy([7], GIB))
    assert refusal(2 * GIB) == (
        "the cgroup /b has room for 2.00 GiB (memory.limit_in_bytes is 4.00 GiB), and the copy may need 2.24 GiB"
    )


def test_a_full_cgroup_has_no_room(make: Make) -> None:
    make("/a", max=GIB, current=2 * GIB)
    assert "has room for 0.00 GiB" in refusal(1)


def test_the_host_s_memory_counts(make: Make) -> None:
    room.check(Copy([7], 80 * GIB))
    assert refusal(90 * GIB) == "the host has 100.00 GiB of memory available, and the copy may need 100.80 GiB"


def test_copies_of_other_jobs_count_in_the_host_and_in_cgroups_around_both(make: Make) -> None:
    make("/pod/one", max=9 * GIB, current=0)
    make("/pod", max=30 * GIB, current=0)
    room.check(Copy([7], 8 * GIB), [Copy([8], 18 * GIB)])
    assert "the cgroup /pod has room for 30.00 GiB" in refusal(8 * GIB, Copy([8], 19 * GIB))
    room.check(Copy([7], 8 * GIB), [Copy([ENDED], 80 * GIB)])
    assert "the host has 100.00 GiB" in refusal(8 * GIB, Copy([ENDED], 81 * GIB), Copy([ENDED], GIB))


def test_a_limit_that_cannot_be_read_in_a_shortage_is_not_unlimited(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOMEM, "no memory")

    make("/a", max=GIB, current=0)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fail)
        why = refusal(2 * GIB)
    assert why.endswith("memory.current cannot be read: no memory")
