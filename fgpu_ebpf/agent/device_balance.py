"""The balance of a device's memory in use, which limits how many orphaned bytes the device may still hold.

    in use = rows of live processes + known rest + hidden memory + orphans that are held + unexplained

NVML reports the memory in use and a row for each process. The known rest is the memory that the driver uses itself
(`orphan_release` has the sizes). Hidden memory is memory of live processes in no row: managed memory, of which an
unknown part is on the device, and handles of processes without a context. The ledger may have too many handles, because
a tenant's own library can falsely report that handles were created. Hidden memory is therefore estimated from below:
the estimate rises when more memory is in use than orphans can explain, and falls by all hidden memory that is freed.
The memory in use minus rows, known rest and hidden memory is the upper bound of the orphans. If the estimate is too
low, orphans are kept longer than necessary, but no orphan that the device holds is released. Managed memory of a
process without an entry in the ledger explains nothing, because no probe records when that process frees this memory.

The reconcile thread has one Balance for each device. This module does no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from fgpu_ebpf.ledger.orphans import Orphan

# The driver allocates device memory for managed pages in chunks that all processes share (seen on an H200).
CHUNK_BYTES = 128 << 20
# Rows and bytes in use come from different calls of NVML. If memory is freed and allocated again between these calls, a
# reading shows too few bytes. Only one reading without this error is needed, because the greatest reading counts.
# Probes record most changes, but not the memory that the driver allocates for its own use or that unmanaged processes
# have.
CALM_LOOKS = 3  # readings that a release needs, if no process changed its memory during the calls of NVML
# Readings that a release needs if a process changed its memory. If a program allocates and frees in a loop that takes
# as long as two calls of NVML, up to half of the readings may be wrong. With such a program, 3 wrong readings in a row
# are frequent, and 25 are not. If only calm readings counted, the program would keep the orphans of all tenants
# charged.
LOOKS = 25

Life = tuple[int, int, int]  # pid, generation and changes of a process


class Reading(NamedTuple):
    """The bytes in use that live processes and the known rest do not explain, from several samples of one pass.

    `most`: the upper bound, for which each process counts with the least bytes that NVML shows. `least`: the lower
    bound, for which each process counts with its charge or with the most bytes that NVML shows, whichever is larger. In
    the lower bound a process in a call counts with the sum of the charge and these bytes, because the process may be
    allocating memory, or may have freed memory that another process has open. `calm`: no process of the ledger
    allocated or freed memory between the first sample and the last.
    """

    most: int
    least: int
    calm: bool


class Charges(NamedTuple):
    """The charges of the ledger for one device.

    `kept`: all orphaned bytes. `managed`: managed memory charged to live processes. `managed_busy`: the part of
    `managed` that is charged to processes that are in a call or changed their memory during the pass; the driver may
    have freed this part. `managed_freed`: the managed bytes that were ever freed. `handles`: bytes of handles by (pid,
    generation, changes), for processes without a context that are not busy. `has_strangers`: processes without an entry
    in the ledger have memory on the device, part of which may be managed.
    """

    kept: int = 0
    managed: int = 0
    managed_busy: int = 0
    managed_freed: int = 0
    handles: Mapping[Life, int] = MappingProxyType({})
    has_strangers: bool = False

    @property
    def handle_bytes(self) -> int:
        """The sum of `handles`."""
        return sum(self.handles.values())


class Hidden:
    """A lower bound of the memory on a device that live processes have and NVML shows in no row."""

    def __init__(self) -> None:
        self._least = 0
        self._freed: int | None = None
        self._handles: Mapping[Life, int] = {}

    def look(self, reading: Reading, charges: Charges) -> int:
        """Record a reading, and return the estimate in bytes.

        Memory that was freed since the last reading may still have been in use in the samples of this reading, so the
        freed bytes are subtracted from this reading's value too.
        """
        most = (charges.managed + CHUNK_BYTES if charges.managed else 0) + charges.handle_bytes
        if reading.calm and not charges.has_strangers:  # the bytes in use beyond all orphans are hidden memory
            self._least = max(self._least, min(most, reading.least + charges.handle_bytes - charges.kept))
        self._least = max(0, min(self._least - self._lost(charges), most))
        return max(0, self._least - charges.managed_busy)

    def _lost(self, charges: Charges) -> int:
        """Return the bytes that may have been freed since the last reading.

        The result is the freed managed bytes plus the earlier handle bytes of each process with a changed number of
        handle bytes.
        """
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
        """Discard the earlier readings after a pass without enough samples, which interrupts the sequence."""
        self._readings.clear()

    def room(self, reading: Reading, charges: Charges) -> int | None:
        """Record a reading, and return how many orphaned bytes the device may still hold.

        The result is None as long as there are too few readings for a release.
        """
        self._readings.append(reading)
        hidden = self._hidden.look(reading, charges)
        self.unexplained = max(0, reading.least - charges.kept - max(0, hidden - charges.handle_bytes))
        self.latest = max(0, reading.most - hidden)
        readings = list(self._readings)
        needed = CALM_LOOKS if all(reading.calm for reading in readings[-CALM_LOOKS:]) else LOOKS
        return None if len(readings) < needed else max(0, max(r.most for r in readings[-needed:]) - hidden)


def surplus(spare: Sequence[tuple[Orphan, int]], excess: int) -> list[tuple[Orphan, int]]:
    """Return the first orphans of `spare`, and the bytes of each, that add up to `excess`.

    Args:
        spare: the orphans, each with the most bytes to take.
        excess: the wanted sum in bytes. If `spare` has less, all of `spare` is returned.
    """
    found = []
    for orphan, most in spare:
        bytes_ = min(most, excess)
        if bytes_ > 0:
            found.append((orphan, bytes_))
            excess -= bytes_
    return found
