"""Compare the driver's bytes of a tenant with the agent's figures: which bytes are uncharged, which processes unnamed.

Imports nothing of fgpu. All bytes are of device 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 20  # bits


@dataclass(frozen=True)
class Compared:
    """A comparison at one moment. `used_bytes`: of the tenant's ledger, with all cgroups inside; `holding`: its living
    processes with driver memory; `how`: in which way each process that the agent names bypasses the shim.

    `uncharged`: processes that hold more of the driver than is charged to them, and "ended", if exited or exporting
    processes left more behind than is charged beside the living ones.
    """

    used_bytes: int
    holding: frozenset[int]
    how: Mapping[int, str]
    uncharged: frozenset[object]
    text: str

    def unnamed(self, bypassing: Collection[int]) -> set[object]:
        """Return processes with driver memory that the agent does not name, or fails to name as bypassing."""
        return {*self.holding - self.how.keys(), *(pid for pid in bypassing if not self.how.get(pid))}


def compare(
    books: Mapping[str, Any], tenants: Sequence[Mapping[str, Any]], path: str, others: Collection[int]
) -> Compared:
    """Compare. `path`: the tenant's cgroup. All memory outside of the processes `others` counts as the tenant's."""
    theirs = [entry for entry in books["processes"] if entry["pid"] not in others]
    held = {entry["pid"]: entry["bytes"] for entry in theirs if not entry["ended"]}
    left = sum(e["bytes"] for e in theirs if e["ended"]) + sum(d["exported_bytes"] for d in books["devices"])
    used = sum(t["devices"][0]["used_bytes"] for t in tenants if t["path"] == path)
    inside = [p for t in tenants if f"{t['path']}/".startswith(f"{path}/") for p in t["processes"]]
    charged = {p["pid"]: p["bytes"] for p in inside}
    uncharged: set[object] = {pid for pid, bytes_ in held.items() if bytes_ > charged.get(pid, 0)}
    if left > used - sum(charged.values()):
        uncharged.add("ended")
    rows = " ".join(f"{pid}:{held[pid] >> MIB}/{charged.get(pid, 0) >> MIB}" for pid in held)
    text = f"MiB held/charged: {rows}; left by ended ones {left >> MIB}, charged in all {used >> MIB}"
    return Compared(used, frozenset(held), {p["pid"]: p["how"] for p in inside}, frozenset(uncharged), text)
