"""The inputs of `fgpu top`: Snapshots from the agent, the user's choice of rows and order, and keys of the terminal.

A thread requests a Snapshot from the agent once a second. The thread never stops. The error of a failed request is
shown until the next request succeeds. All other code runs in the main thread. A Keyboard changes the terminal's mode
within its context, and restores the mode at the end.
"""

from __future__ import annotations

import codecs
import os
import re
import select
import termios
import threading
import time
import tty
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fgpu_ebpf.api.ranking import BY_KEY, Order
from fgpu_ebpf.control_client import RequestError
from fgpu_ebpf.linux.wakeup import Wakeup

PERIOD_SECONDS = 1.0
SILENCE_SECONDS = 3.0
_STEPS = {"up": -1, "k": -1, "down": 1, "j": 1}
_PAGES = {"page up": -1, "page down": 1, " ": 1}
_END = 1 << 30
_HELP = ("h", "?")
REST_SECONDS = 0.05  # the wait for the rest of an escape sequence, whose first byte is also the Escape key
_KEY = re.compile(r"\x1b\[[0-9;]*[@-~]|\x1bO.|.", re.DOTALL)
_UNFINISHED = re.compile(r"\x1b(?:\[[0-9;]*|O)?\Z")
_NAMES = {
    "\r": "enter", "\n": "enter", "\x1b": "escape", "\x7f": "backspace", "\x08": "backspace",
    "\x1b[A": "up", "\x1bOA": "up", "\x1b[B": "down", "\x1bOB": "down", "\x1b[5~": "page up", "\x1b[6~": "page down",
    "\x1b[H": "home", "\x1bOH": "home", "\x1b[1~": "home", "\x1b[7~": "home",
    "\x1b[F": "end", "\x1bOF": "end", "\x1b[4~": "end", "\x1b[8~": "end",
}  # fmt: skip


# -- Snapshots ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LatestSnapshot:
    """The last Snapshot that the agent has sent, and the failure of later requests.

    `error`: the reason why there is no newer Snapshot; empty if the Snapshot is current. `received`: the monotonic time
    of the last reply or failure.
    """

    snapshot: Mapping[str, Any]
    error: str
    received: float

    def now(self) -> LatestSnapshot:
        """Return this object, with an `error` if there was no reply and no failure for SILENCE_SECONDS."""
        silent = time.monotonic() - self.received
        return replace(self, error=f"no answer from the agent for {silent:.0f} s") if silent > SILENCE_SECONDS else self


class SnapshotPoller:
    """The thread that requests a Snapshot once a second until the process ends. Each result wakes the screen."""

    def __init__(self, ask: Callable[[], Mapping[str, Any]], wakeup: Wakeup) -> None:
        self._ask, self._wakeup = ask, wakeup
        self.latest = self._current(ask())
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(PERIOD_SECONDS)
            try:
                self.latest = self._current(self._ask())
            except (ConnectionError, RequestError) as failure:
                self.latest = replace(self.latest, error=str(failure), received=time.monotonic())
            self._wakeup.wake()

    @staticmethod
    def _current(snapshot: Mapping[str, Any]) -> LatestSnapshot:
        return LatestSnapshot(snapshot, "", time.monotonic())


# -- the user's choice ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ViewChoice:
    """The order, the filter and the scroll position.

    `first`: the number of rows above the screen. `typing`: the filter is being typed. `helping`: the keys are shown,
    until the next key.
    """

    order: Order = field(default_factory=Order)
    filter: str = ""
    first: int = 0
    typing: bool = False
    helping: bool = False

    def pressed(self, key: str, page: int) -> ViewChoice | None:
        """Return the choice after a key, or None to quit.

        `page`: the rows on the screen. Unknown keys change nothing.
        """
        if self.typing:
            return self._typed(key)
        if self.helping or key in _HELP:
            return replace(self, helping=not self.helping)
        if key == "q":
            return None
        if key == "/":
            return replace(self, typing=True)
        if key == "escape":
            return replace(self, filter="", first=0)
        if key in BY_KEY:
            return replace(self, order=self.order.by(BY_KEY[key]), first=0)
        return self._moved(key, page)

    def within(self, count: int, page: int) -> ViewChoice:
        """Return the choice scrolled so that the last of `count` rows is not above the bottom of the page."""
        return replace(self, first=max(0, min(self.first, count - page)))

    def _moved(self, key: str, page: int) -> ViewChoice:
        if key in ("home", "end"):
            return replace(self, first=0 if key == "home" else _END)
        return replace(self, first=self.first + _STEPS.get(key, 0) + _PAGES.get(key, 0) * page)

    def _typed(self, key: str) -> ViewChoice:
        if key == "enter":
            return replace(self, typing=False)
        if key == "escape":
            return replace(self, filter="", typing=False, first=0)
        if key == "backspace":
            return replace(self, filter=self.filter[:-1], first=0)
        return replace(self, filter=self.filter + key, first=0) if len(key) == 1 and key.isprintable() else self


# -- keys ----------------------------------------------------------------------------------------------------------


class Keyboard:
    """A terminal in cbreak mode within the context. Each key can be read immediately, and Ctrl-C sends a signal."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before = termios.tcgetattr(fd)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __enter__(self) -> Keyboard:
        tty.setcbreak(self._fd)
        return self

    def __exit__(self, *_: object) -> None:
        termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def fileno(self) -> int:
        """Return the terminal's file descriptor, for selectors."""
        return self._fd

    def keys(self) -> list[str]:
        """Return the pressed keys, each as a name or as its character.

        Raises:
            OSError: the terminal is gone.
            EOFError: the terminal is closed.
        """
        text = self._read()
        ready = select.poll()
        ready.register(self._fd, select.POLLIN)
        while _UNFINISHED.search(text) and ready.poll(1000 * REST_SECONDS):
            text += self._read()
        return [_NAMES.get(key, key) for key in _KEY.findall(text)]

    def _read(self) -> str:
        data = os.read(self._fd, 4096)
        if not data:
            raise EOFError
        return self._decoder.decode(data)
