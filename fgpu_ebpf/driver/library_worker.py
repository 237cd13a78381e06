"""Examination of libcuda and shim files: their role, and whether their probes record the calls of a process.

This module runs in the agent's library workers. A file may belong to a tenant, contain anything, or lie on a file
system that never responds. The main thread applies the results (`libraries`). This module changes only the digests in
`Trust`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from fgpu_ebpf.driver import attach, library_class, probe_plan
from fgpu_ebpf.driver.attach import Attachment, MadeLinks, Probes
from fgpu_ebpf.driver.library_class import Role, Stamp, Trust
from fgpu_ebpf.driver.library_files import Target, target_of
from fgpu_ebpf.driver.probe_plan import Plan, ProbeError
from fgpu_ebpf.linux import breakpoints, elf
from fgpu_ebpf.linux.mapped_files import MappedFile
from fgpu_ebpf.linux.procmaps import File

MOST_FAILED = 4096  # stored failures


class Unreachable(Exception):
    """The file that a process maps cannot be opened: another file has the same path, dev and ino."""

    def __str__(self) -> str:
        return "the mapped file cannot be opened: its layer was changed after the mapping, or the mapping is shared"


@dataclass(frozen=True, slots=True)
class Examined:
    """The result for a file.

    `before`: the file's probes when the file was examined; these probes are sufficient if there is no `plan`. `links`,
    `stamp`: the new probes, and the file's size and times. `beside`: the probes in `before` are kept, because these
    probes are on another inode that some processes still map. `error`: why probes miss the calls of the process and, if
    `is_file_s`, of every process that maps this file.
    """

    file: File
    before: Attachment | None = None
    target: Target | None = None
    plan: Plan | None = None
    links: MadeLinks = field(default_factory=list)
    stamp: Stamp | None = None
    beside: bool = False
    error: str = ""
    is_file_s: bool = True


class Examiner:
    """The examiner of files, which attaches missing probes. The result for each file is an Examined."""

    def __init__(self, probes: Probes, trust: Trust) -> None:
        self._probes, self._trust = probes, trust
        self._failed: dict[File, tuple[Stamp, str]] = {}

    def mapped(self, pid: int, one: MappedFile) -> Examined:
        """Examine a file that a process maps. If the result has no error, the process's memory has the breakpoints."""
        try:
            return self._examine(target_of(pid, one, self._trust.versions), pid)
        except Exception as error:  # any exception, because a tenant's file may contain anything
            is_file_s = not isinstance(error, Unreachable)
            return Examined((one.dev, one.ino), error=str(error) or repr(error), is_file_s=is_file_s)

    def found(self, target: Target) -> Examined:
        """Examine a file that processes may map later."""
        try:
            return self._examine(target, None)
        except Exception as error:
            return Examined((target.dev, target.ino), error=str(error) or repr(error))

    def stamp(self, pid: int, one: MappedFile) -> Stamp | None:
        """Return the current size and times of a file that a process maps; None: the file cannot be opened."""
        try:
            fd = target_of(pid, one, self._trust.versions).open()
        except OSError:
            return None
        try:
            return Stamp.of(fd)
        finally:
            os.close(fd)

    def read_own(self, target: Target) -> str:
        """Return the digest of one of the host's own files; empty: the file cannot be read."""
        try:
            fd = target.open()
            try:
                return library_class.digest(fd, Stamp.of(fd))
            finally:
                os.close(fd)
        except OSError:
            return ""

    def read(self, pid: int, one: MappedFile) -> Stamp | None:
        """Store the digest of a file's contents in Trust. Return the file's stamp, or None for an unreadable file."""
        file = one.dev, one.ino
        try:
            fd = target_of(pid, one, self._trust.versions).open()
            try:
                stamp = Stamp.of(fd)
                self._trust.learn(file, stamp, library_class.digest(fd, stamp))
                return stamp
            finally:
                os.close(fd)
        except OSError:
            return None

    def _examine(self, target: Target, pid: int | None) -> Examined:
        fd = target.open()
        try:
            return self._examine_open(fd, target, pid)
        finally:
            os.close(fd)

    def _examine_open(self, fd: int, target: Target, pid: int | None) -> Examined:
        file, stamp = (target.dev, target.ino), Stamp.of(fd)
        before = self._probes.of(file)
        role = self._role(file, fd, stamp, before)
        sees = before is not None and _sees(pid, file, before.check)
        if before and sees and (before.role, before.stamp) == (role, stamp):
            return Examined(file, before)
        plan = self._plan(file, fd, target.path, role, stamp)
        if before and sees and before.role is role and before.plan in (None, plan) and before.check == plan.check:
            return Examined(file, before, stamp=stamp)
        beside = before is not None and not _replaces(fd, before)
        links = self._probes.make(fd, plan)
        if not _sees(pid, file, plan.check):
            attach.drop(links)
            raise Unreachable
        return Examined(file, before, target, plan, links, stamp, beside)

    def _role(self, file: File, fd: int, stamp: Stamp, before: Attachment | None) -> Role:
        """Return the role of a file.

        A file is read at once if the file has the size of a shim, which is short, or if an earlier agent trusted the
        file.
        """
        was_trusted = before is not None and before.stamp is None and before.role is Role.LISTED
        if self._trust.digest(file, stamp) is None and (was_trusted or self._trust.may_be_a_shim(stamp)):
            self._trust.learn(file, stamp, library_class.digest(fd, stamp))
        return self._trust.role(file, stamp)

    def _plan(self, file: File, fd: int, path: str, role: Role, stamp: Stamp) -> Plan:
        """Return the probe plan of a file. A file without a plan is parsed again only after a change."""
        failed = self._failed.get(file)
        if failed and failed[0] == stamp:
            raise ProbeError(failed[1])
        try:
            return probe_plan.plan(fd, path, role)
        except (ProbeError, elf.ElfError) as error:
            if len(self._failed) >= MOST_FAILED:
                self._failed.clear()
            self._failed[file] = stamp, str(error)
            raise


def _sees(pid: int | None, file: File, check: int) -> bool:
    """Return whether a process's memory has the breakpoint at this offset; True if the process does not map the file.

    Without a process (`pid` None) the result is True.
    """
    return pid is None or breakpoints.is_set(pid, file, check) is not False


def _replaces(fd: int, before: Attachment) -> bool:
    """Return whether earlier probes are on the inode of this open file, so that new probes replace earlier probes."""
    return before.check == breakpoints.UNCHECKED or breakpoints.is_set_in_new_mappings(fd, before.check)
