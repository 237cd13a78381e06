"""Lets go of orphaned bytes when a device does not hold them any more.

Runs in the reconcile thread, after the overheads of a look are corrected: memory that an importer's row shows now is
charged to the importer before the exporter's orphan is let go.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fgpu_ebpf.device_balance import Balance, Charges, Life, Reading, surplus
from fgpu_ebpf.device_sample import Rows, Sample
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.orphans import Orphan
from fgpu_ebpf.processes import Process

# Bytes in use that no process's row has, as an H200 showed: for each context (5.6 MiB), and once for a device (3.2).
# What is too much here lets orphaned bytes go too early.
CONTEXT_REST_BYTES = 6 << 20
DEVICE_REST_BYTES = 4 << 20
# What the driver may have besides, once for a device: up to 25 MiB that it keeps of managed memory, page tables of
# registered host memory. So much of an orphan is let go when it has outlived the time in which a driver ends processes.
SLACK_BYTES = 32 << 20
SLACK_AFTER_NS = 5_000_000_000
FALL_COUNTS_NS = 2_000_000_000  # longer than the looks take that a release needs


class _Row(NamedTuple):
    """What NVML showed of a pid, how much of it was of ended processes, and what was orphaned of them."""

    bytes: int
    ended: int
    orphaned: int


class Spare(NamedTuple):
    """How many bytes of an orphan the device may have freed, by what NVML shows.

    `slack`: how many of an old one may be let go without further evidence.
    """

    orphan: Orphan
    freed: int
    slack: int


class EndedRows:
    """Which part of NVML's row of a pid belongs to processes of that pid that have ended, on one device.

    The pid may be that of another process now, or of the same one with another program.
    """

    def __init__(self, ledger: Ledger, device: int) -> None:
        self._ledger = ledger
        self._device = device
        self._last: dict[int, _Row] = {}
        self._rows: Rows | None = None  # all of the last look
        self._living: frozenset[int] = frozenset()  # pids of ended processes that are those of living ones too
        self._fell: dict[int, int] = {}  # pid -> when the ended part of its row was last seen to be less

    def look(self, rows: Rows, live: Mapping[int, Process], orphans: Iterable[Orphan]) -> dict[int, int]:
        """Bytes by pid, for pids of ended processes that NVML still names."""
        orphaned: dict[int, int] = defaultdict(int)
        for orphan in orphans:
            orphaned[orphan.tgid] += orphan.bytes if orphan.ended_ns else 0
        last = {
            pid: _Row(rows.get(pid) or 0, self._ended(pid, rows.get(pid) or 0, bytes_, live.get(pid)), bytes_)
            for pid, bytes_ in orphaned.items()
        }
        now = time.monotonic_ns()
        fell = {pid: now if row.ended < self._before(pid) else self._fell.get(pid, 0) for pid, row in last.items()}
        self._last, self._rows, self._fell = last, rows, fell
        self._living = frozenset(live.keys() & last.keys())
        return {pid: row.ended for pid, row in last.items() if row.ended}

    def _before(self, pid: int) -> int:
        """What the last look showed of a process that has ended; it may have been alive then."""
        return self._last[pid].ended if pid in self._last else (self._rows or {}).get(pid) or 0

    def released(self, orphan: Orphan, bytes_: int) -> None:
        """So that what is orphaned until the next look is not taken for these."""
        row = self._last.get(orphan.tgid)
        if row and orphan.ended_ns:
            self._last[orphan.tgid] = row._replace(orphaned=row.orphaned - bytes_)

    def spare(self, orphans: Iterable[Orphan]) -> list[Spare]:
        """How many bytes of each orphan the device may have freed: all but what a row proves that it holds.

        The first is the most likely one. A process's row has fallen a moment ago; else the youngest: a driver frees
        most memory at once, so what has stayed for long is held by something. A process that NVML names comes last.

        A row that is also a living process's proves less: a driver rounds up what that process has. Slack that is let
        go there is charged to the living process, as all that its row has beyond the orphans.
        """
        proven, found = {pid: row.ended for pid, row in self._last.items()}, []
        for orphan in sorted(orphans, key=self._key):
            held = min(orphan.bytes, proven.get(orphan.tgid, 0)) if orphan.ended_ns else 0
            proven[orphan.tgid] = proven.get(orphan.tgid, 0) - held
            slack = orphan.bytes if orphan.tgid in self._living else orphan.bytes - held
            found.append(Spare(orphan, orphan.bytes - held, slack))
        return found

    def _key(self, orphan: Orphan) -> tuple[bool, bool, int]:
        row, fell = self._last.get(orphan.tgid), self._fell.get(orphan.tgid, 0) if orphan.ended_ns else 0
        is_named = bool(orphan.ended_ns and row and row.ended)
        is_old = fell < time.monotonic_ns() - FALL_COUNTS_NS
        return is_named, is_old, -max(fell, orphan.ended_ns or orphan.since_ns)

    def _ended(self, pid: int, row: int, orphaned: int, process: Process | None) -> int:
        """Never more than it was, but by what was orphaned since and was in the row before: the rest has grown
        for a living process. What ended without a context had no row.
        """
        then = self._last.get(pid)
        if then is None and process is None:
            return row
        bytes_then, ended_then, orphaned_then = then or _Row(row, 0, 0)
        more = max(0, orphaned - orphaned_then)
        if process and self._rows is not None:
            more = min(more, max(0, (self._rows.get(pid) or 0) - ended_then))
        most = min(ended_then + more, orphaned) if process else ended_then + more
        own = self._own(process) if process else 0
        fallen = 0 if process else max(0, bytes_then - row)
        return max(0, min(most - fallen, row - own))

    def _own(self, process: Process) -> int:
        """What the row has of a living process. Its overhead may be an admission that no call followed, which goes with
        its last context: no more of that counts than one context.
        """
        device = self._device
        size = self._ledger.context_bytes(device) if process.contexts[device] else 0
        return process.witnessed(device) - process.handles_in_no_row(device) + min(process.overhead[device], size)


def excess(spare: Sequence[Spare], room: int) -> list[tuple[Orphan, int]]:
    """Which orphans to release, and how many bytes of each: what the device has no room for; else the slack, of old.

    `spare`: the first ones first.
    """
    kept = sum(one.orphan.bytes for one in spare)
    found = surplus([(one.orphan, one.freed) for one in spare], kept - room)
    if found:
        return found
    until_ns = time.monotonic_ns() - SLACK_AFTER_NS
    old = [(one.orphan, one.slack) for one in spare if one.orphan.since_ns < until_ns]
    return surplus(old, min(SLACK_BYTES, kept - max(0, room - SLACK_BYTES)))


class OrphanRelease:
    """The orphans of one device."""

    def __init__(self, ledger: Ledger, device: int) -> None:
        self._ledger = ledger
        self._device = device
        self._rows = EndedRows(ledger, device)
        self._without: dict[int, int] = {}  # level -> orphaned bytes without an entry, at the last look
        self.balance = Balance()

    def ended_rows(self, sample: Sample, orphans: Sequence[Orphan]) -> dict[int, int]:
        """Bytes by pid that NVML shows for processes that have ended."""
        return self._rows.look(sample.rows, sample.processes, orphans)

    def look(self, sample: Sample, orphans: Sequence[Orphan], ended: Mapping[int, int]) -> int | None:
        """Lets go of what the device does not hold. Returns how many orphaned bytes it may hold beyond those that have
        entries; None: it cannot tell yet.
        """
        if not sample.taken:
            self.balance.forget()
            return None
        room = self.balance.room(self._reading(sample, ended), self._charges(sample, orphans, ended))
        if len(sample.taken) == 1:  # enough for what nothing explains, and no evidence for a release
            self.balance.forget()
            return None
        if room is None:
            return None
        for orphan, bytes_ in excess(self._rows.spare(orphans), room):
            if self._ledger.orphans.let_go(orphan, bytes_):
                self._rows.released(orphan, bytes_)
        return max(0, room - sum(orphan.bytes for orphan in orphans))

    def look_without_entries(self, levels: Iterable[int], room: int) -> None:
        """The same for orphaned bytes that had no room in the map: of each level that has had some for two looks."""
        entered: dict[int, int] = defaultdict(int)
        pages = {level: self._ledger.orphans.of_level(level) for level in levels}  # first: see orphans.bpf.h
        for orphan in self._ledger.orphans.entries():
            for level in orphan.levels if orphan.device == self._device else ():
                entered[level] += orphan.bytes
        now = {level: found[self._device] - entered[level] for level, found in pages.items() if found}
        for level, bytes_ in now.items():
            lasting = min(bytes_, self._without.get(level, 0))
            if lasting > room:
                self._ledger.orphans.disown(level, self._device, lasting - room)
        self._without = {level: bytes_ for level, bytes_ in now.items() if bytes_ > 0}

    def _reading(self, sample: Sample, ended: Mapping[int, int]) -> Reading:
        rest = self._contexts(sample) * CONTEXT_REST_BYTES + DEVICE_REST_BYTES
        most = max(taken.in_use - sum(_shown(taken.least, ended).values()) for taken in sample.taken)
        least = min(taken.in_use - self._taken(_shown(taken.greatest, ended), sample) for taken in sample.taken)
        return Reading(max(0, most - rest), max(0, least - rest), sample.calm)

    def _contexts(self, sample: Sample) -> int:
        """Of all processes with a row. A library of a tenant's own may claim to have made any number: no more count
        than NVML shows bytes for.
        """
        device, size = self._device, self._ledger.context_bytes(self._device)
        claimed = (sample.processes.get(pid) for pid in sample.rows)
        return sum(max(1, min(p.contexts[device], p.overhead[device] // size)) if p and size else 1 for p in claimed)

    def _taken(self, shown: Mapping[int, int], sample: Sample) -> int:
        """The most that processes may have in use beside managed memory."""
        charged = {pid: p.bytes[self._device] - p.managed[self._device] for pid, p in sample.processes.items()}
        pairs = ((pid, shown.get(pid, 0), charged.get(pid, 0)) for pid in shown.keys() | charged.keys())
        return sum(row + max(0, own) if pid in sample.busy else max(row, own) for pid, row, own in pairs)

    def _charges(self, sample: Sample, orphans: Sequence[Orphan], ended: Mapping[int, int]) -> Charges:
        """Orphans are read again: what was orphaned before the processes were read is in either list."""
        device, live = self._device, sample.processes
        now = [orphan for orphan in self._ledger.orphans.entries() if orphan.device == device]
        known = live.keys() | {orphan.tgid for orphan in (*orphans, *now)}
        return Charges(
            kept=max(sum(orphan.bytes for orphan in found) for found in (orphans, now)),
            managed=sum(p.managed[device] for p in live.values()),
            managed_busy=sum(p.managed[device] for pid, p in live.items() if pid in sample.busy),
            managed_freed=self._ledger.orphans.managed_freed(device),
            handles=self._hidden_handles(sample, ended),
            has_strangers=any(pid not in known for pid in sample.rows),
        )

    def _hidden_handles(self, sample: Sample, ended: Mapping[int, int]) -> dict[Life, int]:
        """Of processes without a context, which have no row."""
        device, found = self._device, {}
        for pid, process in sample.processes.items():
            has_row = (sample.rows.get(pid) or 0) > ended.get(pid, 0)
            handles = process.handles_in_no_row(device)
            if handles and not has_row and pid not in sample.busy:
                found[pid, process.generation, process.changes] = handles
        return found


def _shown(rows: Mapping[int, int], ended: Mapping[int, int]) -> dict[int, int]:
    """Bytes of live processes by NVML."""
    return {pid: max(0, row - ended.get(pid, 0)) for pid, row in rows.items()}
