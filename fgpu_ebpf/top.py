"""`fgpu top`: what the agent says, once a second, as long as somebody looks.

Owns: the terminal while it runs, and how it is given back: left by a key, by a signal, or stopped and gone on with.
Never: waits for the agent. On failure: an agent that does not answer is said in one line, until it does.
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

from fgpu_ebpf import frame
from fgpu_ebpf.bell import Bell
from fgpu_ebpf.choice import Choice
from fgpu_ebpf.feed import Feed, News
from fgpu_ebpf.frame import Window
from fgpu_ebpf.keyboard import Keyboard

Ask = Callable[[], Mapping[str, Any]]
IDLE_SECONDS = 1.5  # longer than answers are apart: that there is none has to be seen too
_ENDINGS = {signal.SIGTERM, signal.SIGHUP}
_SIGNALS = (*_ENDINGS, signal.SIGINT, signal.SIGTSTP, signal.SIGWINCH)


def is_watched() -> bool:
    """There is a terminal at both ends, and it is one that can be drawn on."""
    return sys.stdin.isatty() and sys.stdout.isatty() and not Console().is_dumb_terminal


def print_once(ask: Ask, choice: Choice) -> None:
    """The whole table; as wide as it is where it goes to no terminal. Raises ConnectionError, RequestError."""
    news = News(ask(), "", 0)
    console = _console()
    width = console.width if sys.stdout.isatty() else None
    console.print(frame.once(news, choice, width, _marks(console)), soft_wrap=True)


def watch(ask: Ask, choice: Choice) -> int:
    """Until `q` or Ctrl-C: the exit code. Raises ConnectionError, RequestError where nobody answers the first time."""
    screen = _Screen(ask, choice)
    while (code := screen.show()) is None:
        os.kill(os.getpid(), signal.SIGSTOP)
    return code


def _console() -> Console:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a name that this terminal cannot show is no reason to end
    return Console(highlight=False)


def _marks(console: Console) -> frame.Marks:
    return frame.ASCII if console.options.ascii_only else frame.UNICODE


class _Screen:
    """A terminal that shows the last news; a signal is a ring of the bell, like the news."""

    def __init__(self, ask: Ask, choice: Choice) -> None:
        self._bell, self._choice, self._console = Bell(), choice, _console()
        self._feed = Feed(ask, self._bell)
        self._caught: set[int] = set()

    def show(self) -> int | None:
        """Until somebody has had enough: the exit code; None: it is to stop until it is gone on with."""
        self._caught.clear()
        live = Live(
            console=self._console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        with self._signals(), Keyboard(sys.stdin.fileno()) as keyboard, live:
            sources = [keyboard.fileno(), self._bell.fileno()]
            while True:
                live.update(self._drawn(), refresh=True)
                ready = select.select(sources, [], [], IDLE_SECONDS)[0]
                self._bell.hush()
                if keyboard.fileno() in ready and not self._pressed(keyboard):
                    return 0
                if self._caught & _ENDINGS:
                    return 128 + min(self._caught & _ENDINGS)
                if signal.SIGINT in self._caught:
                    return 0
                if signal.SIGTSTP in self._caught:
                    return None

    def _drawn(self) -> Any:
        text, self._choice = frame.live(self._feed.news.now(), self._choice, self._window())
        return text

    def _window(self) -> Window:
        return Window(*self._console.size, _marks(self._console))

    def _pressed(self, keyboard: Keyboard) -> bool:
        """Does what the keys say; false: nothing more is wanted, or there is no terminal any more."""
        try:
            keys = keyboard.keys()
        except (OSError, EOFError):
            return False
        room = frame.room(self._feed.news.now(), self._window())
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
            self._bell.ring()

        before = [(number, signal.signal(number, catch)) for number in _SIGNALS]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)
