"""Attaching of the pinned BPF programs to files of libcuda and the shim, and to tracepoints.

This module runs in the agent's main thread. Probes.make() and Probes.of() also run in worker threads. The links are
pinned under PINS/links, and the probed files are entered in the map `files`. A file that cannot be probed is not
entered, so processes that map such a file get no answer to their hello and no memory. The text of a ProbeError names
the fix.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from fgpu_ebpf.driver import device_nodes, links, probe_plan
from fgpu_ebpf.driver.image import OF_OPENS
from fgpu_ebpf.driver.library_class import Role, Stamp
from fgpu_ebpf.driver.library_files import Target
from fgpu_ebpf.driver.probe_plan import Plan, ProbeError
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.linux import bpf, breakpoints, elf, procfs
from fgpu_ebpf.linux.procmaps import File

TRACEPOINTS = {
    "process_exit": "sched_process_exit",
    "process_exec": "sched_process_exec",
    "program_began": "sched_process_exec",
}
OPTIONAL_TRACEPOINTS = {
    "cgroup_attach": "cgroup_attach_task",
    "cgroup_made": "cgroup_mkdir",
    "cgroup_populated": "cgroup_notify_populated",
    "cgroup_removed": "cgroup_rmdir",
}
MOST_BESIDE = 8  # maximum of sets of probes for one (dev, ino): one set for each inode that has had this (dev, ino)
OTHER_COUNTER = (
    "if the kernel's log has `ref_ctr_offset mismatch`, another program has a uprobe at this instruction with another "
    "reference counter: end that program"
)
_NAME = re.compile("([0-9a-f]+)-([0-9a-f]+)-([a-z])([0-9a-f]+)-(.+)")  # dev, ino, role, number, program or mark
_MARK = re.compile("all([0-9]+)at([0-9a-f]+)")  # number of links, offset of the checked breakpoint

MadeLinks = list[tuple[str, list[int]]]  # the links of each program


@dataclass(slots=True)
class Attachment:
    """The probes of one inode of a file.

    `number`: distinguishes the links of inodes with the same (dev, ino). `check`: the offset at which a breakpoint
    proves that a mapping is probed. `pinned`: names of the pinned links. `held`: descriptors of all other links.
    `plan`, `stamp`: the file's plan and stamp when the file was probed; None: an earlier agent probed the file.
    """

    role: Role
    number: int
    check: int
    plan: Plan | None = None
    stamp: Stamp | None = None
    pinned: set[str] = field(default_factory=set)
    held: list[int] = field(default_factory=list)


class Probes:
    """All links of one set of programs. All methods except make() and of() must be called in one thread."""

    def __init__(self, pins: Path, digest: str, ledger: Ledger) -> None:
        self._programs = pins / "programs"
        self._links = pins / "links"
        self._digest = digest
        self._ledger = ledger
        self._files: dict[File, list[Attachment]] = {}  # the last entry is for the inode that new processes map
        self._events: set[str] = set()  # names of the pinned links to tracepoints of processes
        self.opens_fault = "the BPF program that decides about opens is not attached yet"
        """The reason why no program decides about opens of device nodes; empty: a program decides."""
        self._links.mkdir(mode=0o700, exist_ok=True)
        self._take_up_pinned()

    def _take_up_pinned(self) -> None:
        """Take over an earlier agent's probes of each file if all their links are pinned.

        Other links of these programs to files are removed.
        """
        names: dict[tuple[File, Role, int], set[str]] = {}
        for path in self._links.glob(f"{self._digest}-*-*-*"):
            if named := _NAME.fullmatch(path.name.removeprefix(f"{self._digest}-")):
                dev, ino, role, number, _ = named.groups()
                key = (int(dev, 16), int(ino, 16)), Role(role), int(number, 16)
                names.setdefault(key, set()).add(path.name)
            else:
                links.remove([path])
        self._ledger.forget_files()
        for (file, role, number), there in sorted(names.items(), key=lambda item: item[0][2]):
            check = _check_of(there)
            if check is None:
                links.remove(self._links / name for name in there)
            else:
                self._files.setdefault(file, []).append(Attachment(role, number, check, pinned=there))
                self._ledger.enter_file(*file, check)

    def lost(self) -> frozenset[File | None]:
        """Return the probed files that have lost a pinned link. None: the events of processes have lost one."""
        try:
            there = set(os.listdir(self._links))
        except FileNotFoundError:
            there = set()
        lost = {file for file, found in self._files.items() if any(not one.pinned <= there for one in found)}
        return frozenset(lost) if self._events <= there else frozenset({None, *lost})

    def attach_again(self, lost: Set[File | None]) -> None:
        """Attach lost process events again, and remove the remaining links of lost files.

        A later attach() then probes these files again. Raise ProbeError on failure.
        """
        self._links.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in lost:
            if file is None:
                self.attach_process_ends()
            else:
                self.let_go(file)

    @property
    def known(self) -> frozenset[File]:
        """The (dev, ino) of all probed files."""
        return frozenset(self._files)

    def of(self, file: File) -> Attachment | None:
        """Return the latest probes of a file, or None if the file has no probes. Any thread may call this method."""
        found = self._files.get(file)
        return found[-1] if found else None

    def attach_process_ends(self) -> None:
        """Attach the programs to the process events and, if possible, to the cgroup events.

        Raise ProbeError if the kernel does not report a process event, or a program is no longer pinned.
        """
        for program, event in TRACEPOINTS.items():
            try:
                self._attach_tracepoint(program, event)
            except FileNotFoundError as error:
                raise ProbeError(f"{self._programs / program} is no longer pinned: restart the agent") from error
            except OSError as error:
                raise ProbeError(
                    f"cannot attach to {event}, with which the kernel reports exits or execs of processes: {error}"
                ) from error
        for program, event in OPTIONAL_TRACEPOINTS.items():
            with contextlib.suppress(OSError):  # the periodic scan of all cgroups replaces these events
                self._attach_tracepoint(program, event)

        self._attach_to_opens()

    def _attach_to_opens(self) -> None:
        """Let a program decide about each open of a device node of the driver, on the whole host."""
        self._ledger.opens.set_majors(device_nodes.majors())
        path, root = self._links / f"{self._digest}-{OF_OPENS}", procfs.cgroup2_root()
        try:
            if not path.exists():
                with contextlib.ExitStack() as opened:
                    program = bpf.pinned(self._programs / OF_OPENS)
                    opened.callback(os.close, program)
                    folder = os.open(root or "", os.O_RDONLY | os.O_DIRECTORY)
                    opened.callback(os.close, folder)
                    link = bpf.attach_to_cgroup(program, folder)
                    opened.callback(os.close, link)
                    bpf.pin(link, path)
            self._events.add(path.name)
            self.opens_fault = ""
        except OSError as error:
            self._events.discard(path.name)
            self.opens_fault = f"Linux {os.uname().release} does not let fgpu decide about opens ({error.strerror})"

    def _attach_tracepoint(self, program: str, event: str) -> None:
        path = self._links / f"{self._digest}-{program}"
        if path.exists():
            self._events.add(path.name)
            return
        fd = bpf.pinned(self._programs / program)
        try:
            link = bpf.attach_raw_tracepoint(fd, event)
        finally:
            os.close(fd)
        bpf.pin(link, path)
        os.close(link)
        self._events.add(path.name)

    def attach(self, target: Target, role: Role) -> None:
        """Probe one of the host's own files. If the file cannot be probed, raise ProbeError and leave no new links."""
        file = target.dev, target.ino
        now = self.of(file)
        if now and now.role is role:
            return
        try:
            fd = target.open()
            try:
                made = probe_plan.plan(fd, target.path, role, probe_plan.looked_up(file))
                self.enter(target, made, self.make(fd, made), Stamp.of(fd))
            finally:
                os.close(fd)
        except (elf.ElfError, OSError) as error:
            raise ProbeError(f"{target.path} cannot be probed ({error})") from error

    def make(self, fd: int, made: Plan) -> MadeLinks:
        """Attach the programs to an open file in any thread, and return the links. Raise OSError on failure."""
        found: MadeLinks = []
        try:
            for program, places, at_return in made.programs:
                found.append((program, self._link(program, f"/proc/self/fd/{fd}", places, at_return)))
        except OSError as error:
            drop(found)
            if error.errno == errno.EINVAL:
                raise OSError(error.errno, f"{error.strerror}; {OTHER_COUNTER}") from error
            raise
        return found

    def _link(self, program: str, path: str, places: Sequence[tuple[int, int]], at_return: bool) -> list[int]:
        fd = bpf.pinned(self._programs / program)
        try:
            return bpf.attach_uprobes(fd, path, places, at_return)
        finally:
            os.close(fd)

    def enter(self, target: Target, made: Plan, found: MadeLinks, stamp: Stamp | None, beside: bool = False) -> None:
        """Take over the links that make() has returned, and enter the file. After an OSError all links are closed.

        Args:
            target: the file.
            made: the plan that make() has followed.
            found: the links.
            stamp: the file's size and times.
            beside: whether to keep the file's earlier probes, because processes map another inode with the same (dev,
                ino).
        """
        file = target.dev, target.ino
        earlier = self._files.get(file, [])
        number = 1 + max((one.number for one in earlier), default=-1)
        new = Attachment(made.role, number, made.check, made, stamp)
        try:
            self._keep(new, f"{self._name(file)}-{made.role.value}{number:x}", target.pinned, found)
            self._ledger.enter_file(*file, made.check)
        except OSError:
            self._drop(new)
            raise
        kept = [*earlier, new][-MOST_BESIDE:] if beside else [new]
        self._files[file] = kept
        for one in earlier:
            if one not in kept:
                self._drop(one)

    def _keep(self, new: Attachment, name: str, pinned: bool, found: MadeLinks) -> None:
        if not pinned:
            new.held = [link for _, made in found for link in made]
            return
        for n, (program, made) in enumerate(found):
            try:
                new.pinned |= self._pin(program, made, name)
            except OSError:
                drop(found[n + 1 :])
                raise
        mark = self._links / f"{name}-all{len(new.pinned)}at{new.check:x}"
        mark.mkdir(exist_ok=True)
        new.pinned.add(mark.name)

    def _pin(self, program: str, made: list[int], name: str) -> set[str]:
        return links.pin(made, self._links / f"{name}-{program}")

    def _drop(self, one: Attachment) -> None:
        links.close(one.held)
        links.remove(self._links / name for name in one.pinned)

    def _name(self, file: File) -> str:
        return f"{self._digest}-{file[0]:x}-{file[1]:x}"

    def drop_older(self) -> None:
        """Remove the links of earlier programs. The current programs already record all calls."""
        links.remove(path for path in self._links.iterdir() if not path.name.startswith(self._digest))

    def drop_unused(self, used: Set[File]) -> None:
        """Remove the links to all files except `used`, which processes may use."""
        for file in self.known - used:
            self.let_go(file)

    def let_go(self, file: File) -> None:
        """Remove the probes of a file, which keep its mount busy."""
        for one in self._files.pop(file, ()):
            self._drop(one)
        links.remove(self._links.glob(f"{self._name(file)}-*"))
        self._ledger.forget_file(*file)


def drop(found: MadeLinks) -> None:
    """Close links that Probes.make() has returned and Probes.enter() has not taken over."""
    for _, made in found:
        links.close(made)


def _check_of(there: Set[str]) -> int | None:
    """Return the offset of the breakpoint to check, or None if the links are incomplete.

    `there`: the names of the links, and the name of the mark of these links. The mark has the number of the links and
    the offset.
    """
    marks = [mark for name in there if (mark := _MARK.fullmatch(name.rpartition("-")[2]))]
    return next((int(mark[2], 16) for mark in marks if int(mark[1]) == len(there) - 1), None)


def detach(pins: Path) -> None:
    """Remove all links, programs and maps that are pinned in this folder."""
    for folder in (pins / "links", pins / "programs", pins / "maps"):
        if folder.is_dir():
            links.remove(folder.iterdir())
            folder.rmdir()
    for stamp in pins.glob("loaded-*"):
        stamp.rmdir()
    if pins.is_dir():
        pins.rmdir()


def wait_until_detached(shim: Path, until: float) -> bool:
    """Wait until new mappings of the shim have no probe, or until this time of the monotonic clock.

    The kernel detaches a link some time after the link was unpinned. If a program starts before the link is detached,
    the program's shim finds the probe but no folder of an agent, and treats the folder as hidden by a mount.

    Returns:
        False if a probe is left when the time is over, for example a probe of another agent.
    """
    with contextlib.suppress(OSError, ValueError, elf.ElfError, ProbeError), open(shim, "rb") as file:
        made = probe_plan.plan(file.fileno(), str(shim), Role.SHIM)
        for place in (offset for _, places, _ in made.programs for offset, _ in places):  # each may have a link
            while breakpoints.is_set_in_new_mappings(file.fileno(), place):
                if time.monotonic() > until:
                    return False
                time.sleep(0.01)
    return True
