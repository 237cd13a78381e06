"""Tests of discovery: which probes are kept, depending on the known processes."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from fgpu_ebpf.abi import Seen
from fgpu_ebpf.driver import cuda_mappings, probe_plan
from fgpu_ebpf.driver.discovery import Discovery
from fgpu_ebpf.driver.library_search import Found, Search
from fgpu_ebpf.driver.probe_plan import ProbeError
from fgpu_ebpf.linux import mapped_files, procfs
from fgpu_ebpf.linux.mapped_files import MappedFile
from tests.unit.driver.discovery_kit import Stage, quiet

MAPPED = {7: [MappedFile("/nowhere/libcuda.so.1", 1, 23)], 8: [], 9: None}


@pytest.mark.parametrize(
    ("with_memory", "dropped"),
    [({7, 8}, [{(1, 23)}]), ({7, 8, 9}, [])],
    ids=["a process without memory maps no file", "an unreadable process may map any file"],
)
def test_unused_probes_are_removed_only_if_the_mappings_of_all_processes_are_known(
    monkeypatch: pytest.MonkeyPatch, with_memory: set[int], dropped: list[set[tuple[int, int]]]
) -> None:
    monkeypatch.setattr(procfs, "pids", lambda: [7, 8, 9])
    monkeypatch.setattr(procfs, "cgroup_path", lambda _: "/")
    monkeypatch.setattr(cuda_mappings, "fgpu_mappings", MAPPED.get)
    monkeypatch.setattr(procfs, "has_memory", with_memory.__contains__)
    stage = Stage()
    Discovery(stage, {}).start()  # type: ignore[arg-type]
    assert stage.dropped == dropped


def test_probes_that_cannot_be_attached_again_are_logged_once_for_each_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The agent tries once a second to attach them."""
    stage, reasons = Stage(), iter(["no program", "no program", "no memory", "", "no program", "no program"])
    found = Discovery(stage, {})  # type: ignore[arg-type]

    def attach_again(_: object) -> None:
        if reason := next(reasons):
            raise ProbeError(reason)

    stage.lost = lambda: missing  # type: ignore[attr-defined]
    stage.attach_again = attach_again  # type: ignore[attr-defined]
    monkeypatch.setattr(found, "look_around", lambda: None)
    # At the sixth of seven calls, no probe is missing.
    for missing in [*[frozenset({None})] * 5, frozenset(), frozenset({None})]:  # noqa: B007
        found.reattach()
    again = "probes are missing: the agent attaches them again"
    lost = "probes are missing: another process has removed their links, and the probes cannot be attached again"
    no_program, no_memory = f"{lost} (no program)", f"{lost} (no memory)"
    assert caplog.messages == [again, no_program, no_memory, *[again, no_program] * 2]


def test_a_holder_is_searched_by_name_and_with_unwitnessed_memory_once_by_contents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unwitnessed memory may come from a driver library with another file name."""
    looks: list[tuple[int, str]] = []
    monkeypatch.setattr(Search, "by_name", lambda _, pid: looks.append((pid, "name")) or Found([]))
    monkeypatch.setattr(Search, "by_contents", lambda _, pid: looks.append((pid, "contents")) or Found([]))
    found = Discovery(Stage(), {})  # type: ignore[arg-type]
    for holders, unseen in (
        ([7, 8], set()),
        ([7, 8], set()),
        ([7, 8], {8, 9}),
        ([7, 8], {8}),
        ([8], set()),
        ([7], set()),
    ):
        found.look_at_new(holders, unseen)
        quiet(found, 0.05)
    assert looks == [(7, "name"), (8, "name"), (8, "contents"), (7, "name")]


def test_a_holder_is_searched_by_contents_whenever_its_unrecorded_memory_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may call another driver after it has called the genuine one."""
    looks: list[str] = []
    monkeypatch.setattr(Search, "by_name", lambda *_: looks.append("name") or Found([]))
    monkeypatch.setattr(Search, "by_contents", lambda *_: looks.append("contents") or Found([]))
    monkeypatch.setattr("fgpu_ebpf.driver.discovery.SEARCH_SECONDS", 0.0)
    found = Discovery(Stage(), {})  # type: ignore[arg-type]
    called = []
    for overhead, drift in ((0, 0), (500, 0), (500, 0), (500, -10), (510, 0), (400, 0), (520, 0)):
        process = SimpleNamespace(overhead=(overhead, 0), flags=Seen.SHIM | Seen.CALL)
        found.look_at_holders([7], {(7, 0): drift}, {7: process})  # type: ignore[dict-item]
        quiet(found, 0.05)
        called.append(len(looks))
    assert looks == ["name", "contents", "contents", "contents"]
    assert called == [1, 2, 2, 3, 3, 3, 4]


def test_valid_messages_of_the_gatekeeper_are_read_in_order_and_invalid_messages_ignored(tmp_path: Path) -> None:
    found = Discovery(Stage(), {})  # type: ignore[arg-type]
    found.listen(tmp_path / "sock")
    said = [
        '{"tgid": 7}',
        "[7]",
        '{"others": [8]}',
        '{"tgid": 7, "others": [8, "x"]}',
        '{"tgid": 9, "others": [10, 11]}',
    ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gatekeeper:
        for message in said:
            gatekeeper.sendto(message.encode(), str(tmp_path / "sock"))
    assert list(found.named()) == [[7], [9, 10, 11]]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_file_that_is_not_regular_in_place_of_a_library_is_refused(tmp_path: Path, make) -> None:
    """A tenant may map its own libcuda and replace it by a pipe. Opening the pipe would block for ever."""
    path = str(tmp_path / "libcuda.so.1")
    make(path)
    with pytest.raises(OSError, match="not a regular file"):
        mapped_files.as_mapped(path)
    with pytest.raises(probe_plan.ProbeError, match="cannot be read"):
        probe_plan.symbol_offsets(path, ["cuInit"])


def test_a_damaged_library_is_read_or_refused_with_a_probe_error(tmp_path: Path, scale) -> None:
    good, path, chance = Path(os.__file__).read_bytes(), tmp_path / "libcuda.so.1", random.Random(23)
    library = (Path(__file__).parents[3] / "build/shim/libfgpu.so").read_bytes()
    for _ in range(scale(101, 503, 10007)):
        spoilt = bytearray(chance.choice((library, good)))
        for _ in range(chance.randrange(1, 23)):
            spoilt[chance.randrange(min(len(spoilt), 4096))] = chance.randrange(256)
        path.write_bytes(spoilt[: chance.choice((64, 4096, len(spoilt)))])
        with contextlib.suppress(probe_plan.ProbeError):
            probe_plan.symbol_offsets(str(path), ["fgpu_admit"])
