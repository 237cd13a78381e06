"""How many orphaned bytes a device may still hold: its balance of memory in use.

    in use = rows of live processes + known rest + hidden memory + orphans that are held + unexplained

NVML gives the first number and the rows. Hidden memory is in no row: managed memory, of which an unknown part is on the
device, and handles of processes without a context, which a library of a tenant's own may only claim to have made. It is
therefore estimated from below: the estimate rises when more is in use than orphans can explain, and falls by all hidden
memory that is freed. What is left limits the orphans. An error of the estimate keeps orphans longer than necessary; it
releases none that the device holds. Managed memory of a process that the ledger does not know explains nothing: no
witness tells when that process frees it.

One Balance for each device, used by the reconcile thread. No I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from fgpu_ebpf.orphans import Orphan

# The driver takes device memory for managed pages in chunks that all processes share (seen on an H200).
CHUNK_BYTES = 128 << 20
CALM_LOOKS = 3  # a release needs so many looks in a row that agree, where no process changed anything during them
LOOKS = 25  # and so many where some process changed its memory while NVML was asked

Life = tuple[int, int, int]  # pid, generation and changes of a process


class Reading(NamedTuple):
    """Bytes in use that live processes and the known rest do not explain, by several samples of one look.

    `most`: where each process has the least that NVML shows for it. `least`: where each has all that NVML shows or that
    it is charged, or both if it is in a call: it may be taking memory, or have given up what is open elsewhere. `calm`:
    no process of the ledger took or freed memory between the first sample and the last.
    """

    most: int
    least: int
    calm: bool


class Charges(NamedTuple):
    """What the ledger says of one device.

    `kept`: all orphaned bytes. `managed`: bytes of managed memory that live processes are charged, and `managed_busy`
    those of processes that are in a call or changed something during the look: the driver may have freed them.
    `managed_freed`: bytes, ever growing. `handles`: bytes of handles by (pid, generation, changes), of processes that
    have no context and are not busy. `has_strangers`: processes that the ledger does not know have memory there, and
    some of it may be managed.
    """

    kept: int = 0
    managed: int = 0
    managed_busy: int = 0
    managed_freed: int = 0
    handles: Mapping[Life, int] = MappingProxyType({})
    has_strangers: bool = False


class Hidden:
    """The least that live processes have on the device and NVML shows in no row."""

    def __init__(self) -> None:
        self._least = 0
        self._freed: int | None = None
        self._handles: Mapping[Life, int] = {}

    def look(self, reading: Reading, charges: Charges) -> int:
        """Enters a look; bytes in all. What was freed since the last one may have been there at this one: it is
        subtracted from what this one showed too.
        """
        if reading.calm and not charges.has_strangers:
            self._least = max(self._least, beyond_orphans(reading, charges))
        self._least = max(0, min(self._least - self._lost(charges), _most_hidden(charges)))
        return max(0, self._least - charges.managed_busy)

    def _lost(self, charges: Charges) -> int:
        """Bytes that may have been freed since the last look: of a process that changed anything, all its handles."""
        before = charges.managed_freed if self._freed is None else self._freed
        handles = sum(bytes_ for life, bytes_ in self._handles.items() if charges.handles.get(life) != bytes_)
        self._freed, self._handles = charges.managed_freed, charges.handles
        return charges.managed_freed - before + handles


class Balance:
    """The balance of one device over time."""

    def __init__(self) -> None:
        self.unexplained = 0  # bytes in use that nothing explains
        self._hidden = Hidden()
        self._readings: deque[Reading] = deque(maxlen=LOOKS)

    def forget(self) -> None:
        """NVML did not answer: what it said before is no evidence any more."""
        self._readings.clear()

    def room(self, reading: Reading, charges: Charges) -> int | None:
        """Enters a look, and returns how many orphaned bytes the device may still hold; None: it cannot tell yet."""
        self._readings.append(reading)
        hidden = self._hidden.look(reading, charges)
        self.unexplained = max(0, reading.least - charges.kept - max(0, hidden - sum(charges.handles.values())))
        most = self._most()
        return None if most is None else max(0, most - hidden)

    def _most(self) -> int | None:
        """The greatest reading of as many looks as a release needs; None: there were too few."""
        recent = list(self._readings)[-CALM_LOOKS:]
        if not all(reading.calm for reading in recent):
            recent = list(self._readings) if len(self._readings) == LOOKS else []
        return max(reading.most for reading in recent) if len(recent) >= CALM_LOOKS else None


def beyond_orphans(reading: Reading, charges: Charges) -> int:
    """Bytes in use that only hidden memory explains, even if the device holds all orphans."""
    return min(_most_hidden(charges), reading.least + sum(charges.handles.values()) - charges.kept)


def _most_hidden(charges: Charges) -> int:
    return (charges.managed + CHUNK_BYTES if charges.managed else 0) + sum(charges.handles.values())


def surplus(spare: Sequence[tuple[Orphan, int]], excess: int) -> list[tuple[Orphan, int]]:
    """So many bytes of the first ones."""
    found = []
    for orphan, most in spare:
        bytes_ = min(most, excess)
        if bytes_ > 0:
            found.append((orphan, bytes_))
            excess -= bytes_
    return found
