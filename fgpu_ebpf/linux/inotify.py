"""inotify(7): a descriptor that becomes readable when something changes in a folder.

The module does not report which file changed, or how. Reading a file is not a change. This module runs in the agent's
thread that watches policies, and in the device plugin.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from fgpu_ebpf.linux.libc import LIBC, check

# inotify(7): modify, attrib, close_write, moved_from, moved_to, create, delete, delete_self, move_self
_CHANGES = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800


class FolderWatch:
    """A descriptor that is readable after a change in or to a watched folder. Subfolders are not watched.

    The constructor raises OSError if a folder does not exist, or if the kernel's maximum of watches is reached.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._fd = check("inotify_init1", LIBC.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        try:
            for folder in folders:
                check("inotify_add_watch", LIBC.inotify_add_watch(self._fd, os.fsencode(folder), _CHANGES))
        except OSError:
            self.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._fd

    def clear(self) -> None:
        """Discard the changes that were reported so far."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 1 << 16):
                pass

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
