"""What NVML and the ledger say of one device at one moment, as far as two witnesses can be asked at once.

NVML is asked for its rows, for the bytes in use, and for the rows again: what changed in between is seen. Several such
samples, a random time apart, make it unlikely that a program which takes and frees memory all the time is always asked
at the same point of its loop. Used by the reconcile thread.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fgpu_ebpf.devices import Nvml
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.processes import Process

SAMPLES = 4
APART_SECONDS = 0.0005

Rows = Mapping[int, int | None]  # host pid -> bytes on one device; None: NVML does not say


class Taken(NamedTuple):
    """Bytes in use, and the least and the greatest row of each process around that."""

    in_use: int
    least: Mapping[int, int]
    greatest: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """`rows`: of the last question. `calm`: no process took or freed memory meanwhile.

    `processes`: of the ledger, as they were before. `busy`: those that were in a call then, or changed something since.
    """

    rows: Rows
    taken: tuple[Taken, ...]
    calm: bool
    processes: Mapping[int, Process]
    busy: frozenset[int] = frozenset()


def take(
    nvml: Nvml, ledger: Ledger, device: int, before: Mapping[int, Process], samples: int = SAMPLES
) -> Sample | None:
    """Asks NVML about a device; None: it does not answer. `before`: the ledger's processes.

    `taken` has so many samples: none where NVML does not give the bytes in use, or the row of some process.
    """
    rows = nvml.process_bytes(device)
    if rows is None:
        return None
    if not samples:
        return Sample(rows, (), False, before)
    found = []
    for n in range(samples):
        if n:
            time.sleep(random.uniform(0, APART_SECONDS))
        in_use, then = nvml.taken_bytes(device), nvml.process_bytes(device)
        if then is None:
            return None
        taken = None if in_use is None else _taken(in_use, rows, then)
        rows = then
        if taken is None:
            return Sample(rows, (), False, before)
        found.append(taken)
    after = ledger.processes()
    changed = {pid for pid in before.keys() | after.keys() if _state(before.get(pid)) != _state(after.get(pid))}
    in_call = {pid for pid, process in before.items() if not process.quiet}
    return Sample(rows, tuple(found), not changed, before, frozenset(changed | in_call))


def is_hidden(process: Process, device: int) -> bool:
    """It may have memory that NVML shows in no row."""
    return bool(process.managed[device] or process.handles_in_no_row(device))


def _taken(in_use: int, before: Rows, after: Rows) -> Taken | None:
    least, greatest = {}, {}
    for pid in before.keys() | after.keys():
        one, other = before.get(pid, 0), after.get(pid, 0)
        if one is None or other is None:
            return None
        least[pid], greatest[pid] = min(one, other), max(one, other)
    return Taken(in_use, least, greatest)


def _state(process: Process | None) -> tuple[int, int, int] | None:
    return (process.generation, process.begun, process.changes) if process else None
