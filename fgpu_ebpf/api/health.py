"""The problems of the host according to its Snapshot, and how to fix the problems.

This module runs in `fgpu doctor`, and in the agent's threads for the web page. `fgpu doctor` adds the checks that a
Snapshot does not cover, such as whether the gatekeeper replies. The functions have no side effects.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fgpu_ebpf.agent import nvml_reconcile
from fgpu_ebpf.check import Check
from fgpu_ebpf.driver import bypass_reason, xids
from fgpu_ebpf.policy import folder
from fgpu_ebpf.tenancy.enforcement import RELEASED

NONE = f": only `fgpu run`, `fgpu set` and shares limit anything. {folder.NEXT_STEP}"
# `fgpu policy check` prints all errors of the files. `fgpu reload` also reports that the folder was removed.
_RELOAD = "fgpu policy check && fgpu reload"
FULL_PARTS = 0.75  # the threshold of the alert FgpuTableFilling
FULL = (
    "a full table refuses new programs: find the workload that fills the table in `fgpu events` or "
    "`fgpu explain TARGET`, and lower the workload's bound under `bounds:` in agent.yaml"
)


def checks(snapshot: Mapping[str, Any]) -> Iterator[Check]:
    """Yield every check with a result that can be computed from a Snapshot's JSON."""
    tenants, policies = snapshot["tenants"], snapshot["policies"]
    if policies and not policies["good"]:
        yield Check("policies", False, "; ".join(policies["faults"][:3]), _RELOAD)
    elif policies and policies["unsaved"]:
        fix = "free space on this file system: the next start needs the stored policies if a policy file has an error"
        yield Check("policies", False, policies["unsaved"], fix)
    elif policies:
        more = "" if policies["count"] else NONE
        yield Check("policies", True, f"{policies['count']} in force, {len(tenants)} tenants{more}")
    kept = [f"{t['tenant']}: {'; '.join(t['notes'])}" for t in tenants if t["source"] == "kept"]
    yield Check(
        "start", not kept, ", ".join(kept[:5]) or "no unconfirmed limit is kept from before the start",
        "fix the named file; or run fgpu set TARGET, or fgpu unset TARGET to apply the policies",
    )  # fmt: skip
    yield from _engines(snapshot["engines"])
    missing = snapshot["unenforced"]
    yield Check("probes", not missing, missing or "attached", "restart the agent, and find out what removed the probes")
    ages = {d["index"]: d["reconcile_age_seconds"] for d in snapshot["devices"]}
    if RELEASED not in snapshot.get("lacks", {}):
        yield nvml_reconcile.check(ages, snapshot["reconcile_failure"])
    yield xids.check(snapshot["devices"])
    yield _shims(tenants)
    yield _libraries(snapshot["libraries"], snapshot["trusted"])
    denied = sorted(t["tenant"] for t in tenants if t["denied"])
    found = f"limits not in force: {', '.join(denied[:5])}" if denied else "the devices have room for all limits"
    yield Check("room", not denied, found, "`fgpu explain TARGET` shows the reason")
    full = [f"{m['name']}: {m['entries']} of {m['most']}" for m in snapshot.get("maps", ()) if _is_filling(m)]
    yield Check("tables", not full, ", ".join(full) or "every table has room", FULL)
    for name, (found, how_to_fix) in snapshot.get("lacks", {}).items():
        yield Check(name, False, found, how_to_fix)
    failures = snapshot["failures"]
    yield Check("internal errors", not failures, str(failures), "report the traceback in the agent's log")


def _is_filling(table: Mapping[str, Any]) -> bool:
    return bool(table["entries"] > FULL_PARTS * table["most"])


def _shims(tenants: Sequence[Mapping[str, Any]]) -> Check:
    """Check that every process that uses a device requests admission.

    The fix names the reasons for missing requests.
    """
    tenants_without = sorted((t for t in tenants if t["bypassing"]), key=lambda t: str(t["tenant"]))
    denied = sorted(str(t["tenant"]) for t in tenants if t.get("opens_would_deny"))
    more = f"; `onBypass: deny` would have refused the device in {', '.join(denied[:5])}" if denied else ""
    if not tenants_without:
        return Check("shim", True, f"in every process that uses a device{more}")
    named = [f"{t['tenant']} ({', '.join(t['shimless']) or ', '.join(t['bypassing'])})" for t in tenants_without[:5]]
    loaders = {p.get("loader", ""): None for t in tenants_without[:5] for p in t["processes"]}
    named += [f"loader {loader}" for loader in filter(None, loaders)][:5]
    reasons = [why for why in bypass_reason.Reason if any(why in t["shimless"] for t in tenants_without)]
    words = [f"{why}: {why.words}" for why in reasons]
    fix = "; ".join([*words, "run `fgpu explain TARGET`, or set `onBypass: kill` in the policy"])
    return Check("shim", False, f"{', '.join(named)}{more}", fix)


def _libraries(found: Sequence[Mapping[str, Any]], trusted: Sequence[str]) -> Check:
    """Check that every driver library that tenants' processes map is the host's own library or trusted."""
    unknown = [library for library in found if library["role"] == "unknown" and library["tenant"]]
    if not unknown:
        listed = sum(library["role"] == "listed" for library in found)
        return Check(
            "libraries", True, f"the host's driver, and {listed} trusted files" if listed else "the host's driver"
        )
    named = [f"{library['path']!a} of process {library['pids'][0]} in {library['tenant']}" for library in unknown[:5]]
    digests = sorted({*trusted, *(library["digest"] for library in unknown if library["digest"])})
    line = f"drivers: {{trusted: {json.dumps(digests)}}}"
    text = "memory that these libraries free stays charged until NVML shows the free"
    fix = f"{text}; to trust the libraries, write in agent.yaml: {line}"
    return Check("libraries", False, ", ".join(named), fix)


def _engines(found: Sequence[Mapping[str, Any]]) -> Iterator[Check]:
    """Check that the container engines have reported the labels of all containers."""
    there = {engine["name"] for engine in found if engine["is_there"]}
    failed = [engine for engine in found if engine["fault"]]
    absent = [engine for engine in found if engine["waiting"] and engine["name"] not in there]
    if not found:
        return
    texts = [f"{e['name']} at {e['path']}: {e['fault']}" for e in failed]
    texts += [
        f"{e['path']} is missing, {e['waiting']} containers have no labels yet" for e in absent if e not in failed
    ]
    fix = "start the engine, or set its socket under engines: in agent.yaml; until then policies by cgroup are in force"
    asked = f"received from {', '.join(sorted(there))}" if there else "no engine was found"
    yield Check("labels", not texts, "; ".join(texts[:3]) or asked, fix if texts else "")
