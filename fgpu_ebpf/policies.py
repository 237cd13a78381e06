"""Policies on the way from their folder to the manager: read at start, and again whenever they change.

Owns: the wake-up of the agent's loop, whether the last reading was good, and the last good set on disk, which a start
uses where the files have an error or the folder is gone. Never: a mix of two readings. On failure: the last good set
stays in force, and the errors are in the history, the metrics and what /readyz says.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf import last_good
from fgpu_ebpf.bell import Bell
from fgpu_ebpf.history import History
from fgpu_ebpf.manager import Manager
from fgpu_ebpf.policy import PolicySet
from fgpu_ebpf.policyfolder import PolicyFolder, Reading
from fgpu_ebpf.policywatch import PolicyWatch
from fgpu_ebpf.yamlfile import Fault

log = logging.getLogger("fgpu.policy")
_Change = tuple[PolicySet | None, tuple[Fault, ...]]


@dataclass(frozen=True, slots=True)
class Start:
    """The folder as a start finds it, and the set that was kept on disk, where the folder has none.

    `kept` None: the folder has one, or none was kept.
    """

    reading: Reading
    kept: PolicySet | None = None


def at_start(folder: Path, file: Path = last_good.FILE) -> Start:
    """Reads the folder. One that is gone is an error where a set of it was kept, and no policies where none was."""
    policies = PolicyFolder(folder)
    reading = policies.read()
    if reading.policies is not None and reading.state is not None:
        return Start(reading)
    kept = last_good.read(file, folder)
    return Start(policies.gone() if kept and reading.policies is not None else reading, kept)


class Policies:
    """The folder's policies. `good` is of the last reading, `loaded_seconds` (since the epoch) of the last good one.

    `unsaved`: why the set in force is not kept on disk; empty: it is. `file`: where it is kept.
    """

    def __init__(self, folder: Path, manager: Manager, history: History, file: Path = last_good.FILE) -> None:
        self._folder = PolicyFolder(folder)
        self._file = file
        self.unsaved = ""
        self._manager = manager
        self._history = history
        self._watch: PolicyWatch | None = None
        self._last: Reading | None = None
        self._changes: deque[_Change] = deque()
        self._bell = Bell()
        self.good = True
        self.loaded_seconds = 0.0
        self.faults: tuple[Fault, ...] = ()

    @property
    def count(self) -> int:
        """How many are in force."""
        return len(self._manager.policies.policies)

    def fileno(self) -> int:
        """Readable when something changed."""
        return self._bell.fileno()

    @property
    def trouble(self) -> str:
        """Why not the files are in force but something else; empty: they are."""
        if self.good:
            return ""
        in_force = "what was in force stays" if self._manager.policies_unknown else "the last good set stays in force"
        return f"the policy files have an error, {in_force}: {self.faults[0]}"

    def begin(self, start: Start) -> None:
        """The first reading of the folder; the manager is given its set or the kept one, and decides later."""
        self._last = reading = start.reading
        self._note(reading.policies, reading.faults)
        policies = reading.policies if start.kept is None else start.kept
        if policies is not None:
            self._manager.policies = policies
        if reading.policies is None:
            self._manager.policies_unknown = "" if start.kept else f"the policies are not known: {reading.faults[0]}"
        elif reading.state is None:  # perhaps none was ever made; whether limits come from one is not known
            self._manager.policies_unknown = f"there is no folder {self._folder.path}"
        else:
            self._save(reading.policies)

    def start(self) -> None:
        """Begins to watch."""
        assert self._last
        self._watch = PolicyWatch(self._folder, self._last, self._changed)
        self._watch.start()

    def stop(self) -> None:
        """Watches no more."""
        if self._watch:
            self._watch.stop()
            self._watch = None

    def ask(self) -> tuple[Fault, ...]:
        """Reads again, whether or not anything changed, and puts it in force; returns the errors that forbid that."""
        reading = self._folder.read(may_be_missing=not (self._watch and self._watch.had))
        self._changed(reading.policies, reading.faults)
        self.take()
        return self.faults

    def _changed(self, policies: PolicySet | None, faults: tuple[Fault, ...]) -> None:
        self._changes.append((policies, faults))
        self._bell.ring()

    def take(self) -> None:
        """Puts in force what was read meanwhile."""
        self._bell.hush()
        while self._changes:
            policies, faults = self._changes.popleft()
            self._note(policies, faults)
            if policies is not None:
                self._save(policies)
                self._manager.policies_unknown = ""
                self._manager.reload(policies)

    def _save(self, policies: PolicySet) -> None:
        try:
            last_good.write(self._file, self._folder.path, policies)
            self.unsaved = ""
        except OSError as error:
            self.unsaved = f"the policies in force are not kept for the next start: {self._file}: {error.strerror}"
            log.error("%s", self.unsaved)

    def _note(self, policies: PolicySet | None, faults: tuple[Fault, ...]) -> None:
        self.faults, self.good = faults, policies is not None
        if policies is not None:
            self.loaded_seconds = time.time()
            self._history.add("policies", text=f"{len(policies.policies)} in force")
            return
        for fault in faults[:5]:
            self._history.add("policies refused", text=str(fault))
