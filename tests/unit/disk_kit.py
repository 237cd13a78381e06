"""Record of what is written to the disk: the order of os.fsync and os.replace."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bool]]:
    """Return a list that gets each call: its name, the path, and whether the path is a folder or a file with text."""
    calls: list[tuple[str, str, bool]] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size > 0))
        fsync(fd)

    def noted_replace(source: str | Path, target: str | Path) -> None:
        calls.append(("replace", str(target), os.stat(source).st_size > 0))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return calls


def durable(temporary: Path, path: Path) -> list[tuple[str, str, bool]]:
    """Return the calls of a replacement that a loss of power cannot undo by halves."""
    return [("fsync", str(temporary), True), ("replace", str(path), True), ("fsync", str(path.parent), True)]
