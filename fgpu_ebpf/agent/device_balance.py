"""Orphaned bytes that a device may still hold: its balance of memory in use.

    in use = rows of live processes + known rest + hidden memory + orphans that are held + unexplained

NVML gives the first number and the rows. Hidden memory is in no row: managed memory, of which an unknown part is on the
device, and handles of processes without a context, which a library of a tenant's own may only claim to have made. It is
therefore estimated from below: the estimate rises when more is in use than orphans can explain, and falls by all hidden
memory that is freed. What is left limits the orphans. An error of the estimate keeps orphans longer than necessary; it
releases none that the device holds. Managed memory of a process that the ledger does not know explains nothing: no
probe sees when that process frees it.

The reconcile thread has one Balance for each device. No I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from fgpu_ebpf.ledger.orphans import Orphan

# The driver takes device memory for managed pages in chunks that all processes share (seen on an H200).
CHUNK_BYTES = 128 << 20
CALM_LOOKS = 3  # looks that must agree before a release, if no process changed anything during them
LOOKS = 25  # and if some process changed its memory while NVML was asked

Life = tuple[int, int, int]  # pid, generation and changes of a process


class Reading(NamedTuple):
    """Bytes in use that live processes and the known rest do not explain, by several samples of one pass.

    `most`: each process is counted with the least that NVML shows for it. `least`: with the most that NVML shows or
    that it is charged; with both if it is in a call, because it may be allocating memory, or may have freed memory that
    is open elsewhere. `calm`: no process of the ledger took or freed memory between the first sample and the last.
    """

    most: int
    least: int
    calm: bool


class Charges(NamedTuple):
    """Charges of the ledger for one device.

    `kept`: all orphaned bytes. `managed`: managed memory charged to live processes; `managed_busy`: the part of it
    charged to processes that are in a call or changed something during the pass, which the driver may have freed.
    `managed_freed`: a counter of bytes. `handles`: bytes of handles by (pid, generation, changes), for processes
    without a context that are not busy. `has_strangers`: processes unknown to the ledger have memory there, part of
    which may be managed.
    """

    kept: int = 0
    managed: int = 0
    managed_busy: int = 0
    managed_freed: int = 0
    handles: Mapping[Life, int] = MappingProxyType({})
    has_strangers: bool = False


class Hidden:
    """A lower bound of the memory on a device that live processes have and NVML shows in no row."""

    def __init__(self) -> None:
        self._least = 0
        self._freed: int | None = None
        self._handles: Mapping[Life, int] = {}

    def look(self, reading: Reading, charges: Charges) -> int:
        """Enter a reading, and return the hidden bytes.

        Memory that was freed since the last reading may have been there at this one, so it is subtracted from this
        reading's value too.
        """
        if reading.calm and not charges.has_strangers:
            self._least = max(self._least, beyond_orphans(reading, charges))
        self._least = max(0, min(self._least - self._lost(charges), _most_hidden(charges)))
        return max(0, self._least - charges.managed_busy)

    def _lost(self, charges: Charges) -> int:
        """Return bytes that may have been freed since the last reading: all handles of a process that changed any."""
        before = charges.managed_freed if self._freed is None else self._freed
        handles = sum(bytes_ for life, bytes_ in self._handles.items() if charges.handles.get(life) != bytes_)
        self._freed, self._handles = charges.managed_freed, charges.handles
        return charges.managed_freed - before + handles


class Balance:
    """The balance of one device over time."""

    def __init__(self) -> None:
        self.unexplained = 0  # bytes in use that nothing explains
        self.latest = 0  # orphaned bytes that the device may still hold, by the last reading alone
        self._hidden = Hidden()
        self._readings: deque[Reading] = deque(maxlen=LOOKS)

    def forget(self) -> None:
        """Discard earlier readings, because NVML did not answer."""
        self._readings.clear()

    def room(self, reading: Reading, charges: Charges) -> int | None:
        """Record a reading. Return how many orphaned bytes the device may still hold; None: too few readings."""
        self._readings.append(reading)
        hidden = self._hidden.look(reading, charges)
        self.unexplained = max(0, reading.least - charges.kept - max(0, hidden - sum(charges.handles.values())))
        self.latest = max(0, reading.most - hidden)
        most = self._most()
        return None if most is None else max(0, most - hidden)

    def _most(self) -> int | None:
        """Return the greatest of as many readings as a release needs; None: there are too few."""
        recent = list(self._readings)[-CALM_LOOKS:]
        if not all(reading.calm for reading in recent):
            recent = list(self._readings) if len(self._readings) == LOOKS else []
        return max(reading.most for reading in recent) if len(recent) >= CALM_LOOKS else None


def beyond_orphans(reading: Reading, charges: Charges) -> int:
    """Return the bytes in use that only hidden memory explains, even if the device holds all orphans."""
    return min(_most_hidden(charges), reading.least + sum(charges.handles.values()) - charges.kept)


def _most_hidden(charges: Charges) -> int:
    return (charges.managed + CHUNK_BYTES if charges.managed else 0) + sum(charges.handles.values())


def surplus(spare: Sequence[tuple[Orphan, int]], excess: int) -> list[tuple[Orphan, int]]:
    """Return the first orphans and bytes of each that sum to `excess`."""
    found = []
    for orphan, most in spare:
        bytes_ = min(most, excess)
        if bytes_ > 0:
            found.append((orphan, bytes_))
            excess -= bytes_
    return found
