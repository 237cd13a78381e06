"""An image is loaded over maps that an older version has pinned. The maps' form decides whether they are used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fgpu_ebpf.driver import attach, image
from fgpu_ebpf.driver.image import Image, ProgramError
from fgpu_ebpf.linux import bpf

HOST = bpf.Form(2, 4, 8, 9, 0)
RETURN = bytes.fromhex("b7000000000000009500000000000000")  # r0 = 0; exit
KEY, VALUE = (3).to_bytes(4, "little"), (77).to_bytes(8, "little")


@pytest.fixture
def pins() -> Iterator[Path]:
    folder = Path(f"/sys/fs/bpf/fgpu-image-{os.getpid()}")
    yield folder
    attach.detach(folder)


def pinned(pins: Path, form: bpf.Form) -> None:
    """Pin an array that contains a number, as an older version does."""
    (pins / "maps").mkdir(parents=True)
    fd = bpf.create("host", form)
    bpf.update(fd, KEY, VALUE)
    bpf.pin(fd, pins / "maps/host")
    os.close(fd)


def number(pins: Path) -> int:
    fd = bpf.pinned(pins / "maps/host")
    try:
        return bpf.number(fd, 3)
    finally:
        os.close(fd)


@pytest.mark.parametrize("entries", [9, 8])
def test_a_pinned_map_is_reused(pins: Path, entries: int) -> None:
    """The older version has eight entries, and no program uses the ninth."""
    pinned(pins, HOST._replace(max_entries=entries))
    image.load(Image({"host": HOST}, {"admit": RETURN}), pins)
    assert number(pins) == 77
    assert (pins / "programs/admit").exists()


@pytest.mark.parametrize(
    "form",
    [
        HOST._replace(max_entries=7),
        HOST._replace(max_entries=10),
        HOST._replace(value_size=16),
        HOST._replace(map_type=1),
        HOST._replace(map_type=1, map_flags=1),
    ],
)
def test_a_pinned_map_of_another_form_is_refused_and_kept(pins: Path, form: bpf.Form) -> None:
    (pins / "maps").mkdir(parents=True)
    fd = bpf.create("host", form)
    bpf.pin(fd, pins / "maps/host")
    os.close(fd)
    with pytest.raises(ProgramError, match="maps/host is of another version of fgpu"):
        image.load(Image({"host": HOST}, {"admit": RETURN}), pins)
    assert not list((pins / "programs").iterdir())
    again = bpf.pinned(pins / "maps/host")
    assert bpf.form(again) == form
    os.close(again)


@pytest.mark.parametrize("entries", [1_048_576, 262_144])
def test_programs_get_the_size_of_the_pinned_maps(pins: Path, entries: int) -> None:
    """A map that an older version pinned may have fewer entries. It stays pinned, because it contains the charges."""
    forms = {
        "allocations": bpf.Form(1, 24, 56, entries, 1),
        "threads": bpf.Form(1, 8, 8, 23, 1),
        "processes": bpf.Form(1, 4, 8, 101, 1),
        "sizes": bpf.Form(2, 4, 8, 3, 0),
    }
    for wanted in (entries, 1_048_576):
        allocations = forms["allocations"]._replace(max_entries=wanted)
        image.load(Image({**forms, "allocations": allocations}, {"admit": RETURN}), pins)
        fd = bpf.pinned(pins / "maps/sizes")
        assert [bpf.number(fd, n) for n in range(3)] == [entries, 23, 101]
        os.close(fd)


def test_a_read_of_an_absent_slot_raises_file_not_found(pins: Path) -> None:
    pinned(pins, HOST)
    fd = bpf.pinned(pins / "maps/host")
    with pytest.raises(FileNotFoundError):
        bpf.number(fd, 9)
    os.close(fd)


def test_absent_entries_do_not_count_as_deleted() -> None:
    fd = bpf.create("some", bpf.Form(1, 4, 4, 23, 0))
    keys = [n.to_bytes(4, "little") for n in range(23)]
    bpf.update_all(fd, dict.fromkeys(keys[:11], bytes(4)))
    assert bpf.delete_all(fd, [keys[n] for n in (13, 3, 14, 15, 5, 7, 17)]) == 3
    assert {key for key, _ in bpf.items(fd, 4, 4)} == {keys[n] for n in range(11)} - {keys[n] for n in (3, 5, 7)}
    assert bpf.delete_all(fd, keys) == 8
    assert bpf.delete_all(fd, []) == 0
    os.close(fd)


def test_a_descriptor_that_is_no_map_has_no_form() -> None:
    with open(os.devnull) as file, pytest.raises(OSError, match="is not a BPF map"):
        bpf.form(file.fileno())
