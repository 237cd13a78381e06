"""Files that are all of the new text or all of the old, whoever reads them and whenever the writer ends.

Owns: nothing. Never: leaves half a file, or what it wrote aside. On failure: OSError, and the old file.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Puts the text in the file's place, whatever the umask. One writer at a time."""
    folder, name = os.path.split(path)
    aside = os.path.join(folder, f".{name}.new")
    try:
        with open(aside, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        raise
