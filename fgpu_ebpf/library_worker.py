"""Examines libcuda and shim files: what each is, and whether its probes see what a process that maps it calls.

Runs in: the threads of the agent's library workers. A file may be a tenant's, say anything, and be a file system's
that never answers; what is found is taken over in the agent's loop (`discovery`). Never: changes what the loop keeps,
but for the digests in `Trust`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from fgpu_ebpf import breakpoints, elf, library_class, probe_plan, probes
from fgpu_ebpf.library_class import Role, Stamp, Trust
from fgpu_ebpf.library_files import Target, target_of
from fgpu_ebpf.mappings import File
from fgpu_ebpf.probe_plan import Plan, ProbeError
from fgpu_ebpf.probes import Attachment, MadeLinks, Probes
from fgpu_ebpf.procfs import Mapping

MOST_FAILED = 4096  # failures that are remembered


class Unreachable(Exception):
    """A process maps another file than the one that can be opened by the same name and number."""

    def __str__(self) -> str:
        return "what it maps cannot be opened: its layer was changed after it was mapped, or it is mapped shared"


@dataclass(frozen=True, slots=True)
class Examined:
    """What became of a file. `before`: its probes when it was examined; no `plan`: those do.

    `beside`: the probes before stay, since they are on another inode that some processes still map. `error`: no probes
    see what the process calls; `is_file_s`: nor what any other process calls that maps this file.
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
    """Attaches what is missing, and says what it has attached."""

    def __init__(self, probes: Probes, trust: Trust) -> None:
        self._probes, self._trust = probes, trust
        self._failed: dict[File, tuple[Stamp, str]] = {}

    def mapped(self, pid: int, one: Mapping) -> Examined:
        """A file that a process maps: afterwards its probes are in what that process has in memory."""
        try:
            return self._examine(target_of(pid, one), pid)
        except Exception as error:  # whatever a tenant has made of its file
            is_file_s = not isinstance(error, Unreachable)
            return Examined((one.dev, one.ino), error=str(error) or repr(error), is_file_s=is_file_s)

    def found(self, target: Target) -> Examined:
        """A file that processes may come to map."""
        try:
            return self._examine(target, None)
        except Exception as error:
            return Examined((target.dev, target.ino), error=str(error) or repr(error))

    def stamp(self, pid: int, one: Mapping) -> Stamp | None:
        """The file's size and times now; None: it cannot be opened."""
        try:
            fd = target_of(pid, one).open()
        except OSError:
            return None
        try:
            return Stamp.of(fd)
        finally:
            os.close(fd)

    def read_own(self, target: Target) -> str:
        """The digest of a file of the host's own; empty: it cannot be read."""
        try:
            fd = target.open()
            try:
                return library_class.digest(fd, Stamp.of(fd))
            finally:
                os.close(fd)
        except OSError:
            return ""

    def read(self, pid: int, one: Mapping) -> Stamp | None:
        """Learns what a file's contents are; when it had this stamp. None: they cannot be read."""
        file = one.dev, one.ino
        try:
            fd = target_of(pid, one).open()
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
            probes.drop(links)
            raise Unreachable
        return Examined(file, before, target, plan, links, stamp, beside)

    def _role(self, file: File, fd: int, stamp: Stamp, before: Attachment | None) -> Role:
        """What a file is. It is read at once where it may be a shim, which is short, or an earlier agent trusted it."""
        was_trusted = before is not None and before.stamp is None and before.role is Role.LISTED
        if self._trust.digest(file, stamp) is None and (was_trusted or self._trust.may_be_a_shim(stamp)):
            self._trust.learn(file, stamp, library_class.digest(fd, stamp))
        return self._trust.role(file, stamp)

    def _plan(self, file: File, fd: int, path: str, role: Role, stamp: Stamp) -> Plan:
        """As probe_plan.plan; a file that has failed is not looked through again while it stays as it is."""
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
    """Whether probes at this offset see the calls of a process; of no process, or one that maps it no more, they do."""
    return pid is None or breakpoints.is_set(pid, file, check) is not False


def _replaces(fd: int, before: Attachment) -> bool:
    """Whether the probes are on the inode of this open file, so that new ones on it take their place."""
    return before.check == breakpoints.UNCHECKED or breakpoints.is_set_in_new_mappings(fd, before.check)
