"""What the kernel rings when something happens in a folder: until then whoever waits for it sleeps, and costs nothing.

Owns: the descriptor. Never: says what happened, or to which file; being read is nothing that happens. On failure:
OSError where a folder is not there, or the kernel has no more watches to give.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

# inotify(7): modify, attrib, close_write, moved_from, moved_to, create, delete, delete_self, move_self
_HAPPENED = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800
_libc = ctypes.CDLL(None, use_errno=True)


class FolderBell:
    """Readable once something has happened in one of the folders, or to one; folders inside them are not watched."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._fd = _called("inotify_init1", os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            for folder in folders:
                _called("inotify_add_watch", self._fd, os.fsencode(folder), _HAPPENED)
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        """For selectors."""
        return self._fd

    def close(self) -> None:
        """Rings no more."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _called(name: str, *arguments: int | bytes) -> int:
    answer = int(getattr(_libc, name)(*arguments))
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return answer
