"""Children that share the address space of a client, or have a copy of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fgpu_ebpf.linux import bpf

if TYPE_CHECKING:
    from tests.bpf.conftest import Client, Kernel

CLONE_VM, CLONE_FILES, CLONE_VFORK = 0x100, 0x400, 0x4000


class Child:
    """A child of a client, created by clone() with these flags.

    order() starts a call in the child and returns at once.
    """

    def __init__(self, client: Client, fifo: Path, flags: int, bytes_: int) -> None:
        os.mkfifo(fifo)
        line = f"cuda.start_child({bytes(fifo)!r}, {flags}, u64(0x70000), u64({bytes_}))"
        waits = flags & CLONE_VFORK
        client.send(line) if waits else None
        self.pid = 0 if waits else int(client(line))
        self._orders = fifo.open("wb", buffering=0)  # the open returns when the child opens it

    def order(self, what: str) -> None:
        self._orders.write(what.encode())

    def close(self) -> None:
        self._orders.close()


def reap(client: Client, child: Child) -> None:
    client(f"os.waitpid({child.pid}, 0)[0]")


def owners(kernel: Kernel, name: str, key_bytes: int) -> dict[int, int]:
    """Return the contents of a map of pids."""
    fd = bpf.pinned(kernel.pins / "maps" / name)
    try:
        return {int.from_bytes(k, "little"): int.from_bytes(v, "little") for k, v in bpf.items(fd, key_bytes, 4)}
    finally:
        os.close(fd)


def borrowers(kernel: Kernel) -> dict[int, int]:
    return owners(kernel, "borrowers", 4)
