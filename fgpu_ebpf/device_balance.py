"""How many orphaned bytes a device may still hold: its balance of memory in use.

    in use = rows of live processes + known rest + resident managed memory + orphans that are held + unexplained

NVML gives the first number and the rows. Managed memory is in no row, and how much of it is on the device is not known,
so it is estimated from below: the estimate rises when more is in use than orphans can explain, and falls by all managed
memory that is freed. Whatever is left bounds the orphans. An error of the estimate keeps orphans longer than necessary;
it lets none of them go that the device holds.

One Balance for each device, used by the reconcile thread. No I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
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

    `managed`: bytes of managed memory that live processes are charged. `managed_freed`: bytes, ever growing.
    `has_strangers`: processes that the ledger does not know hold memory there, and may have managed memory too.
    """

    managed: int
    managed_freed: int
    has_strangers: bool


class Balance:
    """The balance of one device over time."""

    def __init__(self) -> None:
        self.resident = 0  # bytes of managed memory that are on the device at least
        self.unexplained = 0  # bytes in use that nothing explains
        self._freed: int | None = None
        self._readings: deque[Reading] = deque(maxlen=LOOKS)

    def forget(self) -> None:
        """NVML did not answer: what it said before is no evidence any more."""
        self._readings.clear()

    def room(self, reading: Reading, orphans: Iterable[Orphan], charges: Charges) -> int | None:
        """Enters a look, and returns how many orphaned bytes the device may still hold; None: it cannot tell yet."""
        self._readings.append(reading)
        freed = charges.managed_freed - (self._freed if self._freed is not None else charges.managed_freed)
        self._freed = charges.managed_freed
        kept = sum(orphan.bytes for orphan in orphans)
        self.resident = max(0, self.resident - freed, self._known_resident(reading, charges, kept))
        self.resident = min(self.resident, reading.most if charges.has_strangers else _most_managed(charges))
        self.unexplained = max(0, reading.least - self.resident - kept)
        most = self._most()
        return None if most is None else max(0, most - self.resident)

    def _known_resident(self, reading: Reading, charges: Charges, kept: int) -> int:
        """What must be on the device beyond all orphans. Of processes that the ledger does not know it is known neither
        what they have nor when they take it: what is seen for some time counts.
        """
        quick = min(_most_managed(charges), reading.least - kept) if reading.calm else 0
        if not charges.has_strangers or len(self._readings) < LOOKS:
            return quick
        return max(quick, min(found.least for found in self._readings) - kept)

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
