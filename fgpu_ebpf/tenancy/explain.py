"""`fgpu explain`: the reasons for the limits of a cgroup, from the decision to the limits in force.

The module runs in the agent's main loop, and also explains cgroups that are not managed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

from fgpu_ebpf import abi
from fgpu_ebpf.driver.bypass_reason import Reason, Reasons
from fgpu_ebpf.ledger.compute_maps import TurnCounts
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.policy.rules import Priority
from fgpu_ebpf.policy.units import memory_text
from fgpu_ebpf.scheduling.fair_queue import MILLION
from fgpu_ebpf.snapshot import Shortfall
from fgpu_ebpf.tenancy import orphan_text
from fgpu_ebpf.tenancy.enforcement import Enforcement, denial, enforcement, excess
from fgpu_ebpf.tenancy.manager import Manager
from fgpu_ebpf.tenancy.tenant import Source, Tenant
from fgpu_ebpf.workloads.cgroups import TargetError
from fgpu_ebpf.workloads.workload import Workload


def explain(
    path: str,
    manager: Manager,
    ledger: Ledger,
    unenforced: str = "",
    unprobed: Mapping[int, str] = MappingProxyType({}),
    standalone: Set[int] = frozenset(),
    orphans: Sequence[Mapping[str, Any]] = (),
    reasons: Reasons | None = None,
    enforced: Mapping[int, str] = MappingProxyType({}),
    shortfalls: Mapping[tuple[int, int], Shortfall] = MappingProxyType({}),
    parking: str = "",
) -> dict[str, Any]:
    """Return the explanation of a cgroup as values for JSON. `lines` is the text that `fgpu explain` prints.

    Args:
        path: the cgroup.
        manager: the desired state of the host.
        ledger: the kernel's ledger.
        unenforced: why no limit is in force, or an empty text if limits are in force.
        unprobed: the reasons by process, for processes with a libcuda that cannot be probed.
        standalone: processes that found no agent and enforce their image's own limit.
        orphans: the orphans of the tenant, as in a Snapshot.
        reasons: the reasons why processes have no shim; None: no reason is known.
        enforced: the Snapshot's word of enforcement for each tenant, by cgroup.
        shortfalls: the shortfalls of tenants that get less time than is due, by cgroup and device.
        parking: a text on whether the tenant is or can be parked; empty if parking is off.

    Raises:
        TargetError: the cgroup is gone.
    """
    workload = manager.workloads.identify(path)
    if workload is None:
        raise TargetError(f"no cgroup {path}")
    decision = manager.decide(workload)
    tenant = manager.enforcer.at(path)
    levels = [t for c in manager.enforcer.levels(path) if (t := manager.enforcer.get(c))]
    known = ledger.processes() if levels and (unprobed or standalone) else {}
    unseen = _those(levels, known, unprobed.keys())
    crowded = _crowded(ledger)
    alone = [pid for pid in _those(levels, known, standalone) if not known[pid].flags & abi.Seen.SHIM]
    answer: dict[str, Any] = {
        "path": path,
        "tenant": levels[0].name if levels else None,
        "policy": decision.policy.name if decision.policy else None,
        "source": decision.policy.source if decision.policy else None,
        "tried": [{"policy": name, "reason": reason} for name, reason in decision.tried],
        "notes": [*decision.notes, *_notes(workload, tenant, levels, manager)],
        "levels": [_level(level, manager, ledger, shortfalls, crowded) for level in levels],
        "enforcement": _word(levels, unenforced, enforced),
        "unenforced": unenforced,
        "stronger": [
            *_stronger(levels, manager, ledger, reasons or Reasons()),
            *_seen({pid: unprobed[pid] for pid in unseen}),
            *_joined(alone),
        ],
        "orphans": [dict(orphan) for orphan in orphans],
        "parking": parking,
    }
    return answer | {"lines": _lines(answer, tenant)}


def _crowded(ledger: Ledger) -> Counter[tuple[int, int]]:
    """Return the refusals for too many entries, by level and device."""
    crowded = Counter[tuple[int, int]]()
    for c, n in ledger.counters().items():
        crowded[c.cgroup, c.device] += n if c.reason == abi.Reason.ENTRIES else 0
    return crowded


def level_at(path: str, manager: Manager, ledger: Ledger) -> dict[str, Any] | None:
    """Return the innermost level that contains a cgroup, in the form of explain(), or None if no limit holds."""
    cgroup = next(iter(manager.enforcer.levels(path)), None)
    tenant = None if cgroup is None else manager.enforcer.get(cgroup)
    return None if tenant is None else _level(tenant, manager, ledger, {}, {})


def _word(levels: Sequence[Tenant], unenforced: str, enforced: Mapping[int, str]) -> str:
    """Return the Snapshot's word of enforcement for the innermost level.

    If no Snapshot has the level yet, the word is the word of a level without bypassing processes.
    """
    if not levels:
        return Enforcement.NONE
    return enforced.get(levels[0].cgroup) or enforcement(unenforced, levels[0].observe, False, ())


def _notes(workload: Workload, tenant: Tenant | None, levels: Sequence[Tenant], manager: Manager) -> Iterator[str]:
    """Yield further reasons why the cgroup does not get the limits of its policy."""
    if missing := manager.workloads.missing(workload):
        yield missing
    if tenant and tenant not in levels:
        yield manager.enforcer.denied(tenant.cgroup)
    yield from manager.bounds_met(workload.path)
    yield from (note for level in levels if level.source is Source.KEPT for note in level.notes)
    for level in levels:
        yield from manager.enforcer.commitments.partly(level)
        if manager.enforcer.spares(level):
            yield f"onBypass: kill is not applied: {level.name} has processes started before fgpu"


def _level(
    tenant: Tenant,
    manager: Manager,
    ledger: Ledger,
    shortfalls: Mapping[tuple[int, int], Shortfall],
    crowded: Mapping[tuple[int, int], int],
) -> dict[str, Any]:
    devices = sorted(tenant.limits)
    usage, turns = ledger.usage(tenant.cgroup, devices) or [], ledger.times.turns()
    uncommitted = manager.enforcer.commitments.uncommitted(tenant)
    return {
        "tenant": tenant.name,
        "path": tenant.path,
        "by": tenant.policy if tenant.source is Source.POLICY else tenant.source,
        "denied": manager.enforcer.denied(tenant.cgroup),
        "opens_denied": ledger.opens.of(tenant.cgroup).denied,
        "devices": [
            {
                "gpu": device,
                "limit_bytes": u.limit,
                "outside_bytes": tenant.outside.get(device, 0),
                "used_bytes": u.used,
                "parked_bytes": u.parked,
                "refused": u.refused,
                "refused_entries": crowded.get((tenant.cgroup, device), 0),
                "counts": device not in uncommitted,
                "excess_bytes": 0 if tenant.observe else max(0, u.used + u.parked - u.limit),
            }
            for device, u in zip(devices, usage, strict=False)
        ],
        "compute": [
            _time(tenant, device, turns.get((tenant.cgroup, device)), shortfalls.get((tenant.cgroup, device)))
            for device in sorted(tenant.shares)
        ],
    }


def _time(tenant: Tenant, device: int, turn: TurnCounts | None, shortfall: Shortfall | None) -> dict[str, Any]:
    share, t = tenant.shares[device], turn or TurnCounts()
    return {
        "gpu": device,
        "limit_ratio": share.limit_millionths / MILLION,
        "weight": share.weight,
        "priority": list(Priority)[share.rank].value,
        "isolation": "own" if share.isolated else "shared",
        "priority_by": tenant.compute.priority_by if tenant.compute else "",
        "had_ratio": t.had_millionths / MILLION,
        "entitled_ratio": t.entitled_millionths / MILLION,
        "free": bool(t.free),
        "is_concurrent": t.free > 1,
        "is_owner": bool(t.owner),
        "is_waiting": bool(t.since_ns),
        "throttled": t.throttled,
        "shortfall": shortfall and shortfall.why,
    }


def _those(levels: list[Tenant], known: Mapping[int, Process], pids: Set[int]) -> list[int]:
    """Return the processes in `pids` that are charged for memory and belong to the innermost level."""
    return sorted(pid for pid in pids & known.keys() if levels[0].cgroup in known[pid].levels and any(known[pid].bytes))


def _seen(unseen: Mapping[int, str]) -> list[str]:
    if not unseen:
        return []
    pids = ", ".join(map(str, list(unseen)[:5]))
    why = "; ".join(list(dict.fromkeys(unseen.values()))[:5])
    what = "only requests of the shim are limited, and other memory is charged later from NVML"
    return [f"a libcuda of pid {pids} cannot be probed ({why}): {what}; use a driver that fgpu supports"]


def _joined(alone: Sequence[int]) -> list[str]:
    text = "found no agent and enforces the image's limit: mount /run/fgpu/shim into the container"
    return [f"pid {pid} {text}" for pid in alone[:5]]


def _stronger(levels: list[Tenant], manager: Manager, ledger: Ledger, known: Reasons) -> list[str]:
    """Return a text for each obstacle to stronger enforcement of the limits, with the fix."""
    if not levels:
        return ["no policy matches: write a policy, or use `fgpu set`"]
    found = [
        f"{level.name} has `mode: observe`, which refuses nothing: set `mode: enforce`"
        for level in levels
        if level.observe
    ]
    has_levels = {level.cgroup for level in levels}
    bypassing = {
        pid: p.generation
        for pid, p in ledger.processes().items()
        if p.levels[:1] == (levels[0].cgroup,) and (p.flags & abi.Seen.BYPASS or not p.flags & abi.Seen.SHIM)
    }
    preexisting = [pid for pid in bypassing if pid in manager.enforcer.preexisting]
    if preexisting:
        pids = ", ".join(map(str, sorted(preexisting)[:5]))
        found.append(
            f"started before fgpu: pid {pids}: these processes are charged, neither refused nor killed; restart them"
        )
    bypassing = {pid: generation for pid, generation in bypassing.items() if pid not in preexisting}
    if bypassing and has_levels:
        first = dict(sorted(bypassing.items())[:5])
        reasons = {pid: known.of(pid, generation) for pid, generation in first.items()}
        loaders = {pid: known.loader(pid, generation) for pid, generation in first.items()}
        pids = ", ".join(f"{pid} ({_named(reason, loaders[pid])})" for pid, reason in reasons.items())
        kill = "" if any(level.kill for level in levels) else "; `onBypass: kill` would kill processes like these"
        deny = "; `onBypass: deny` would refuse the device to new processes"
        kill += "" if any(level.deny for level in levels) else deny
        found.append(f"without the shim: pid {pids}: these processes are charged, not refused{kill}")
        found += [f"{reason}: {reason.words}" for reason in dict.fromkeys(filter(None, reasons.values()))]
    return found


def _named(reason: Reason | None, loader: str) -> str:
    if reason is None:
        return "the reason is not known yet"
    return f"{reason}: {loader}" if loader else reason


def _lines(answer: dict[str, Any], tenant: Tenant | None) -> list[str]:
    lines = [answer["path"]]
    if answer["policy"]:
        lines.append(f"  policy {answer['policy']} ({answer['source']}) matches")
    else:
        lines.append("  no policy matches")
    lines += [f"  policy {tried['policy']} does not match: {tried['reason']}" for tried in answer["tried"]]
    if tenant and tenant.by_hand:
        lines.append(f"  a setting by hand (fgpu {tenant.source}) has precedence over policies")
    lines += [f"  note: {note}" for note in answer["notes"]]
    for level in answer["levels"]:
        lines.append(f"  level {level['tenant']} ({level['by']})")
        lines += [f"    {_device_line(device)}" for device in level["devices"]]
        lines += [f"    {_time_line(time)}" for time in level["compute"]]
        if said := denial(level):
            lines.append(f"    {said}")
        if n := level["opens_denied"]:
            lines.append(f"    opens of device nodes refused to processes without the shim: {n}; see fgpu events")
    why = answer["unenforced"] or Enforcement(answer["enforcement"]).words
    lines.append(f"  enforcement: {answer['enforcement']}{f': {why}' if why else ''}")
    lines += [f"  parking: {answer['parking']}"] if answer["parking"] else []
    lines += [f"  orphaned: {orphan_text.sentence(orphan)}" for orphan in orphan_text.lasting(answer["orphans"])]
    lines += [f"  stronger: {text}" for text in answer["stronger"]]
    return lines


def _device_line(device: dict[str, Any]) -> str:
    limit, used = device["limit_bytes"], device["used_bytes"]
    if limit == abi.NO_LIMIT:
        return f"gpu {device['gpu']}: {memory_text(used)} used, no limit"
    parked = device["parked_bytes"]
    left = max(0, limit - used - parked)
    text = f"gpu {device['gpu']}: {memory_text(used)} of {memory_text(limit)} used, {memory_text(left)} left"
    text += f", {memory_text(parked)} parked" if parked else ""
    text += "" if device["counts"] else ", the limit counts against the device from the tenant's first use on"
    outside = device["outside_bytes"]
    for_contexts = f", {memory_text(outside)} of the limit for contexts, besides the limit that programs see"
    text += for_contexts if outside else ""
    times = "once" if device["refused"] == 1 else f"{device['refused']} times"
    text += f", refused {times}" if device["refused"] else ""
    crowded = device["refused_entries"]
    text += f" ({crowded} because of too many allocations, threads or processes)" if crowded else ""
    return f"{text}: {over}" if (over := excess(device)) else text


def _time_line(time: dict[str, Any]) -> str:
    ceiling = f"up to {time['limit_ratio']:.0%}, " if time["limit_ratio"] < 1 else ""
    text = f"gpu {time['gpu']}: time {ceiling}weight {time['weight']}, {time['priority']} priority"
    text += f" ({time['priority_by']})" if time["priority_by"] else ""
    text += ", without MPS" if time["isolation"] == "own" else ""
    if time.get("is_concurrent"):  # an agent of an earlier version does not report it
        return f"{text}: the tenant runs at the same time as other tenants of the device"
    if time["free"]:
        return f"{text}: no other tenant with a share of time uses the device, so the gate is open"
    text += f": had {time['had_ratio']:.1%}, entitled to {time['entitled_ratio']:.1%}"
    if time["shortfall"]:
        return f"{text}; short of time: {time['shortfall']}"
    if time["is_owner"]:
        return f"{text}, and the tenant has the turn"
    if time["is_waiting"]:
        return f"{text}, and the tenant waits for a turn" + (
            ", at times because of its compute limit" if time["throttled"] else ""
        )
    return text
