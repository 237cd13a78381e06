"""What is wrong with the host by its Snapshot, and what mends it.

Owns: the words, which `fgpu doctor` and the status page have in common. Never: asks or looks; what only a question
tells, as whether the gatekeeper answers, doctor asks itself. Cannot fail.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fgpu_ebpf import reconcile, shimless, xids
from fgpu_ebpf.checks import Check

FULL_PARTS = 0.75  # as the alert FgpuTableFilling
FULL = "what is full is refused to new programs: `fgpu events` names the workload, bounds: in agent.yaml its bounds"


def checks(snapshot: Mapping[str, Any]) -> Iterator[Check]:
    """Of a Snapshot's JSON: all that it can tell."""
    tenants, policies = snapshot["tenants"], snapshot["policies"]
    if policies and not policies["good"]:
        yield Check("policies", False, "; ".join(policies["faults"][:3]), "fgpu policy check")
    elif policies and policies["unsaved"]:
        yield Check("policies", False, policies["unsaved"], "make room there: a start with an error in a file needs it")
    elif policies:
        yield Check("policies", True, f"{policies['count']} in force, {len(tenants)} tenants")
    kept = [f"{t['tenant']}: {'; '.join(t['notes'])}" for t in tenants if t["source"] == "kept"]
    yield Check(
        "start", not kept, ", ".join(kept[:5]) or "every limit from before it was understood",
        "fix what is named; or say what is wanted: fgpu set TARGET, or fgpu unset TARGET, after which policies hold",
    )  # fmt: skip
    yield from _engines(snapshot["engines"])
    gone = snapshot["unenforced"]
    yield Check("probes", not gone, gone or "all where they were put", "restart the agent, and see who does that")
    ages = {d["index"]: d["reconcile_age_seconds"] for d in snapshot["devices"]}
    yield reconcile.check(ages, snapshot["reconcile_failure"])
    yield xids.check(snapshot["devices"])
    yield _shims(tenants)
    yield _libraries(snapshot["libraries"], snapshot["trusted"])
    denied = sorted(t["tenant"] for t in tenants if t["denied"])
    yield Check("room", not denied, ", ".join(denied[:5]) or "for every tenant", "fgpu explain TARGET has the numbers")
    full = [f"{m['name']}: {m['entries']} of {m['most']}" for m in snapshot.get("maps", ()) if _is_filling(m)]
    yield Check("tables", not full, ", ".join(full) or "have room", FULL)
    for name, (found, fix) in snapshot.get("lacks", {}).items():
        yield Check(name, False, found, fix)
    failures = snapshot["failures"]
    yield Check("mistakes", not failures, f"{failures} outlived", "report the traceback in the agent's log")


def _is_filling(table: Mapping[str, Any]) -> bool:
    return bool(table["entries"] > FULL_PARTS * table["most"])


def _shims(tenants: Sequence[Mapping[str, Any]]) -> Check:
    """Every process that uses a device asks before it allocates, or why it does not."""
    around = sorted((t for t in tenants if t["bypassing"]), key=lambda t: str(t["tenant"]))
    if not around:
        return Check("shim", True, "in every process that uses a device")
    named = [f"{t['tenant']} ({', '.join(t['shimless']) or ', '.join(t['bypassing'])})" for t in around[:5]]
    words = [f"{why}: {why.words}" for why in shimless.Reason if any(why in t["shimless"] for t in around)]
    mend = "; ".join([*words, "fgpu explain TARGET, or onBypass: kill"])
    return Check("shim", False, ", ".join(named), mend)


def _libraries(found: Sequence[Mapping[str, Any]], trusted: Sequence[str]) -> Check:
    """Every driver that tenants' processes map is the host's own or trusted, or which is not."""
    unknown = [one for one in found if one["role"] == "unknown" and one["tenant"]]
    if not unknown:
        listed = sum(one["role"] == "listed" for one in found)
        return Check(
            "libraries", True, f"the host's driver, and {listed} trusted files" if listed else "the host's driver"
        )
    named = [f"{one['path']!a} of process {one['pids'][0]} in {one['tenant']}" for one in unknown[:5]]
    digests = sorted({*trusted, *(one["digest"] for one in unknown if one["digest"])})
    line = f"drivers: {{trusted: {json.dumps(digests)}}}"
    mend = f"what they free stays charged until NVML shows it; if you trust them, write in agent.yaml: {line}"
    return Check("libraries", False, ", ".join(named), mend)


def _engines(found: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """Every container's labels are known, or whose fault it is that they are not."""
    there = {engine["name"] for engine in found if engine["is_there"]}
    faulty = [engine for engine in found if engine["fault"]]
    absent = [engine for engine in found if engine["waiting"] and engine["name"] not in there]
    if not found:
        return
    said = [f"{e['name']} at {e['path']}: {e['fault']}" for e in faulty]
    said += [f"{e['path']} is not there, {e['waiting']} containers wait for it" for e in absent if e not in faulty]
    mend = "until then policies by cgroup hold; start the engine, or name its socket under engines: in agent.yaml"
    asked = ", ".join(sorted(there)) or "no engine"
    yield Check("labels", not said, "; ".join(said[:3]) or f"{asked} answers", mend if said else "")
