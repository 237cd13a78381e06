"""`fgpu top`: the screen, the event loop, and the restoration of the terminal.

This module runs in the main thread of the command. A second thread (`top_input`) sends a request to the agent once a
second, so that the handling of keys never waits for the agent. While the agent does not reply, a line on the screen
reports the missing reply. The terminal is restored when a key or a signal ends the program, and while the program is
stopped.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.live import Live

from fgpu_ebpf.cli import top_frame
from fgpu_ebpf.cli.top_frame import Window
from fgpu_ebpf.cli.top_input import Keyboard, LatestSnapshot, SnapshotPoller, ViewChoice
from fgpu_ebpf.linux.wakeup import Wakeup

Ask = Callable[[], Mapping[str, Any]]
IDLE_SECONDS = 1.5  # the period of drawing without a reply, which is longer than the time between two replies
_ENDINGS = {signal.SIGTERM, signal.SIGHUP}
_SIGNALS = (*_ENDINGS, signal.SIGINT, signal.SIGTSTP, signal.SIGWINCH)


def is_watched() -> bool:
    """Return True if input and output are terminals, and the output is not a dumb terminal (TERM)."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty() and not Console().is_dumb_terminal


def print_once(ask: Ask, choice: ViewChoice) -> None:
    """Print the whole table once. If the output is not a terminal, no row is truncated.

    Raises:
        ConnectionError: no agent replies.
        RequestError: the agent refuses.
    """
    latest = LatestSnapshot(ask(), "", 0)
    console = _console()
    width = console.width if sys.stdout.isatty() else None
    console.print(top_frame.once(latest, choice, width, _marks(console)), soft_wrap=True)


def watch(ask: Ask, choice: ViewChoice) -> int:
    """Show the screen until `q` or Ctrl-C, and return the exit code.

    Raises:
        ConnectionError: the first request gets no reply.
        RequestError: the agent refuses the first request.
    """
    screen = _Screen(ask, choice)
    while (code := screen.show()) is None:
        os.kill(os.getpid(), signal.SIGSTOP)
    return code


def _console() -> Console:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a name that this terminal cannot show must not end the program
    return Console(highlight=False)


def _marks(console: Console) -> top_frame.Marks:
    return top_frame.ASCII if console.options.ascii_only else top_frame.UNICODE


class _Screen:
    """The screen with the latest Snapshot. Keys, signals and new Snapshots wake the event loop."""

    def __init__(self, ask: Ask, choice: ViewChoice) -> None:
        self._wakeup, self._choice, self._console = Wakeup(), choice, _console()
        self._poller = SnapshotPoller(ask, self._wakeup)
        self._caught: set[int] = set()

    def show(self) -> int | None:
        """Run until the user quits, and return the exit code, or None if the process has to stop (SIGTSTP)."""
        self._caught.clear()
        live = Live(
            console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        with self._signals(), Keyboard(sys.stdin.fileno()) as keyboard, live:
            sources = [keyboard.fileno(), self._wakeup.fileno()]
            while True:
                live.update(self._drawn(), refresh=True)
                ready = select.select(sources, [], [], IDLE_SECONDS)[0]
                self._wakeup.clear()
                if keyboard.fileno() in ready and not self._pressed(keyboard):
                    return 0
                if self._caught & _ENDINGS:
                    return 128 + min(self._caught & _ENDINGS)
                if signal.SIGINT in self._caught:
                    return 0
                if signal.SIGTSTP in self._caught:
                    return None

    def _drawn(self) -> Any:
        text, self._choice = top_frame.live(self._poller.latest.now(), self._choice, self._window())
        return text

    def _window(self) -> Window:
        return Window(*self._console.size, _marks(self._console))

    def _pressed(self, keyboard: Keyboard) -> bool:
        """Apply the pressed keys. Return False if the user quits or the terminal is gone."""
        try:
            keys = keyboard.keys()
        except (OSError, EOFError):
            return False
        room = top_frame.room(self._poller.latest.now(), self._window())
        for key in keys:
            choice = self._choice.pressed(key, room)
            if choice is None:
                return False
            self._choice = choice
        return True

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def catch(number: int, _: object) -> None:
            self._caught.add(number)
            self._wakeup.wake()

        before = [(number, signal.signal(number, catch)) for number in _SIGNALS]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)
