"""Policies on the way from their folder to the manager: read at start, and again whenever they change.

Owns: the wake-up of the agent's loop, and whether the last reading was good. Never: a mix of two readings. On failure:
the last good set stays in force, and the faults are in the history and the metrics.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

from fgpu_ebpf.bell import Bell
from fgpu_ebpf.history import History
from fgpu_ebpf.manager import Manager
from fgpu_ebpf.policy import PolicySet
from fgpu_ebpf.policyfolder import PolicyFolder, Reading
from fgpu_ebpf.policywatch import PolicyWatch
from fgpu_ebpf.yamlfile import Fault

_Change = tuple[PolicySet | None, tuple[Fault, ...]]


class Policies:
    """The folder's policies. `good` is of the last reading, `loaded_seconds` (since the epoch) of the last good one."""

    def __init__(self, folder: Path, manager: Manager, history: History) -> None:
        self._folder = PolicyFolder(folder)
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

    def begin(self, reading: Reading) -> None:
        """The first reading of the folder; the manager is given its set, and looks at nobody yet."""
        self._last = reading
        self._note(reading.policies, reading.faults)
        if reading.policies is not None:
            self._manager.policies = reading.policies

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

    def ask(self) -> None:
        """Reads again, whether or not anything changed."""
        reading = self._folder.read()
        self._changed(reading.policies, reading.faults)

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
                self._manager.reload(policies)

    def _note(self, policies: PolicySet | None, faults: tuple[Fault, ...]) -> None:
        self.faults, self.good = faults, policies is not None
        if policies is not None:
            self.loaded_seconds = time.time()
            self._history.add("policies", text=f"{len(policies.policies)} in force")
            return
        for fault in faults[:5]:
            self._history.add("policies refused", text=str(fault))
