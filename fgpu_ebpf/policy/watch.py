"""The agent's thread `policy`, which watches the folder of policies.

The thread sleeps until the kernel (inotify) reports a change. The thread also checks the folder every five seconds, for
changes that the kernel does not report. An exception of the callback is logged, and the thread continues.
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
QUIET_SECONDS = 0.02  # the folder is read once no change was reported for this time
LONGEST_SECONDS = 2.0  # or once changes have been reported for this time
LOOK_SECONDS = 5.0  # between checks for changes without notification: behind symbolic links, on network file systems

Callback = Callable[[Reading], None]


class PolicyWatch:
    """The watch of the folder: a thread that reads the folder again after every change.

    `changed` is called with each new reading, in the order of the readings. A reading has either a set to put in force,
    or errors, with which the last set stays in force. A folder that existed before and is gone counts as an error.
    """

    def __init__(self, folder: PolicyFolder, last: Reading, changed: Callback) -> None:
        """Prepare the watch.

        `last`: a reading that is already in force. Only changes after this reading are reported.
        """
        self._folder = folder
        self._last = last
        self._had = last.state is not None or last.policies is None  # the folder exists or existed before
        self._changed = changed
        self._lock = threading.Lock()  # held from the start of a reading until `changed` has returned
        self._end = threading.Event()
        self._end_wakeup = Wakeup()
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop a started thread, and wait for its end. After the end, the thread no longer calls `changed`."""
        self._end.set()
        self._end_wakeup.wake()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self.look()
                self._await_change()
            except FileNotFoundError:
                continue  # a folder was removed after watched() had listed it
            except OSError as error:  # for example, the user's limit of inotify instances is reached
                log.debug("%s cannot be watched for changes: %s", self._folder.path, error)
                self._end.wait(LOOK_SECONDS)
            except Exception:
                log.exception("the policies were not applied")
                self._end.wait(LOOK_SECONDS)

    def _await_change(self) -> None:
        """Wait for a change in a watched folder, and for the end of subsequent changes.

        Raise OSError if no watch is possible.
        """
        folders = watched(self._folder.path)
        with FolderWatch(folders) as notifications:
            woken = select.poll()  # select(2) accepts only descriptors below 1024, and the agent may have more
            woken.register(notifications, select.POLLIN)
            woken.register(self._end_wakeup, select.POLLIN)
            while watched(self._folder.path) == folders:
                self.look()  # finds changes that happened before the notifications began
                if woken.poll(LOOK_SECONDS * 1000):
                    self._await_quiet(notifications, woken)
                    return

    def _await_quiet(self, notifications: FolderWatch, woken: select.poll) -> None:
        """Wait until no change was reported for QUIET_SECONDS, or until LONGEST_SECONDS have passed."""
        latest = time.monotonic() + LONGEST_SECONDS
        while time.monotonic() < latest and not self._end.is_set():
            notifications.clear()
            if not woken.poll(QUIET_SECONDS * 1000):
                return

    def look(self, always: bool = False) -> None:
        """Read the folder if its state has changed, and call `changed` unless the errors are the same as before.

        Any thread may call this method. With `always`, the folder is read and `changed` is called even without a
        change.
        """
        with self._lock:
            if not always and self._folder.state() == self._last.state:
                return
            reading = self._folder.read(may_be_missing=not self._had)
            before, self._last = self._last, reading
            self._had |= reading.state is not None
            if always or reading.policies is not None or reading.errors != before.errors:
                self._changed(reading)


def watched(folder: Path) -> list[Path]:
    """Return the folders to watch: `folder` if it exists, and the innermost existing folder around `folder`."""
    places = []
    for path in (folder, *folder.parents):
        if path.exists():
            places.append(path)
            if path != folder:
                break
    return places
