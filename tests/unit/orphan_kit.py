"""Orphans, processes, tenants and a test double of the ledger, for tests of orphans."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.orphans import Orphan
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.tenancy.tenant import Source, Tenant
from fgpu_ebpf.workloads.workload import Workload

MIB = 1 << 20
ZEROES = (0,) * abi.DEVICES


def first(bytes_: int) -> tuple[int, ...]:
    """Return this many bytes on the first device."""
    return bytes_, *ZEROES[1:]


def orphan(
    tgid: int = 11, bytes_: int = MIB, since_ns: int = 0, ended_ns: int = 1, levels: tuple[int, ...] = (7,)
) -> Orphan:
    return Orphan(tgid, 0, 5, 0, bytes_, since_ns, ended_ns, levels)


def process(
    flags: int = 0,
    bytes_: int = 0,
    overhead: int = 0,
    contexts: int = 0,
    levels: tuple[int, ...] = (7,),
    exported: int = 0,
    pool: int = 0,
    generation: int = 9,
) -> Process:
    return Process(
        generation, levels, flags, 0, True, first(bytes_), first(overhead), ZEROES, first(pool), first(contexts),
        exported=first(exported),
    )  # fmt: skip


def tenant(cgroup: int = 7, path: str = "/a", **more: Any) -> Tenant:
    workload = Workload(path=path, cgroup=cgroup, name="a")
    return Tenant(workload, workload.name, Source.POLICY, "", {0: 4 * MIB}, **more)


class Books:
    """A ledger.

    `orphaned` has the bytes of each level on the first device, and `of_processes` has the orphans with these bytes.
    `removed` has levels whose pages were removed.
    """

    def __init__(self) -> None:
        self.orphaned: dict[int, int] = {}
        self.of_processes: list[Orphan] = []
        self.processes: dict[int, Process] = {}
        self.used = self.limit = 0
        self.entries: dict[tuple[int, int], Any] = {}  # of parked processes
        self.parked = SimpleNamespace(entries=lambda: self.entries)
        self.removed: list[int] = []
        self.orphans = SimpleNamespace(
            of_level=lambda level: first(self.orphaned.get(level, 0)), looked=lambda *_: None,
            entries=lambda: self.of_processes,
        )  # fmt: skip

    def remove(self, levels: list[int]) -> None:
        self.removed += levels

    def process(self, pid: int) -> Process | None:
        return self.processes.get(pid)

    def usage(self, _: int) -> list[Any]:
        return [SimpleNamespace(used=self.used, limit=self.limit)]
