"""Compare the simulated driver's bytes of a tenant with the agent's figures.

The result has the bytes that are not charged, and the processes that the agent does not report. All bytes are those of
device 0. The module imports nothing of fgpu.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 20  # right shift by this number of bits converts bytes to MiB
# The part of the driver that is in no process's memory, as the agent estimates it (docs/orphaned-memory.md).
CONTEXT_REST_BYTES, DEVICE_REST_BYTES = 6 << MIB, 4 << MIB
LASTING_SECONDS = 5.0  # the hostile tenant keeps descriptors of exported memory open for 2.5 s at most


@dataclass(frozen=True)
class Compared:
    """A comparison at one moment.

    Attributes:
        used_bytes: the ledger's bytes of the tenant.
        holding: the tenant's running processes that hold driver memory.
        how: the processes that the agent reports, each with the way in which it bypasses the shim.
        uncharged: the processes that hold more driver memory than is charged to them. It contains "ended" if exited
            processes and exports hold more than the tenant is charged for beyond its running processes, and more than
            `excess` explains.
        text: the figures of the comparison, for messages.
    """

    used_bytes: int
    holding: frozenset[int]
    how: Mapping[int, str]
    uncharged: frozenset[object]
    text: str

    def unnamed(self, bypassing: Collection[int]) -> set[object]:
        """Return the processes that the agent fails to report.

        These hold driver memory and are not reported at all, or are in `bypassing` and are not reported as bypassing.
        """
        return {*self.holding - self.how.keys(), *(pid for pid in bypassing if not self.how.get(pid))}


class Excess:
    """The highest error of the agent's estimate of the driver's own part in the last LASTING_SECONDS, in bytes.

    The agent may release this many orphaned bytes while the device still holds them. They are not charged again when
    contexts end and the estimate becomes better, but only the hostile tenant's open descriptors keep such memory.
    """

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque()  # times of the monotonic clock, and bytes

    def look(self, books: Mapping[str, Any]) -> int:
        """Record a dump of the simulated driver. Return the highest excess in the last LASTING_SECONDS."""
        now, device = time.monotonic(), books["devices"][0]
        contexts = sum(entry["contexts"] for entry in books["processes"] if not entry["device"])
        own = device["driver_bytes"] - device["exported_bytes"]
        self._recent.append((now, max(0, contexts * CONTEXT_REST_BYTES + DEVICE_REST_BYTES - own)))
        while self._recent[0][0] < now - LASTING_SECONDS:
            self._recent.popleft()
        return max(bytes_ for _, bytes_ in self._recent)


def compare(
    books: Mapping[str, Any], tenants: Sequence[Mapping[str, Any]], path: str, others: Collection[int], excess: int = 0
) -> Compared:
    """Return a comparison.

    Args:
        books: the dump of the simulated driver.
        tenants: the tenants of the agent's Snapshot.
        path: the tenant's cgroup.
        others: processes of other tenants. All other memory counts as the tenant's.
        excess: bytes of ended processes and exports that the agent may have released too early (Excess).
    """
    theirs = [entry for entry in books["processes"] if entry["pid"] not in others]
    held = {entry["pid"]: entry["bytes"] for entry in theirs if not entry["ended"]}
    left = sum(e["bytes"] for e in theirs if e["ended"]) + sum(d["exported_bytes"] for d in books["devices"])
    used = sum(t["devices"][0]["used_bytes"] for t in tenants if t["path"] == path)
    inside = [p for t in tenants if f"{t['path']}/".startswith(f"{path}/") for p in t["processes"]]
    charged = {p["pid"]: p["bytes"] for p in inside}
    uncharged: set[object] = {pid for pid, bytes_ in held.items() if bytes_ > charged.get(pid, 0)}
    if left > used - sum(charged.values()) + excess:
        uncharged.add("ended")
    rows = " ".join(f"{pid}:{held[pid] >> MIB}/{charged.get(pid, 0) >> MIB}" for pid in held)
    text = f"MiB held/charged: {rows}; left by ended ones {left >> MIB}, charged in all {used >> MIB}"
    return Compared(used, frozenset(held), {p["pid"]: p["how"] for p in inside}, frozenset(uncharged), text)
