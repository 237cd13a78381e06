"""The schedule of the agent's scans of cgroups, which limits the scans' part of the main loop's time.

A scan is a sequence of short steps (`cgroup_looks`). Slices of several scans alternate, and between two slices the main
loop serves other events. If a step raises an exception, its scan ends and the caller gets the exception. The next scan
of the same cgroups begins with the first step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic

ALL = ""  # all cgroups of the host
RESCAN_SECONDS = 30.0  # between scans of ALL, which find changes without an event, such as new attributes of a cgroup
SLICE_SECONDS = 0.01
PAUSE_SECONDS = 1.0  # the least time between two scans of the same cgroups
PAUSE = 9  # the pause after a scan, as a multiple of the time that the scan took
MOST = 16  # scans at the same time


@dataclass
class _Look:
    """A scan that is running. `spent`: the seconds of the main loop that the scan has taken so far."""

    path: str
    steps: Iterator[None]
    spent: float = 0.0


class Looks:
    """The requested and the running scans. `steps` returns the steps of a scan of the cgroups at a path, or of ALL."""

    def __init__(self, steps: Callable[[str], Iterator[None]]) -> None:
        self._steps = steps
        self._wanted: dict[str, None] = {}  # in the order of the requests
        self._rests: dict[str, float] = {}  # by path: the time before which no other scan may begin
        self._looks: deque[_Look] = deque()
        self._next_slice = 0.0
        self._next_scan = monotonic() + RESCAN_SECONDS

    def ask(self, path: str) -> None:
        """Request a scan of the cgroups at `path`.

        A request during a scan of `path` leads to another scan, because a cgroup may have changed after the running
        scan has checked this cgroup.
        """
        self._wanted.setdefault(path)

    def wait(self, seconds: float) -> float:
        """Return how long the loop may sleep, at most `seconds`."""
        if not self._looks:
            return max(0.0, seconds)
        return max(0.0, min(seconds, self._next_slice - monotonic()))

    def keep(self) -> None:
        """Begin the scans that are due. The agent calls this method once a second."""
        now = monotonic()
        if now >= self._next_scan:
            self.ask(ALL)
        self._rests = {path: until for path, until in self._rests.items() if until > now}
        busy = {look.path for look in self._looks} | self._rests.keys()
        for path in [path for path in self._wanted if path not in busy][: MOST - len(self._looks)]:
            del self._wanted[path]
            self._looks.append(_Look(path, self._steps(path)))
            if path == ALL:
                self._next_scan = now + RESCAN_SECONDS

    def go_on(self) -> None:
        """Run one slice of one running scan, if any. The next slice begins after a pause as long as this slice."""
        began = monotonic()
        if not self._looks or began < self._next_slice:
            return
        look = self._looks.popleft()
        is_over = True
        try:
            is_over = self._run(look, began + SLICE_SECONDS)
        finally:
            now = monotonic()
            look.spent += now - began
            self._next_slice = now + (now - began)
            if is_over:
                self._rests[look.path] = now + max(PAUSE_SECONDS, PAUSE * look.spent)
            else:
                self._looks.append(look)

    @staticmethod
    def _run(look: _Look, until: float) -> bool:
        """Run steps until the monotonic clock reaches `until`, and return True if the scan is over."""
        return all(monotonic() < until for _ in look.steps)
