"""Files that are all of the new text or all of the old, whoever reads them and whenever the writer ends.

Owns: nothing. Never: leaves half a file, or what it wrote aside. On failure: OSError, and the old file.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fgpu_ebpf.sockets import make_way


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Puts the text in the file's place, whatever the umask; a folder there goes aside. One writer at a time.

    What was read with errors="surrogateescape" is written as it was.
    """
    folder, name = os.path.split(path)
    aside = os.path.join(folder, f".{name}.new")
    try:
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            os.fchmod(fd, mode)
            file.write(text)
        _replace(aside, path)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise


def _replace(aside: str, path: Path) -> None:
    try:
        os.replace(aside, path)
    except IsADirectoryError:  # engines make one where a container is given a file that is not there
        make_way(str(path))
        os.replace(aside, path)
