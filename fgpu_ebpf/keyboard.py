"""Keys of a terminal, one by one and without an echo.

Owns: the terminal's mode while it is entered; leaves it as it was. Never: waits for a key, but for the rest of one. On
failure: OSError of a terminal that is gone, EOFError where nothing more will come.
"""

from __future__ import annotations

import codecs
import os
import re
import select
import termios
import tty

REST_SECONDS = 0.05  # how long the rest of a sequence may take: the same byte begins them all and is a key itself
_KEY = re.compile(r"\x1b\[[0-9;]*[@-~]|\x1bO.|.", re.DOTALL)
_UNFINISHED = re.compile(r"\x1b(?:\[[0-9;]*|O)?\Z")
_NAMES = {
    "\r": "enter", "\n": "enter", "\x1b": "escape", "\x7f": "backspace", "\x08": "backspace",
    "\x1b[A": "up", "\x1bOA": "up", "\x1b[B": "down", "\x1bOB": "down", "\x1b[5~": "page up", "\x1b[6~": "page down",
    "\x1b[H": "home", "\x1bOH": "home", "\x1b[1~": "home", "\x1b[7~": "home",
    "\x1b[F": "end", "\x1bOF": "end", "\x1b[4~": "end", "\x1b[8~": "end",
}  # fmt: skip


class Keyboard:
    """Entered: keys come at once; Ctrl-C and its like are signals as ever."""

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
        """For selectors."""
        return self._fd

    def keys(self) -> list[str]:
        """What was pressed, by name or as the character that it makes. Raises OSError, EOFError."""
        text = self._read()
        while _UNFINISHED.search(text) and select.select([self._fd], [], [], REST_SECONDS)[0]:
            text += self._read()
        return [_NAMES.get(key, key) for key in _KEY.findall(text)]

    def _read(self) -> str:
        data = os.read(self._fd, 4096)
        if not data:
            raise EOFError
        return self._decoder.decode(data)
