"""Probes as a later agent finds them. The names of pinned links give each file's class and breakpoints."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.driver import attach, probe_plan
from fgpu_ebpf.driver.library_class import Role, Stamp
from fgpu_ebpf.driver.library_files import Target
from fgpu_ebpf.linux import bpf, breakpoints, libc
from fgpu_ebpf.linux import bpf_attributes as attributes
from fgpu_ebpf.linux.procmaps import File
from tests.bpf.conftest import Kernel
from tests.support.host import ROOT

ROLES = [Role.HOST, Role.LISTED, Role.UNKNOWN]


@pytest.fixture
def library(kernel: Kernel, tmp_path: Path) -> Iterator[Target]:
    """Return another file with the tests' driver. Its probes are removed after the test."""
    target = Target.of(shutil.copy(kernel.driver, tmp_path / "libcuda.so.1"))
    yield target
    kernel.probes.let_go((target.dev, target.ino))


def later(kernel: Kernel) -> attach.Probes:
    """Return the probes of an agent that starts now."""
    return attach.Probes(kernel.pins, kernel.probes._digest, kernel.ledger)


def file_of(target: Target) -> File:
    return target.dev, target.ino


def pinned(kernel: Kernel, target: Target) -> set[str]:
    return {path.name for path in (kernel.pins / "links").glob(f"*-{target.dev:x}-{target.ino:x}-*")}


def cookies(target: Target, role: Role) -> set[int]:
    fd = target.open()
    try:
        plan = probe_plan.plan(fd, target.path, role)
    finally:
        os.close(fd)
    return {cookie for _, places, _ in plan.programs for _, cookie in places}


@pytest.mark.parametrize("role", ROLES)
def test_a_later_agent_finds_each_file_s_class_and_breakpoints(kernel: Kernel, library: Target, role: Role) -> None:
    kernel.probes.attach(library, role)
    before = kernel.probes.of(file_of(library))
    assert before
    assert {cookie >> abi.CLASS_SHIFT for cookie in cookies(library, role)} == {ROLES.index(role)}
    found = later(kernel).of(file_of(library))
    assert found
    assert (found.role, found.check, found.pinned, found.stamp) == (role, before.check, before.pinned, None)
    assert kernel.ledger.file_check(*file_of(library)) == before.check > breakpoints.UNCHECKED
    fd = library.open()
    assert breakpoints.is_set_in_new_mappings(fd, found.check)
    os.close(fd)


def test_a_file_whose_class_has_changed_is_probed_again(kernel: Kernel, library: Target) -> None:
    kernel.probes.attach(library, Role.LISTED)
    before = pinned(kernel, library)
    agent = later(kernel)
    agent.attach(library, Role.LISTED)
    assert pinned(kernel, library) == before, "the file's probes were attached again"
    agent.attach(library, Role.UNKNOWN)
    now = pinned(kernel, library)
    assert not now & before
    found = later(kernel).of(file_of(library))
    assert found
    assert found.role is Role.UNKNOWN


def test_incomplete_links_of_a_file_are_removed(kernel: Kernel, library: Target) -> None:
    kernel.probes.attach(library, Role.LISTED)
    next((kernel.pins / "links").glob(f"*-{library.dev:x}-{library.ino:x}-*-call_enter")).unlink()
    agent = later(kernel)
    assert agent.of(file_of(library)) is None
    assert not pinned(kernel, library)
    assert kernel.ledger.file_check(*file_of(library)) is None


def test_links_with_invalid_names_are_removed(kernel: Kernel, library: Target) -> None:
    stranger = kernel.pins / "links" / f"{kernel.probes._digest}-a-b-all3"  # a name from a version without classes
    stranger.mkdir()
    later(kernel)
    assert not stranger.exists()


def test_probes_of_at_most_eight_inodes_with_one_number_are_kept(kernel: Kernel, library: Target) -> None:
    """The last probes give the breakpoint of new processes. Earlier probes are removed if there are too many."""
    kernel.probes.attach(library, Role.UNKNOWN)
    fd = library.open()
    plan, stamp = probe_plan.plan(fd, library.path, Role.UNKNOWN), Stamp.of(fd)
    for _ in range(attach.MOST_BESIDE + 3):
        kernel.probes.enter(library, plan, kernel.probes.make(fd, plan), stamp, beside=True)
    marks = {name for name in pinned(kernel, library) if "-all" in name}
    assert len(marks) == attach.MOST_BESIDE
    agent = later(kernel)
    assert len(agent._files[file_of(library)]) == attach.MOST_BESIDE
    agent.enter(library, plan, agent.make(fd, plan), stamp)
    assert len({name for name in pinned(kernel, library) if "-all" in name}) == 1
    os.close(fd)
    kernel.probes._files.update(agent._files)


def uprobe_with_counter(path: str, offset: int, counter: int) -> int:
    """Attach a uprobe as tools for USDT probes do: with the file offset of a counter of the users of the probe."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    attr = attributes.PerfEventAttr(type=int(bpf.UPROBE_TYPE.read_text()), config=counter << 32, sample_period=1)
    attr.size, attr.uprobe_path, attr.probe_offset = ctypes.sizeof(attr), ctypes.addressof(name), offset
    return libc.check("perf_event_open", libc.LIBC.syscall(bpf._PERF_EVENT_OPEN, ctypes.byref(attr), -1, 0, -1, 0))


def test_the_error_names_a_uprobe_of_another_program_with_a_reference_counter(kernel: Kernel, library: Target) -> None:
    fd = library.open()
    (offset, _), *_ = probe_plan.plan(fd, library.path, Role.UNKNOWN).programs[-1][1]
    os.close(fd)
    other = uprobe_with_counter(library.path, offset, 8)
    with pytest.raises(probe_plan.ProbeError, match=r"ref_ctr_offset mismatch.*another program has a uprobe at this"):
        kernel.probes.attach(library, Role.UNKNOWN)
    assert not pinned(kernel, library)
    os.close(other)
    kernel.probes.attach(library, Role.UNKNOWN)


@pytest.mark.parametrize("role", [Role.SHIM, Role.UNKNOWN])
def test_the_checked_breakpoint_comes_last(kernel: Kernel, library: Target, role: Role, tmp_path: Path) -> None:
    """A process with this breakpoint in its memory has all others too, so the gatekeeper admits the process.

    An earlier inode with the same number may have had a breakpoint at the same offset.
    """
    path = library.path if role is Role.UNKNOWN else shutil.copy(ROOT / "build/shim/libfgpu.so", tmp_path)
    with open(path, "rb") as file:
        plan = probe_plan.plan(file.fileno(), str(path), role)
        assert len(plan.programs) == 2
        held = []
        for n, one in enumerate(plan.programs):
            assert breakpoints.is_set_in_new_mappings(file.fileno(), plan.check) is False, n
            held.append(kernel.probes.make(file.fileno(), replace(plan, programs=(one,))))
        assert breakpoints.is_set_in_new_mappings(file.fileno(), plan.check)
        for links in held:
            attach.drop(links)
