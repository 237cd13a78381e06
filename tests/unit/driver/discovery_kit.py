"""A stand-in for probes that attaches to nothing, and functions that wait for the agent's library workers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Set

from fgpu_ebpf.driver import probe_plan
from fgpu_ebpf.driver.attach import Attachment, MadeLinks
from fgpu_ebpf.driver.discovery import Discovery
from fgpu_ebpf.driver.library_class import Role, Stamp
from fgpu_ebpf.driver.library_files import Target
from fgpu_ebpf.driver.probe_plan import Plan
from fgpu_ebpf.linux.procmaps import File
from tests.support.wait import Deadline


class Stage:
    """A stand-in for Probes. Attaching to a file with `bad` in its path fails."""

    def __init__(self, bad: str = "") -> None:
        self.files: dict[File, Attachment] = {}
        self.attached: list[str] = []
        self.dropped: list[Set[File]] = []
        self._bad = bad

    @property
    def known(self) -> frozenset[File]:
        return frozenset(self.files)

    def of(self, file: File) -> Attachment | None:
        return self.files.get(file)

    def attach(self, target: Target, role: Role) -> None:
        fd = target.open()
        self.enter(target, probe_plan.plan(fd, target.path, role), [], Stamp.of(fd))
        os.close(fd)

    def make(self, fd: int, plan: Plan) -> MadeLinks:
        if self._bad and self._bad in os.readlink(f"/proc/self/fd/{fd}"):
            raise ZeroDivisionError("an unexpected error of a file")
        return []

    def enter(self, target: Target, plan: Plan, links: MadeLinks, stamp: Stamp | None, beside: bool = False) -> None:
        self.attached.append(target.path)
        self.files[target.dev, target.ino] = Attachment(plan.role, len(self.attached), plan.check, plan, stamp)

    def let_go(self, file: File) -> None:
        self.files.pop(file, None)

    def drop_older(self) -> None:
        pass

    def drop_unused(self, used: Set[File]) -> None:
        self.dropped.append(used)


def settled(looks: Discovery, true: Callable[[], object], seconds: float = 10.0) -> None:
    """Apply the workers' results until `true` returns a true value, within `seconds`."""
    deadline = Deadline(seconds)
    while not true():
        assert not deadline.is_over(), f"not within {seconds} s"
        time.sleep(0.005)
        looks.take()


def quiet(looks: Discovery, seconds: float = 0.3) -> None:
    """Apply the workers' results for `seconds`, so that the workers can finish their current jobs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)
        looks.take()
