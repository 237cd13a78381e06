"""Measure each tenant's use of each device: the device's time, memory times seconds, idle and waiting time.

This module runs in the agent's main loop, once a second, and measures tenants that have processes with memory,
according to the ledger. The gatekeeper measures the device's time of a gated tenant (source `turns`). For other tenants
NVML samples the time of their processes (source `nvml`). If NVML does not report this time, time and idleness are not
measured (source `none`). Every half minute the amounts are written to the store on disk.

The last turns of a tenant are added by the first measurement after the exit of the tenant's last process. The
gatekeeper publishes turns every half second. If the tenant's cgroup is removed before its last turns are published, up
to half a second of turns is lost. The use of memory since the last measurement, at most a second, is always lost.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Set

from fgpu_ebpf.agent.nvml_reconcile import STALE_SECONDS, Truth
from fgpu_ebpf.check import Check
from fgpu_ebpf.ledger.compute_maps import Key, TurnCounts
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.tenant import Tenant
from fgpu_ebpf.tenancy.usage_store import Owner, Place, Used, Writer, period

LOOK_SECONDS, WRITE_SECONDS = 1.0, 30.0
MOST_SECONDS = 5.0  # the longest time that one measurement covers; after a longer pause the earlier use is unknown
IDLE_RATIO = 0.01  # a part of the time; a tenant that runs less is idle
NS = 1_000_000_000
NEW = TurnCounts()
_FIX = "free space on this file system, or make the file writable"
_USER = re.compile(r"(?:^|/)user-([0-9]{1,10})\.slice(?:/|$)")
Totals = Mapping[str, Used]  # by source


class UsageMeter:
    """The use of devices by all tenants since the agent's start, by level and device.

    Args:
        truth: returns the last result of NVML.
        uuid: returns a device's UUID by its index.
        failed_checks: the agent's failed checks by name, which this class changes.
    """

    def __init__(
        self, truth: Callable[[], Truth], ledger: Ledger, enforcer: Enforcer, uuid: Callable[[int], str],
        writer: Writer, failed_checks: MutableMapping[str, Check],
    ) -> None:  # fmt: skip
        self._failed_checks = failed_checks
        self._truth, self._ledger, self._enforcer, self._uuid, self._writer = truth, ledger, enforcer, uuid, writer
        self._turns = ledger.times.turns()  # the store may have the time owned before the agent's start
        self._measured: dict[int, Tenant] = {}  # by level, at the last measurement
        self._left: dict[Place, Used] = {}
        self._looked_at = self._written_at = self._sampled_at = time.monotonic()
        self._sampled_seconds = 0.0  # the time that NVML's last sample covers; 0 if the sample was counted already
        self.totals: dict[Key, dict[str, Used]] = {}

    def look(self) -> None:
        """Measure the time since the last measurement, at most once a second."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._failed_checks.pop("usage", None)
        if fault := self._writer.fault:
            self._failed_checks["usage"] = Check("usage", False, fault, _FIX)
        seconds, self._looked_at = min(MOST_SECONDS, now - self._looked_at), now
        truth, ended, turns = self._truth(), self._ledger.times.take_ended(), self._ledger.times.turns()
        self._sampled_seconds = max(0.0, min(MOST_SECONDS, truth.sampled - self._sampled_at))  # each sample counts once
        self._sampled_at = max(self._sampled_at, truth.sampled)
        by_level: defaultdict[int, dict[int, Process]] = defaultdict(dict)
        is_fresh = now - truth.sampled < STALE_SECONDS  # otherwise NVML does not answer, perhaps for hours
        for pid, process in (truth.processes if is_fresh else self._ledger.processes()).items():
            for level in process.levels:
                by_level[level][pid] = process
        measured = {level: tenant for level in by_level if (tenant := self._enforcer.get(level))}
        for level, tenant in measured.items():
            self._enter(tenant, by_level[level], truth.percent if is_fresh else {}, turns, seconds)
        for (level, device), counts in (turns | ended).items():
            last = self._enforcer.get(level) or self._measured.get(level)
            if last and level not in measured:
                self._enter_rest(last, device, counts, seconds)
        self._turns, self._measured = turns, measured
        self.totals = {key: of for key, of in self.totals.items() if self._enforcer.get(key[0])}
        if now - self._written_at >= WRITE_SECONDS:
            self._written_at = now
            self.write()

    def write(self) -> None:
        """Pass to the store the amounts since the previous call of this method."""
        if self._left:
            self._writer.give(self._left)
            self._left = {}

    def stop(self) -> None:
        """Pass the remaining amounts to the store, and stop the store's writer."""
        self.write()
        self._writer.stop()

    def _enter(
        self, tenant: Tenant, own: Mapping[int, Process], percent: Mapping[int, Mapping[int, int] | None],
        turns: Mapping[Key, TurnCounts], seconds: float,
    ) -> None:  # fmt: skip
        devices = sorted({device for p in own.values() for device, bytes_ in enumerate(p.bytes) if bytes_})
        usages = self._ledger.usage(tenant.cgroup, devices) or []
        for device, usage in zip(devices, usages, strict=False):
            key = tenant.cgroup, device
            source, ran, is_idle = self._ran(key, turns.get(key), percent.get(device), own.keys(), seconds)
            waited = self._waited(key, turns.get(key, NEW))
            self._add(tenant, device, source, Used(ran, usage.used * seconds, seconds, seconds * is_idle, waited))

    def _enter_rest(self, tenant: Tenant, device: int, counts: TurnCounts, seconds: float) -> None:
        """Add a tenant's turns and waiting from the last measurement to the exit of the last process."""
        key = tenant.cgroup, device
        source, ran, _ = self._ran(key, counts, None, frozenset(), seconds)
        rest = Used(run=ran, waited=self._waited(key, counts))
        if source == "turns" and any(rest):
            self._add(tenant, device, source, rest)

    def _waited(self, key: Key, counts: TurnCounts) -> float:
        return max(0, counts.wait_ns - self._turns.get(key, NEW).wait_ns) / NS

    def _add(self, tenant: Tenant, device: int, source: str, used: Used) -> None:
        of = self.totals.setdefault((tenant.cgroup, device), {})
        of[source] = of.get(source, Used()).plus(used)
        owner = owner_of(tenant, tuple(map(owner_of, self._enforcer.around(tenant))))
        place = Place(period(time.time()), owner, self._uuid(device), source)
        self._left[place] = self._left.get(place, Used()).plus(used)

    def _ran(
        self, key: Key, counts: TurnCounts | None, percent: Mapping[int, int] | None, own: Set[int], seconds: float
    ) -> tuple[str, float, bool]:
        """Return the source, the seconds of the device's time that a tenant ran, and whether the tenant was idle.

        The source of the seconds is `turns`, `nvml` or `none`.
        """
        if counts and not counts.free:
            ran = min(seconds, max(0, counts.owned_ns - self._turns.get(key, NEW).owned_ns) / NS)
            return "turns", ran, ran < IDLE_RATIO * seconds
        if percent is None:
            return "none", 0.0, False
        ratio = min(100, sum(part for pid, part in percent.items() if pid in own)) / 100
        return "nvml", self._sampled_seconds * ratio, ratio < IDLE_RATIO


def owner_of(tenant: Tenant, around: tuple[Owner, ...] = ()) -> Owner:
    """Return the tenant as an owner in the store."""
    user = _USER.search(tenant.path)
    labels = tuple(sorted(tenant.metric_labels.items()))
    return Owner(tenant.name, tenant.workload.namespace or "", user[1] if user else "", labels, around)
