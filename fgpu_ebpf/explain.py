"""`fgpu explain`: why a cgroup gets what it gets, from the decision to what is in force.

Owns: the words. Never: decides. Cannot fail: a cgroup that nobody manages is explained too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

from fgpu_ebpf import orphan_text, pages, shimless
from fgpu_ebpf.enforcement import Enforcement, denial, enforcement
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.manager import Manager
from fgpu_ebpf.policy import Priority
from fgpu_ebpf.processes import Process
from fgpu_ebpf.quantities import memory_text
from fgpu_ebpf.scheduler import MILLION
from fgpu_ebpf.tenants import Source, Tenant
from fgpu_ebpf.timebook import TurnCounts
from fgpu_ebpf.workloads import TargetError


def explain(
    path: str,
    manager: Manager,
    ledger: Ledger,
    unenforced: str = "",
    unprobed: Mapping[int, str] = MappingProxyType({}),
    standalone: Set[int] = frozenset(),
    orphans: Sequence[Mapping[str, Any]] = (),
    is_shim: shimless.IsShim = lambda *_: True,
    enforced: Mapping[int, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """As plain values; `lines` are for people. TargetError: the cgroup is gone.

    `unenforced`: why none is in force; `unprobed`: processes with a libcuda that the kernel does not see, each with the
    reason; `standalone`: those that keep their image's own limit, because they find no agent; `orphans`: of the tenant,
    as in a Snapshot; `is_shim`: as shimless has it; `enforced`: the Snapshot's word for each tenant, by its cgroup.
    """
    workload = manager.workloads.identify(path)
    if workload is None:
        raise TargetError(f"no cgroup {path}")
    decision = manager.decide(workload)
    tenant = manager.enforcer.at(path)
    levels = [t for c in manager.enforcer.levels(path) if (t := manager.enforcer.get(c))]
    known = ledger.processes() if levels and (unprobed or standalone) else {}
    unseen = _those(levels, known, unprobed.keys())
    alone = [pid for pid in _those(levels, known, standalone) if not known[pid].flags & pages.Seen.SHIM]
    answer: dict[str, Any] = {
        "path": path,
        "tenant": levels[0].name if levels else None,
        "policy": decision.policy.name if decision.policy else None,
        "source": decision.policy.source if decision.policy else None,
        "tried": [{"policy": name, "reason": reason} for name, reason in decision.tried],
        "notes": [
            *decision.notes,
            *filter(None, [manager.workloads.missing(workload)]),
            *_left_out(tenant, levels, manager),
            *manager.bounds_met(path),
            *[note for t in levels if t.source is Source.KEPT for note in t.notes],
            *[
                f"onBypass: kill waits: older than fgpu are some in {t.name}"
                for t in levels
                if manager.enforcer.spares(t)
            ],
        ],
        "levels": [_level(level, manager, ledger) for level in levels],
        "enforcement": _word(levels, unenforced, enforced),
        "unenforced": unenforced,
        "stronger": [
            *_stronger(levels, manager, ledger, is_shim),
            *_seen({pid: unprobed[pid] for pid in unseen}),
            *_joined(alone),
        ],
        "orphans": [dict(orphan) for orphan in orphans],
    }
    return answer | {"lines": _lines(answer, tenant)}


def _word(levels: Sequence[Tenant], unenforced: str, enforced: Mapping[int, str]) -> str:
    """The Snapshot's word for the innermost level; of one that no process has used yet, what its first will meet."""
    if not levels:
        return Enforcement.NONE
    return enforced.get(levels[0].cgroup) or enforcement(unenforced, levels[0].observe, False, ())


def _left_out(tenant: Tenant | None, levels: list[Tenant], manager: Manager) -> list[str]:
    return [manager.enforcer.denied(tenant.cgroup)] if tenant and tenant not in levels else []


def _level(tenant: Tenant, manager: Manager, ledger: Ledger) -> dict[str, Any]:
    devices = sorted(tenant.limits)
    usage, turns = ledger.usage(tenant.cgroup, devices) or [], ledger.times.turns()
    uncommitted = manager.enforcer.commitments.uncommitted(tenant)
    return {
        "tenant": tenant.name,
        "path": tenant.path,
        "by": tenant.policy if tenant.source is Source.POLICY else tenant.source,
        "denied": manager.enforcer.denied(tenant.cgroup),
        "devices": [
            {
                "gpu": device,
                "limit_bytes": u.limit,
                "used_bytes": u.used,
                "refused": u.refused,
                "counts": device not in uncommitted,
            }
            for device, u in zip(devices, usage, strict=False)
        ],
        "compute": [_time(tenant, device, turns.get((tenant.cgroup, device))) for device in sorted(tenant.shares)],
    }


def _time(tenant: Tenant, device: int, turn: TurnCounts | None) -> dict[str, Any]:
    share, t = tenant.shares[device], turn or TurnCounts()
    return {
        "gpu": device,
        "limit_ratio": share.limit_millionths / MILLION,
        "weight": share.weight,
        "priority": list(Priority)[share.rank].value,
        "had_ratio": t.had_millionths / MILLION,
        "entitled_ratio": t.entitled_millionths / MILLION,
        "free": bool(t.free),
        "is_owner": bool(t.owner),
        "is_waiting": bool(t.since_ns),
        "throttled": t.throttled,
    }


def _those(levels: list[Tenant], known: Mapping[int, Process], pids: Set[int]) -> list[int]:
    """Of these processes those of the first level that hold memory."""
    return sorted(pid for pid in pids & known.keys() if levels[0].cgroup in known[pid].levels and any(known[pid].bytes))


def _seen(unseen: Mapping[int, str]) -> list[str]:
    if not unseen:
        return []
    pids = ", ".join(map(str, list(unseen)[:5]))
    why = "; ".join(list(dict.fromkeys(unseen.values()))[:5])
    what = "held as far as its shim asks, and charged by NVML afterwards"
    return [f"a libcuda of pid {pids} cannot be probed ({why}): {what}; use a driver that fgpu knows"]


def _joined(alone: Sequence[int]) -> list[str]:
    if not alone:
        return []
    pids = ", ".join(map(str, alone[:5]))
    return [f"pid {pids} found no agent and keeps the limit of its image: mount /run/fgpu/shim into its container"]


def _stronger(levels: list[Tenant], manager: Manager, ledger: Ledger, is_shim: shimless.IsShim) -> list[str]:
    """What would make it stronger."""
    if not levels:
        return ["no policy matches: write one, or `fgpu set`"]
    found = [f"{level.name} only observes: mode: enforce" for level in levels if level.observe]
    around = {level.cgroup for level in levels}
    bypassing = [
        pid
        for pid, p in ledger.processes().items()
        if p.levels[:1] == (levels[0].cgroup,) and (p.flags & pages.Seen.BYPASS or not p.flags & pages.Seen.SHIM)
    ]
    elders = [pid for pid in bypassing if pid in manager.enforcer.elders]
    if elders:
        pids = ", ".join(map(str, sorted(elders)[:5]))
        found.append(f"older than fgpu: pid {pids}: charged, never stopped; start them anew")
    bypassing = [pid for pid in bypassing if pid not in elders]
    if bypassing and around:
        reasons = {pid: shimless.reason(pid, is_shim) for pid in sorted(bypassing)[:5]}
        pids = ", ".join(f"{pid} ({reason})" if reason else str(pid) for pid, reason in reasons.items())
        found.append(f"without the shim: pid {pids}: charged, not stopped; mount the shim, or onBypass: kill")
        found += [f"{reason}: {reason.words}" for reason in dict.fromkeys(filter(None, reasons.values()))]
    return found


def _lines(answer: dict[str, Any], tenant: Tenant | None) -> list[str]:
    lines = [answer["path"]]
    if answer["policy"]:
        lines.append(f"  policy {answer['policy']} ({answer['source']}) matches")
    else:
        lines.append("  no policy matches")
    lines += [f"  not {tried['policy']}: {tried['reason']}" for tried in answer["tried"]]
    if tenant and tenant.by_hand:
        lines.append(f"  set by hand (fgpu {tenant.source}), which comes first")
    lines += [f"  note: {note}" for note in answer["notes"]]
    for level in answer["levels"]:
        lines.append(f"  level {level['tenant']} ({level['by']})")
        lines += [f"    {_device_line(device)}" for device in level["devices"]]
        lines += [f"    {_time_line(time)}" for time in level["compute"]]
        if said := denial(level):
            lines.append(f"    {said}")
    why = answer["unenforced"] or Enforcement(answer["enforcement"]).words
    lines.append(f"  enforcement: {answer['enforcement']}{f': {why}' if why else ''}")
    lines += [f"  orphaned: {orphan_text.sentence(orphan)}" for orphan in orphan_text.lasting(answer["orphans"])]
    lines += [f"  stronger: {text}" for text in answer["stronger"]]
    return lines


def _device_line(device: dict[str, Any]) -> str:
    limit, used = device["limit_bytes"], device["used_bytes"]
    if limit == pages.NO_LIMIT:
        return f"gpu {device['gpu']}: {memory_text(used)} used, no limit"
    left = max(0, limit - used)
    text = f"gpu {device['gpu']}: {memory_text(used)} of {memory_text(limit)} used, {memory_text(left)} left"
    text += "" if device["counts"] else ", counts on the device from its first use on"
    return text + (f", refused {device['refused']} times" if device["refused"] else "")


def _time_line(time: dict[str, Any]) -> str:
    ceiling = f"up to {time['limit_ratio']:.0%}, " if time["limit_ratio"] < 1 else ""
    text = f"gpu {time['gpu']}: time {ceiling}weight {time['weight']}, {time['priority']} priority"
    if time["free"]:
        return f"{text}: nobody to share with, its gate is open"
    text += f": had {time['had_ratio']:.1%} of {time['entitled_ratio']:.1%}"
    if time["is_owner"]:
        return f"{text}, and it is its turn"
    if time["is_waiting"]:
        return f"{text}, and it waits for its turn" + (
            ": its limit holds it back at times" if time["throttled"] else ""
        )
    return text
