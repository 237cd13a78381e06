"""How many orphaned bytes a device may still hold: its balance of memory in use.

    in use = rows of live processes + known rest + resident managed memory + orphans that are held + unexplained

NVML gives the first number and the rows. Managed memory is in no row, and how much of it is on the device is not known,
so it is estimated from below: the estimate rises when more is in use than orphans can explain, and falls by all managed
memory that is freed. Whatever is left bounds the orphans. An error of the estimate keeps orphans longer than necessary;
it lets none of them go that the device holds, but for managed memory of a process that the ledger does not know: when
such a process frees it and lives on, nothing tells of it.

One Balance for each device, used by the reconcile thread. No I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fgpu_ebpf.orphans import Orphan

# The driver takes device memory for managed pages in chunks that all processes share (seen on an H200).
CHUNK_BYTES = 128 << 20
CALM_LOOKS = 3  # a release needs so many looks in a row that agree, where no process changed anything during them
LOOKS = 25  # and so many where some process changed its memory while NVML was asked


class Reading(NamedTuple):
    """Bytes in use that live processes and the known rest do not explain, by several samples of one look.

    `most`: where each process has the least that NVML shows for it. `least`: where each has all that NVML shows or that
    it is charged, so that memory which a process is just taking is explained. `calm`: no process of the ledger took or
    freed memory between the first sample and the last.
    """

    most: int
    least: int
    calm: bool


class Charges(NamedTuple):
    """What the ledger says of one device.

    `kept`: all orphaned bytes. `managed`: bytes of managed memory that live processes are charged. `managed_freed`:
    bytes, ever growing, counted before the driver frees them. `is_settled`: no process with managed memory is in the
    middle of a call. `strangers`: processes that the ledger does not know hold memory there, and may have managed memory
    too.
    """

    kept: int
    managed: int
    managed_freed: int
    is_settled: bool
    strangers: frozenset[int]


class Residency:
    """Bytes of managed memory that are on the device at least: of tenants, and of processes the ledger does not know."""

    def __init__(self) -> None:
        self._tenants = self._strangers = 0
        self._freed: int | None = None
        self._pids: frozenset[int] = frozenset()
        self._leasts: deque[int] = deque(maxlen=LOOKS)

    def look(self, reading: Reading, charges: Charges) -> int:
        """Enters a look; bytes in all. What was freed since the last one may have been there at this one."""
        freed = charges.managed_freed - (self._freed if self._freed is not None else charges.managed_freed)
        self._freed = charges.managed_freed
        has_left = not charges.strangers >= self._pids
        self._pids = charges.strangers
        if freed or has_left or not charges.is_settled:
            self._leasts.clear()
        if has_left:
            self._strangers = 0
        if charges.is_settled:
            self._learn(reading, charges)
        self._tenants = max(0, min(self._tenants - freed, _most_managed(charges)))
        self._strangers = max(0, min(self._strangers - freed, reading.most - self._tenants))
        return self._tenants + self._strangers

    def _learn(self, reading: Reading, charges: Charges) -> None:
        """What is in use beyond all orphans. Of processes that the ledger does not know it is known neither what they
        have nor when they take it: what is seen for some time counts, and is not taken for a tenant's.
        """
        beyond = reading.least - charges.kept
        if charges.strangers:
            self._leasts.append(reading.least)
            if len(self._leasts) == LOOKS:
                self._strangers = max(self._strangers, min(self._leasts) - charges.kept - self._tenants)
        elif reading.calm:
            self._tenants = max(self._tenants, min(_most_managed(charges), beyond))


class Balance:
    """The balance of one device over time."""

    def __init__(self) -> None:
        self.unexplained = 0  # bytes in use that nothing explains
        self._residency = Residency()
        self._readings: deque[Reading] = deque(maxlen=LOOKS)

    def forget(self) -> None:
        """NVML did not answer: what it said before is no evidence any more."""
        self._readings.clear()

    def room(self, reading: Reading, charges: Charges) -> int | None:
        """Enters a look, and returns how many orphaned bytes the device may still hold; None: it cannot tell yet."""
        self._readings.append(reading)
        resident = self._residency.look(reading, charges)
        self.unexplained = max(0, reading.least - resident - charges.kept)
        most = self._most()
        return None if most is None else max(0, most - resident)

    def _most(self) -> int | None:
        """The greatest reading of as many looks as a release needs; None: there were too few."""
        recent = list(self._readings)[-CALM_LOOKS:]
        if not all(reading.calm for reading in recent):
            recent = list(self._readings) if len(self._readings) == LOOKS else []
        return max(reading.most for reading in recent) if len(recent) >= CALM_LOOKS else None


def _most_managed(charges: Charges) -> int:
    return charges.managed + CHUNK_BYTES if charges.managed else 0


def surplus(orphans: Sequence[Orphan], rows: Mapping[int, int], room: int) -> list[tuple[Orphan, int]]:
    """Which orphans to let go, and how many bytes of each, so that `room` bytes are left of all.

    First those whose process NVML does not name any more, and of these the oldest. `rows`: bytes by pid that NVML shows
    for processes that have ended.
    """
    excess, found = sum(orphan.bytes for orphan in orphans) - room, []
    for orphan in sorted(orphans, key=lambda one: (bool(one.ended_ns and rows.get(one.tgid)), one.since_ns)):
        if excess <= 0:
            break
        bytes_ = min(orphan.bytes, excess)
        found.append((orphan, bytes_))
        excess -= bytes_
    return found
