"""Notices that the policies' folder has changed.

Owns: one thread. Never: judges what it reads. On failure: where the kernel gives no notifications it looks every two
seconds; what the callback raises is logged, and the thread goes on.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import watchfiles

from fgpu_ebpf.policy import PolicySet
from fgpu_ebpf.policyfolder import PolicyFolder, Reading
from fgpu_ebpf.yamlfile import Fault

log = logging.getLogger("fgpu.policy")
logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of every change
QUIET_SECONDS = 0.04  # a change is read once nothing more has happened for so long; it is looked for as often
LONGEST_SECONDS = 2.0  # or after so much of it
LOOK_SECONDS = 2.0  # for what no notification tells: behind symbolic links, on network file systems, a lost race

Callback = Callable[[PolicySet | None, tuple[Fault, ...]], None]


class PolicyWatch:
    """Reads the folder again whenever it has changed.

    `changed` is called in a thread of this object: with a set to put in force, or with None and the reasons why the
    last one stays. A folder that was there and is gone is such a reason.
    """

    def __init__(self, folder: PolicyFolder, last: Reading, changed: Callback) -> None:
        """`last` is what is in force already; only what differs from it is told."""
        self._folder = folder
        self._last = last
        self._had = last.state is not None
        self._changed = changed
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; no call comes after."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self._look()
                self._watch()
            except OSError as error:  # a folder went meanwhile, or there are no more notifications to be had
                log.debug("%s is not watched: %s", self._folder.path, error)
                self._end.wait(LOOK_SECONDS)
            except Exception:
                log.exception("policies were not taken over")
                self._end.wait(LOOK_SECONDS)

    def _watch(self) -> None:
        """Looks at every notification, until what is watched is no longer what should be. Raises OSError."""
        places = watched(self._folder.path)
        changes = watchfiles.watch(
            *places,
            watch_filter=None,
            debounce=int(LONGEST_SECONDS * 1000),
            step=int(QUIET_SECONDS * 1000),
            stop_event=self._end,
            rust_timeout=int(LOOK_SECONDS * 1000),
            yield_on_timeout=True,
            raise_interrupt=False,
            recursive=False,
            debug=False,
            force_polling=False,
            ignore_permission_denied=True,
        )
        for _ in changes:
            if self._end.is_set():
                return
            self._look()
            if watched(self._folder.path) != places:
                return

    def _look(self) -> None:
        """Tells of the folder if it is not as it was."""
        if self._folder.state() == self._last.state:
            return
        reading = self._folder.read(may_be_missing=not self._had)
        before, self._last = self._last, reading
        self._had |= reading.state is not None
        if reading.policies is not None or reading.faults != before.faults:
            self._changed(reading.policies, reading.faults)


def watched(folder: Path) -> dict[Path, int]:
    """What to watch, with its inode: the folder and the one around it, or the innermost that is there."""
    places: dict[Path, int] = {}
    for path in (folder, *folder.parents):
        try:
            places[path] = os.stat(path).st_ino
        except OSError:
            continue
        if path != folder:
            break
    return places
