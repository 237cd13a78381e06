"""The thread of the agent that watches the folder of policies.

It sleeps until the kernel reports a change. Without notifications of the kernel it checks the folder every five
seconds. Errors that the callback raises are logged, and the thread continues.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fgpu_ebpf.linux.inotify import FolderWatch
from fgpu_ebpf.linux.wakeup import Wakeup
from fgpu_ebpf.policy.folder import PolicyFolder, Reading

log = logging.getLogger("fgpu.policy")
QUIET_SECONDS = 0.02  # a change is read once nothing has happened for this time
LONGEST_SECONDS = 2.0  # or after changes for this time
LOOK_SECONDS = 5.0  # for changes without notifications: behind symbolic links, on network file systems

Callback = Callable[[Reading], None]


class PolicyWatch:
    """Reads the folder again whenever it has changed.

    `changed` is called in the thread of this object, with a reading that has a set to put in force, or the errors for
    which the last set stays. That the folder is gone is such an error.
    """

    def __init__(self, folder: PolicyFolder, last: Reading, changed: Callback) -> None:
        """Watch a folder from `last` on, which is in force already: only differences from it are reported."""
        self._folder = folder
        self._last = last
        self.had = last.state is not None or last.policies is None  # the folder existed at some time
        self._changed = changed
        self._end = threading.Event()
        self._end_wakeup = Wakeup()
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; `changed` is not called after that."""
        self._end.set()
        self._end_wakeup.wake()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self._look()
                self._await_change()
            except FileNotFoundError:
                continue  # a folder was removed meanwhile
            except OSError as error:  # the kernel has no more notifications to give
                log.debug("%s is not watched: %s", self._folder.path, error)
                self._end.wait(LOOK_SECONDS)
            except Exception:
                log.exception("the policies were not applied")
                self._end.wait(LOOK_SECONDS)

    def _await_change(self) -> None:
        """Wait for a change in a watched folder, and for the changes that follow it. Raises OSError."""
        folders = watched(self._folder.path)
        with FolderWatch(folders) as notifications:
            woken = select.poll()  # the agent has more descriptors than select(2) takes
            woken.register(notifications, select.POLLIN)
            woken.register(self._end_wakeup, select.POLLIN)
            while watched(self._folder.path) == folders:
                self._look()  # for changes before the notifications began
                if woken.poll(LOOK_SECONDS * 1000):
                    self._await_quiet(notifications, woken)
                    return

    def _await_quiet(self, notifications: FolderWatch, woken: select.poll) -> None:
        """Wait until the changes of the folder seem to be complete."""
        latest = time.monotonic() + LONGEST_SECONDS
        while time.monotonic() < latest and not self._end.is_set():
            notifications.clear()
            if not woken.poll(QUIET_SECONDS * 1000):
                return

    def _look(self) -> None:
        """Report the folder if it has changed."""
        if self._folder.state() == self._last.state:
            return
        reading = self._folder.read(may_be_missing=not self.had)
        before, self._last = self._last, reading
        self.had |= reading.state is not None
        if reading.policies is not None or reading.errors != before.errors:
            self._changed(reading)


def watched(folder: Path) -> list[Path]:
    """Return the folders to watch: this one and the one around it, or the innermost that exists."""
    places = []
    for path in (folder, *folder.parents):
        if path.exists():
            places.append(path)
            if path != folder:
                break
    return places
