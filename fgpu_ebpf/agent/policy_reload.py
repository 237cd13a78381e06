"""Read the policy folder at the start and after every change, and pass the policies to the manager.

This module runs in the agent's main loop. A thread of `policy.watch` reads the folder and wakes the loop. The last good
policy set is stored on disk. An agent uses the stored set if the files have an error at the agent's start, or the
folder is missing. If the files have an error later, the last good policy set stays in force as a whole, and the errors
are in the event log, the metrics and /readyz.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf.linux.wakeup import Wakeup
from fgpu_ebpf.policy import last_good
from fgpu_ebpf.policy.folder import PolicyFolder, Reading
from fgpu_ebpf.policy.rules import PolicySet
from fgpu_ebpf.policy.watch import PolicyWatch
from fgpu_ebpf.policy.yaml_document import ConfigError
from fgpu_ebpf.snapshot import PoliciesView
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.manager import Manager

log = logging.getLogger("fgpu.policy")


class Start(NamedTuple):
    """The first reading of the folder.

    `kept`: the stored set if the folder has no valid set. The value is None if the folder has a valid set, or no set is
    stored.
    """

    reading: Reading
    kept: PolicySet | None = None


def at_start(folder: Path, file: Path = last_good.FILE) -> Start:
    """Read the folder.

    A missing folder is an error if a set of the folder is stored on disk, else the folder counts as empty.
    """
    policies = PolicyFolder(folder)
    reading = policies.read()
    if reading.policies is not None and reading.state is not None:
        return Start(reading)
    kept = last_good.read(file, folder)
    return Start(policies.gone() if kept and reading.policies is not None else reading, kept)


class Policies:
    """The policies of the folder.

    `errors`: the errors of the last reading. `loaded_seconds`: the time of the last reading without an error, since the
    epoch. `file`: the file that stores the set in force. `unsaved`: the reason why the set is not stored, or empty.
    """

    def __init__(
        self, folder: Path, start: Start, manager: Manager, history: EventLog, file: Path = last_good.FILE
    ) -> None:
        """Pass the set of the first reading, or the stored set, to the manager, which applies the set later."""
        self._folder = folder
        self._file = file
        self.unsaved = ""
        self._manager = manager
        self._history = history
        self._changes: deque[Reading] = deque()
        self._wakeup = Wakeup()
        self._watch = PolicyWatch(PolicyFolder(folder), start.reading, self._changed)
        self.start, self.stop = self._watch.start, self._watch.stop
        self.loaded_seconds = 0.0
        self._begin(start)

    def view(self) -> PoliciesView:
        """Return the view of the last reading for a Snapshot, with the number of policies in force."""
        errors, count = tuple(str(error) for error in self.errors), len(self._manager.policies.policies)
        return PoliciesView(not errors, self.loaded_seconds, count, errors, self.unsaved)

    def fileno(self) -> int:
        """Return a descriptor that is readable after the folder was read again."""
        return self._wakeup.fileno()

    @property
    def trouble(self) -> str:
        """The reason why the policies in force are not the files' policies, or an empty text."""
        if not self.errors:
            return ""
        in_force = "the limits in force stay" if self._manager.policies_unknown else "the last good set stays in force"
        return f"the policy files have an error, so {in_force}: {self.errors[0]}"

    def _begin(self, start: Start) -> None:
        reading = start.reading
        self._note(reading)
        policies = reading.policies if start.kept is None else start.kept
        if policies is not None:
            self._manager.policies = policies
        if reading.policies is None:
            self._manager.policies_unknown = "" if start.kept else f"the policies are not known: {reading.errors[0]}"
        elif reading.state is None:  # the origin of pinned limits is unknown if the folder never existed
            self._manager.policies_unknown = f"there is no folder {self._folder}"
        else:
            self._save(reading.policies)

    def ask(self) -> tuple[ConfigError, ...]:
        """Read the folder even if unchanged, and put the folder's policies in force, unless there are errors.

        Returns:
            The errors. After an error the last good set stays in force.
        """
        self._watch.look(always=True)
        self.take()
        return self.errors

    def _changed(self, reading: Reading) -> None:
        self._changes.append(reading)
        self._wakeup.wake()

    def take(self) -> None:
        """Apply the readings of the folder since the last call."""
        self._wakeup.clear()
        try:
            while self._changes:
                reading = self._changes.popleft()
                self._note(reading)
                if reading.policies is not None:
                    self._save(reading.policies)
                    self._manager.policies_unknown = ""
                    self._manager.reload(reading.policies)
        finally:
            if self._changes:  # an exception does not delay the later readings until the next change
                self._wakeup.wake()

    def _save(self, policies: PolicySet) -> None:
        try:
            last_good.write(self._file, self._folder, policies)
            self.unsaved = ""
        except OSError as error:
            self.unsaved = f"the policies in force are not stored for the next start: {self._file}: {error.strerror}"
            log.error("%s", self.unsaved)

    def _note(self, reading: Reading) -> None:
        self.errors = reading.errors
        if reading.policies is not None:
            self.loaded_seconds = time.time()
            self._history.add("policies", text=f"{len(reading.policies.policies)} in force")
        for error in reading.errors[:5]:
            self._history.add("policies refused", text=str(error))
