"""The driver's books of a tenant beside what the agent says of it: what is uncharged, what has no name.

Imports nothing of fgpu. All bytes are of device 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MIB = 20  # bits


@dataclass(frozen=True)
class Compared:
    """At one moment. `used_bytes`: of the tenant's ledger, with all cgroups inside; `holding`: its processes that live
    and have driver memory; `how`: in what way each of its processes that the agent names goes around the shim.

    `uncharged`: processes that have more of the driver than is charged to them, and "ended", where those that have
    ended or exported memory left more behind than is charged beside the living ones.
    """

    used_bytes: int
    holding: frozenset[int]
    how: Mapping[int, str]
    uncharged: frozenset[object]
    text: str

    def unnamed(self, bypassing: Collection[int]) -> set[object]:
        """Processes with driver memory that the agent does not name, or does not name as bypassing though they do."""
        return {*self.holding - self.how.keys(), *(pid for pid in bypassing if not self.how.get(pid))}


def compare(
    books: Mapping[str, Any], tenants: Sequence[Mapping[str, Any]], path: str, others: Collection[int]
) -> Compared:
    """`path`: the tenant's cgroup. All memory that is not of the processes `others` is taken to be the tenant's."""
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
