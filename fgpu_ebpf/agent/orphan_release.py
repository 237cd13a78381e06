"""The release of orphaned bytes that a device no longer holds.

The invariant: the bytes that stay charged are the bytes that the device holds and that no live process explains, but at
most the orphaned bytes. `device_balance` computes these bytes for the whole device, and EndedRows computes these bytes
for the pid of each row. Both estimates are upper bounds, so an error keeps orphans longer than necessary. The invariant
determines how many bytes are released. The choice of orphans is not part of the invariant, because NVML names no owner
of memory that is in no row: see EndedRows._key().

This module runs in the reconcile thread, after the overheads of a pass are corrected. Memory in the row of an importing
process is therefore charged to that process before the orphan of the exporting process is released.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set

from fgpu_ebpf.agent.device_balance import Balance, Charges, Life, Reading, surplus
from fgpu_ebpf.driver.device_sample import Rows, Sample
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.orphans import Orphan
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.linux import procfs

# Bytes in use that are in no process's row, as seen on an H200: for each context (5.6 MiB), and once per device
# (3.2 MiB). Values that are too large release orphaned bytes too early.
CONTEXT_REST_BYTES = 6 << 20
DEVICE_REST_BYTES = 4 << 20
# Other memory that the driver may have, once per device: up to 25 MiB that the driver keeps of managed memory, and page
# tables of registered host memory. This number of orphaned bytes is released without evidence once the orphans are
# older than SLACK_AFTER_NS, which is longer than the driver needs after a process exit.
SLACK_BYTES = 32 << 20
SLACK_AFTER_NS = 5_000_000_000
# The time for which a decrease of a row counts as recent, which is longer than the passes of a release take. The driver
# needs up to 3.5 s to free the memory of processes that exit together. An orphan that another tenant adds in this time
# is younger, and would be released in place of the freed memory if the decrease did not count.
FALL_COUNTS_NS = 2_000_000_000
# The driver frees the memory of a process during the exit and up to SETTLED_NS after the exit. VAIN_NS is
# FGPU_PATIENCE_NS, after which an exit counts as complete in any case.
SETTLED_NS = 500_000_000
VAIN_NS = 4_000_000_000


class EndedRows:
    """The upper bound of the part of NVML's row of a pid that may belong to ended processes of that pid, on one device.

    The pid may now belong to another process, or to the same process after an exec.
    """

    def __init__(self, ledger: Ledger, device: int) -> None:
        self._ledger = ledger
        self._device = device
        self._rows: Rows | None = None  # all rows of the last pass
        self.most: dict[int, int] = {}  # by pid with orphans: the part of the row in the last pass
        self._orphaned: dict[int, int] = {}  # by pid: the orphaned bytes of the pid's ended processes in the last pass
        self._living: Set[int] = frozenset()  # pids of ended processes that live processes have now
        self._fell: dict[int, int] = {}  # by pid: the time of the last decrease of the row's ended part

    def look(self, sample: Sample, orphans: Iterable[Orphan]) -> dict[int, int]:
        """Record a sample, and return the bytes of ended processes by pid, for pids that NVML still lists."""
        orphaned: dict[int, int] = defaultdict(int)
        for orphan in orphans:
            orphaned[orphan.tgid] += orphan.bytes if orphan.ended_ns else 0
        most, now_ns = {pid: self._part(pid, bytes_, sample) for pid, bytes_ in orphaned.items()}, time.monotonic_ns()
        self._fell = {  # a process that has ended since the last pass had the whole row in that pass
            pid: now_ns if part < self.most.get(pid, self._row_then(pid)) else self._fell.get(pid, 0)
            for pid, part in most.items()
        }
        self._rows, self.most, self._orphaned = sample.rows, most, orphaned
        self._living = sample.processes.keys() & most.keys()
        return {pid: part for pid, part in most.items() if part}

    def released(self, orphan: Orphan, bytes_: int) -> None:
        """Subtract released bytes from the record, so that the next pass counts only bytes orphaned after this call."""
        if orphan.ended_ns:
            self._orphaned[orphan.tgid] -= bytes_

    def excess(self, orphans: Sequence[Orphan], room: int) -> list[tuple[Orphan, int]]:
        """Return which orphans to release, and how many bytes of each.

        Orphaned bytes beyond `room`, the most orphaned bytes that the device may hold, are released, except bytes that
        a row proves to be held. If there are no bytes beyond `room`, up to SLACK_BYTES of old orphans are released.

        If a live process has the pid again, the row proves less, because the driver rounds up the memory of the live
        process. If bytes of an old orphan with this pid are released, these bytes are charged to the live process, like
        all bytes in the row beyond the orphans.
        """
        kept, until_ns = sum(orphan.bytes for orphan in orphans), time.monotonic_ns() - SLACK_AFTER_NS
        proven, spare, slack = dict(self.most), [], []
        for orphan in sorted(orphans, key=self._key):
            held = min(orphan.bytes, proven.get(orphan.tgid, 0)) if orphan.ended_ns else 0
            proven[orphan.tgid] = proven.get(orphan.tgid, 0) - held
            spare.append((orphan, orphan.bytes - held))
            if orphan.since_ns < until_ns:
                slack.append((orphan, orphan.bytes if orphan.tgid in self._living else orphan.bytes - held))
        return surplus(spare, kept - room) or surplus(slack, min(SLACK_BYTES, kept - max(0, room - SLACK_BYTES)))

    def _key(self, orphan: Orphan) -> tuple[bool, bool, int]:
        """Return the key of an orphan in the order of releases.

        The order begins with the orphan that was most likely freed.

        If the row of a process decreased a moment ago, an orphan of that process was most likely freed. If no row
        decreased, the youngest orphan was most likely freed, because the driver frees most memory immediately, so old
        orphans are probably held by another process. Orphans of processes that NVML lists are at the end of the order.
        """
        fell = self._fell.get(orphan.tgid, 0) if orphan.ended_ns else 0
        is_named = bool(orphan.ended_ns and self.most.get(orphan.tgid))
        is_old = fell < time.monotonic_ns() - FALL_COUNTS_NS
        return is_named, is_old, -max(fell, orphan.ended_ns or orphan.since_ns)

    def _row_then(self, pid: int) -> int:
        return (self._rows or {}).get(pid) or 0

    def _part(self, pid: int, orphaned: int, sample: Sample) -> int:
        """Return the most bytes of a row that may belong to ended processes.

        This part grows only by bytes that were orphaned since the last pass. Other growth belongs to a live process,
        which the ledger may not have yet. If a live process is in a call, no bytes of the process are certain to be in
        the row, because the call may have freed the bytes already.
        """
        row, row_then, process = sample.rows.get(pid) or 0, self._row_then(pid), sample.processes.get(pid)
        part, more = self.most.get(pid, 0), max(0, orphaned - self._orphaned.get(pid, 0))
        if process is None and pid not in self.most:  # no process of the pid had ended in the last pass
            return min(orphaned, row)
        if process is None:
            freed = max(0, row_then - part - more) if pid in self._living else 0  # by calls, since the last pass
            return max(0, min(part + more - max(0, row_then - row - freed), row))
        own = 0 if pid in sample.busy else self._own(process)
        return max(0, min(part + more, orphaned, row - own))

    def _own(self, process: Process) -> int:
        """Return the part of a row that certainly belongs to a live process.

        Bytes of pools may be requested and not in use, so the overhead may be smaller than the contexts: see
        overhead_for(). The overhead may also contain an admission without a call, which is released with the last
        context. Therefore at most the size of one context counts.
        """
        device, pool = self._device, process.pool[self._device]
        size = self._ledger.context_bytes(device) if process.contexts[device] else 0
        certain = process.witnessed(device) - pool - process.handles_in_no_row(device)
        return certain + min(process.overhead[device] + pool, size)


class OrphanRelease:
    """The release of the orphans of one device."""

    def __init__(self, ledger: Ledger, device: int) -> None:
        self._ledger = ledger
        self._device = device
        self._rows = EndedRows(ledger, device)
        self._proven = 0  # bytes of ended processes without an entry, by NVML's rows of the last pass
        self._without: dict[int, int] = {}  # by level: orphaned bytes without an entry, in the last pass
        self._grew_ns: dict[int, int] = {}  # by level: when these bytes last grew
        self._exiting_ns: dict[int, int] = {}  # by pid: when the process was last found to be exiting
        self.balance = Balance()

    def ended_rows(self, sample: Sample, orphans: Sequence[Orphan]) -> dict[int, int]:
        """Return the bytes by pid that NVML shows for ended processes.

        A live process of the same pid is not charged for these bytes. Orphans that are in no row of NVML do not explain
        these bytes.

        Orphaned bytes without an entry may belong to any ended process, even to a process that was never in the ledger.
        If a level has orphaned bytes without an entry, the rows of all ended processes count.
        """
        found = self._rows.look(sample, orphans)
        over = sum(found.values()) - max(0, sum(orphan.bytes for orphan in orphans) - self._in_no_row(sample))
        for pid in found.keys() & sample.processes.keys():
            found[pid] -= max(0, min(found[pid], over))
        unknown = sample.rows.keys() - sample.processes.keys() - found.keys() if self._without else ()
        rows = {pid: row for pid in unknown if (row := sample.rows[pid]) and procfs.ended(pid)}
        self._proven = sum(rows.values())
        return found | rows

    def look(self, sample: Sample, orphans: Sequence[Orphan], ended: Mapping[int, int]) -> int | None:
        """Release the orphaned bytes that the device does not hold.

        Return how many orphaned bytes without an entry the device may hold, or None if the number is not known yet.
        """
        if not sample.taken:
            self.balance.forget()
            return None
        room = self.balance.room(self._reading(sample, ended), self._charges(sample, ended))
        if len(sample.taken) == 1:  # enough for the unexplained bytes, but no evidence for a release
            self.balance.forget()
            return None
        if room is None:
            return None
        for orphan, bytes_ in self._rows.excess(orphans, max(0, room - self._proven)):
            if self._ledger.orphans.let_go(orphan, bytes_):
                self._rows.released(orphan, bytes_)
        return max(self._proven, room - sum(orphan.bytes for orphan in orphans))

    def look_without_entries(self, levels: Iterable[int], room: int) -> None:
        """Release the orphaned bytes without an entry in the map that a level has had for two passes.

        Bytes that were orphaned after the sample of this pass are not in `room`, because a live process had these bytes
        in the sample.

        Args:
            levels: cgroup ids of the levels to check.
            room: how many orphaned bytes without an entry the device may hold.
        """
        entered: dict[int, int] = defaultdict(int)
        pages = {level: self._ledger.orphans.of_level(level) for level in levels}  # before entries: see orphans.bpf.h
        for orphan in self._entries():
            for level in orphan.levels:
                entered[level] += orphan.bytes
        now = {level: found[self._device] - entered[level] for level, found in pages.items() if found}
        for level, bytes_ in now.items():
            lasting = min(bytes_, self._without.get(level, 0))
            if lasting > room:
                self._ledger.orphans.disown(level, self._device, lasting - room)
        self._grew_ns = {
            level: time.monotonic_ns() if bytes_ > self._without.get(level, 0) else self._grew_ns.get(level, 0)
            for level, bytes_ in now.items()
        }
        self._without = {level: bytes_ for level, bytes_ in now.items() if bytes_ > 0}

    def note_kept(self, sample: Sample, levels: Iterable[int]) -> None:
        """Record on usage pages that the device still holds the orphaned bytes of levels, so that no request waits.

        Two cases are left out. If a process is exiting or has just exited, the device may free some bytes of the
        process soon. If the last reading shows that the device has freed some bytes, later readings may confirm this
        reading for a release.

        Args:
            sample: the sample of this pass.
            levels: levels that may have orphaned bytes without an entry, perhaps of a process that exits.
        """
        orphans, now_ns = self._entries(), time.monotonic_ns()
        recent = {orphan.tgid for orphan in orphans if now_ns < orphan.ended_ns + VAIN_NS}
        self._exiting_ns = {pid: now_ns if procfs.exiting(pid) else self._exiting_ns.get(pid, 0) for pid in recent}
        if self._rows.excess(orphans, max(0, self.balance.latest - self._proven)):
            return
        until_ns = {level: self._grew_ns.get(level, -VAIN_NS) + VAIN_NS for level in levels}
        for orphan in orphans:
            exit_ns = max(orphan.ended_ns, self._exiting_ns.get(orphan.tgid, 0))
            end_ns = min(exit_ns + SETTLED_NS, orphan.ended_ns + VAIN_NS) if orphan.ended_ns else 0
            until_ns |= {level: max(until_ns.get(level, 0), end_ns) for level in orphan.levels}
        for level, end_ns in until_ns.items():
            if end_ns < sample.begun_ns:
                self._ledger.orphans.looked(level, self._device, sample.begun_ns)

    def _entries(self) -> list[Orphan]:
        return [orphan for orphan in self._ledger.orphans.entries() if orphan.device == self._device]

    def _reading(self, sample: Sample, ended: Mapping[int, int]) -> Reading:
        rest = self._contexts(sample) * CONTEXT_REST_BYTES + DEVICE_REST_BYTES
        most_ended = {**ended, **self._rows.most}
        most = max(taken.in_use - sum(_shown(taken.least, most_ended).values()) for taken in sample.taken)
        least = min(taken.in_use - self._taken(_shown(taken.greatest, ended), sample) for taken in sample.taken)
        return Reading(max(0, most - rest), max(0, least - rest), sample.calm)

    def _in_no_row(self, sample: Sample) -> int:
        """Return how many orphaned bytes are in no row.

        Live processes count with all bytes that are charged and not shown.
        """
        device, live = self._device, sample.processes
        shown = {pid for pid in live.keys() & sample.rows.keys() if live[pid].contexts[device]}
        hidden = sum(p.managed[device] if pid in shown else p.bytes[device] for pid, p in live.items())
        rest = self._contexts(sample) * CONTEXT_REST_BYTES + DEVICE_REST_BYTES + SLACK_BYTES
        found = min((taken.in_use - sum(taken.greatest.values()) for taken in sample.taken), default=0)
        return max(0, found - rest - hidden)

    def _contexts(self, sample: Sample) -> int:
        """Return the number of contexts of all processes with a row.

        A tenant's own library can claim any number of contexts. Therefore at most as many contexts count as fit into
        the overhead, which is set according to NVML.
        """
        device, size = self._device, self._ledger.context_bytes(self._device)
        claimed = (sample.processes.get(pid) for pid in sample.rows)
        return sum(max(1, min(p.contexts[device], p.overhead[device] // size)) if p and size else 1 for p in claimed)

    def _taken(self, shown: Mapping[int, int], sample: Sample) -> int:
        """Return the maximum of the bytes that processes may have in use, without managed memory."""
        charged = {pid: p.bytes[self._device] - p.managed[self._device] for pid, p in sample.processes.items()}
        pairs = ((pid, shown.get(pid, 0), charged.get(pid, 0)) for pid in shown.keys() | charged.keys())
        return sum(row + max(0, own) if pid in sample.busy else max(row, own) for pid, row, own in pairs)

    def _charges(self, sample: Sample, ended: Mapping[int, int]) -> Charges:
        """Return the charges of the ledger.

        Orphans are read again after the sample's processes, so that a process that exits in between is in both
        readings. Only the reconcile thread releases orphans, so no orphan is missing.
        """
        device, live, orphans = self._device, sample.processes, self._entries()
        known = live.keys() | {orphan.tgid for orphan in orphans}
        return Charges(
            kept=sum(orphan.bytes for orphan in orphans),
            managed=sum(p.managed[device] for p in live.values()),
            managed_busy=sum(p.managed[device] for pid, p in live.items() if pid in sample.busy),
            managed_freed=self._ledger.orphans.managed_freed(device),
            handles=self._hidden_handles(sample, ended),
            has_strangers=bool(sample.rows.keys() - known),
        )

    def _hidden_handles(self, sample: Sample, ended: Mapping[int, int]) -> dict[Life, int]:
        """Return the bytes of handles of processes that have no context and therefore no row."""
        return {
            (pid, process.generation, process.changes): handles
            for pid, process in sample.processes.items()
            if (handles := process.handles_in_no_row(self._device))
            and pid not in sample.busy
            and (sample.rows.get(pid) or 0) <= ended.get(pid, 0)
        }


def _shown(rows: Mapping[int, int], ended: Mapping[int, int]) -> dict[int, int]:
    """Return the bytes that NVML shows for live processes, by pid."""
    return {pid: max(0, row - ended.get(pid, 0)) for pid, row in rows.items()}
