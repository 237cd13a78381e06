"""A file whose last close a test can delay, like the close of a driver's file in a process that exits.

It is the root of a FUSE mount. The kernel waits for the answer to a flush, even if the closing process is killed: at
that point the process takes no more signals, and its pidfd reports nothing. The server is a separate program
(`held_file.py PATH`), because a thread could not answer while its process forks. When the server exits, all closes
return.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import subprocess
import sys
from pathlib import Path

_IN, _OUT = struct.Struct("IIQQIIII"), struct.Struct("IiQ")
_FORGET, _GETATTR, _OPEN, _RELEASE, _FLUSH, _INIT, _INTERRUPT = 2, 3, 14, 18, 25, 26, 36
_ROOM, _MOST_WRITE = 1 << 16, 4096
_REGULAR, _DETACH = 0o100600, 2
_ANSWERS = {
    _INIT: struct.pack("4I2H2I2H8I", 7, 31, 0, 0, 1, 1, _MOST_WRITE, 1, 1, 0, *[0] * 8),
    _GETATTR: struct.pack("Q2I6Q10I", 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, _REGULAR, 1, 0, 0, 0, 4096, 0),
    _OPEN: struct.pack("Q2I", 0, 0, 0),
    _RELEASE: b"",
    _FLUSH: b"",
}


class HeldFile:
    """A file at `path`. After a call of `hold`, a process that closes the file blocks until the end of the `with`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        pipe = subprocess.PIPE
        self._server = subprocess.Popen([sys.executable, __file__, path], stdin=pipe, stdout=pipe, text=True, bufsize=1)
        assert self._hears("mounted", 60)

    def hold(self) -> None:
        assert self._server.stdin
        self._server.stdin.write("hold\n")
        assert self._hears("holding", 60)

    def has_waiter(self, seconds: float) -> bool:
        """Return whether a process blocks in a close within this time."""
        return self._hears("held", seconds)

    def _hears(self, word: str, seconds: float) -> bool:
        assert self._server.stdout
        return bool(select.select([self._server.stdout], [], [], seconds)[0]) and (
            self._server.stdout.readline() == f"{word}\n"
        )

    def __enter__(self) -> HeldFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()


def _mount(path: str) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    Path(path).touch()
    options = f"fd={device},rootmode={_REGULAR:o},user_id=0,group_id=0".encode()
    if libc.mount(b"held", os.fsencode(path), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    return device


def _say(word: str) -> None:
    os.write(1, f"{word}\n".encode())


def _answer(device: int, is_holding: bool) -> None:
    said = os.read(device, _ROOM)
    operation, unique = _IN.unpack_from(said)[1:3]
    if operation == _FLUSH and is_holding:
        _say("held")
    elif operation not in (_FORGET, _INTERRUPT):
        body = _ANSWERS.get(operation)
        code, body = (-errno.ENOSYS, b"") if body is None else (0, body)
        os.write(device, _OUT.pack(_OUT.size + len(body), code, unique) + body)


def _serve(path: str) -> None:
    device, is_holding = _mount(path), False
    _say("mounted")
    while True:
        ready = select.select([0, device], [], [])[0]
        if device in ready:
            _answer(device, is_holding)
        if 0 in ready:
            if not os.read(0, _ROOM):
                ctypes.CDLL(None).umount2(os.fsencode(path), _DETACH)
                return  # a blocked close returns an error, and its process continues
            is_holding = True
            _say("holding")


if __name__ == "__main__":
    _serve(sys.argv[1])
