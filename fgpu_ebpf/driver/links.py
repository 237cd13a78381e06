"""The links of one BPF program to one file: one link for all offsets, or one link per offset before Linux 6.6.

This module runs in the agent's main thread and worker threads. A thread of this module closes links if many links are
to be closed. After an OSError, links that were not pinned yet are closed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
from collections.abc import Collection, Iterable
from pathlib import Path

from fgpu_ebpf.linux import bpf

_NTH = "+"  # precedes the number of the second and later links; a name in a bpffs may not contain a dot
_FEW = 2  # number of links of a file if each program has one


def pin(links: Iterable[int], path: Path) -> set[str]:
    """Pin links at `path` and beside `path`, and return their names. Always close all descriptors.

    Raise OSError on failure.
    """
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
    """Unpin links, which the kernel detaches later. A missing path is no error: another process may unpin links too."""
    for path in list(paths):
        with contextlib.suppress(FileNotFoundError):
            path.rmdir() if path.is_dir() else path.unlink()


def close(links: Collection[int]) -> None:
    """Close links that are not pinned. Many links are closed in a thread, because closing one link takes 0.1 s."""
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
