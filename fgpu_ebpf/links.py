"""The links of one program to one file: one for all its places, or, before Linux 6.6, one for each.

Owns: under which names they are pinned, and how they are let go. Never: knows what is linked to what. On failure:
OSError, and those that were not pinned yet are closed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
from collections.abc import Collection, Iterable
from pathlib import Path

from fgpu_ebpf import bpf

_NTH = "+"  # bpffs allows no dot: before the numbers of the second and later ones
_FEW = 2  # of a file's, where each program has one


def pin(links: Iterable[int], path: Path) -> set[str]:
    """Leaves them to the kernel, as `path` and beside it. Raises OSError; all descriptors are closed either way."""
    rest = list(links)
    places = [path, *(path.with_name(f"{path.name}{_NTH}{n}") for n in range(1, len(rest)))]
    try:
        for link, place in zip(rest, places, strict=True):
            bpf.pin(link, place)
    finally:
        for link in rest:
            os.close(link)
    return {place.name for place in places}


def remove(paths: Iterable[Path]) -> None:
    """Unpins; the kernel detaches aside. Somebody else may be at it too."""
    for path in list(paths):
        with contextlib.suppress(FileNotFoundError):
            path.rmdir() if path.is_dir() else path.unlink()


def close(links: Collection[int]) -> None:
    """Ends links that are not pinned: at once where they are few, else aside, since each takes 0.1 s."""
    if len(links) > _FEW:
        _closer().put(links)
        return
    for link in links:
        os.close(link)


@functools.cache
def _closer() -> queue.SimpleQueue[Collection[int]]:
    waiting: queue.SimpleQueue[Collection[int]] = queue.SimpleQueue()

    def run() -> None:
        while True:
            for link in waiting.get():
                os.close(link)

    threading.Thread(target=run, daemon=True, name="links").start()
    return waiting
