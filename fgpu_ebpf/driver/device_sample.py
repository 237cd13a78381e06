"""Samples of NVML and the ledger for one device, taken as nearly at one time as possible.

A sample reads NVML's rows, the bytes in use, and the rows again, which shows changes in between. A program may allocate
and free memory in a loop. Several samples at random intervals are unlikely to hit the same point of this loop each
time. This module runs in the agent's reconcile thread.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import NamedTuple

from fgpu_ebpf.driver.nvml import Nvml
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.process_entry import Process

SAMPLES = 4
APART_SECONDS = 0.0005

Rows = Mapping[int, int | None]  # host pid -> bytes on one device; None: NVML does not report them


class Taken(NamedTuple):
    """One sample: the bytes in use, and the least and the greatest row of each process (host pid -> bytes)."""

    in_use: int
    least: Mapping[int, int]
    greatest: Mapping[int, int]


class Sample(NamedTuple):
    """The result of several samples of one device.

    `rows`: the last rows. `calm`: no process allocated or freed memory during the samples. `processes`: the ledger's
    processes before the samples. `busy`: processes that were in a call at that time, or have changed since. `begun_ns`:
    the time before the first sample (CLOCK_MONOTONIC).
    """

    rows: Rows
    taken: tuple[Taken, ...]
    calm: bool
    processes: Mapping[int, Process]
    busy: frozenset[int] = frozenset()
    begun_ns: int = 0


def take(
    nvml: Nvml, ledger: Ledger, device: int, before: Mapping[int, Process], samples: int = SAMPLES
) -> Sample | None:
    """Sample a device; None: NVML does not respond.

    Args:
        nvml: the connection to NVML.
        ledger: the kernel's ledger.
        device: the ledger index.
        before: the ledger's processes.
        samples: the number of samples. `taken` of the result has one entry for each sample, or no entry if NVML does
            not report the bytes in use or the row of a process.
    """
    begun_ns, rows = time.monotonic_ns(), nvml.process_bytes(device)
    if rows is None:
        return None
    unsampled = Sample(rows, (), False, before, frozenset(before))  # any process may be in a call that frees memory
    if not samples:
        return unsampled
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
            return unsampled._replace(rows=rows)
        found.append(taken)
    after = ledger.processes()
    changed = {pid for pid in before.keys() | after.keys() if _state(before.get(pid)) != _state(after.get(pid))}
    in_call = {pid for pid, process in before.items() if not process.quiet}
    return Sample(rows, tuple(found), not changed, before, frozenset(changed | in_call), begun_ns)


def is_hidden(process: Process, device: int) -> bool:
    """Return whether a process may have memory that NVML shows in no row."""
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
