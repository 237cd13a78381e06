"""Notices that the policies' folder has changed.

Owns: one thread, which sleeps until the kernel says that something has happened there. Never: judges what it reads. On
failure: where the kernel gives no notifications it looks every five seconds; what the callback raises is logged, and
the thread goes on.
"""

from __future__ import annotations

import logging
import select
import threading
from collections.abc import Callable
from pathlib import Path

from fgpu_ebpf.bell import Bell
from fgpu_ebpf.folderbell import FolderBell
from fgpu_ebpf.policy import PolicySet
from fgpu_ebpf.policyfolder import PolicyFolder, Reading
from fgpu_ebpf.yamlfile import Fault

log = logging.getLogger("fgpu.policy")
logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of every change
QUIET_SECONDS = 0.02  # a change is read once nothing more has happened for so long
LONGEST_SECONDS = 2.0  # or after so much of it
LOOK_SECONDS = 5.0  # for what no notification tells: behind symbolic links, on network file systems

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
        self.had = last.state is not None or last.policies is None  # there was a folder at some time
        self._changed = changed
        self._end = threading.Event()
        self._end_bell = Bell()
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; no call comes after."""
        self._end.set()
        self._end_bell.ring()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self._look()
                self._await_change()
                self._await_quiet()
            except FileNotFoundError:
                continue  # a folder went meanwhile
            except OSError as error:  # there are no more notifications to be had
                log.debug("%s is not watched: %s", self._folder.path, error)
                self._end.wait(LOOK_SECONDS)
            except Exception:
                log.exception("policies were not taken over")
                self._end.wait(LOOK_SECONDS)

    def _await_change(self) -> None:
        """Sleeps until something happens where it may matter. Raises OSError."""
        places = watched(self._folder.path)
        with FolderBell(places) as bell:
            woken = select.poll()  # the agent has more descriptors than select(2) takes
            woken.register(bell, select.POLLIN)
            woken.register(self._end_bell, select.POLLIN)
            while watched(self._folder.path) == places:
                self._look()  # first at what happened until the bell hung
                if woken.poll(LOOK_SECONDS * 1000):
                    return

    def _await_quiet(self) -> None:
        """Until whoever changes the folder seems to have done with it. Raises OSError."""
        import watchfiles  # here: two megabytes that a host whose policies never change need not pay for

        changes = watchfiles.watch(
            *watched(self._folder.path),
            watch_filter=None,
            debounce=int(LONGEST_SECONDS * 1000),
            step=int(QUIET_SECONDS * 1000),
            stop_event=self._end,
            rust_timeout=int(QUIET_SECONDS * 1000),
            yield_on_timeout=True,
            raise_interrupt=False,
            recursive=False,
            debug=False,
            force_polling=False,
            ignore_permission_denied=True,
        )
        next(changes, None)
        changes.close()

    def _look(self) -> None:
        """Tells of the folder if it is not as it was."""
        if self._folder.state() == self._last.state:
            return
        reading = self._folder.read(may_be_missing=not self.had)
        before, self._last = self._last, reading
        self.had |= reading.state is not None
        if reading.policies is not None or reading.faults != before.faults:
            self._changed(reading.policies, reading.faults)


def watched(folder: Path) -> list[Path]:
    """What to watch: the folder and the one around it, or the innermost that is there."""
    places = []
    for path in (folder, *folder.parents):
        if path.exists():
            places.append(path)
            if path != folder:
                break
    return places
