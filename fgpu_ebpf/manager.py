"""Who is to be managed now: every cgroup against the policies and what was set by hand, and the outcome enforced.

Owns: the policies in force, the overrides, the cgroups of `fgpu run`. Never: writes the ledger itself. On failure:
TargetError and RoomError for what somebody asks for; what a policy cannot be given is in the tenant's notes.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from fgpu_ebpf import procfs
from fgpu_ebpf.enforcer import Enforcer, RoomError
from fgpu_ebpf.gone_tenants import GoneTenants
from fgpu_ebpf.history import History
from fgpu_ebpf.identity import Workload
from fgpu_ebpf.level_refusals import LevelRefusals
from fgpu_ebpf.overrides import Override, Overrides
from fgpu_ebpf.policy import Decision, Device, PolicySet
from fgpu_ebpf.shares import Share, parse
from fgpu_ebpf.tenants import Source, Tenant, requests, tenant_of
from fgpu_ebpf.workloads import TargetError, Workloads, is_of_run

log = logging.getLogger("fgpu.agent")
ENTER_SECONDS = 10.0
MOST_RETRIED = 64  # refused cgroups at a time


class Manager:
    """The desired state of the host."""

    def __init__(
        self,
        workloads: Workloads,
        enforcer: Enforcer,
        overrides: Overrides,
        devices: Sequence[Device],
        history: History,
        gone: GoneTenants,
    ) -> None:
        self.workloads = workloads
        self.enforcer = enforcer
        self.policies = PolicySet(())
        self.policies_unknown = ""  # why it is not known what policies want; empty: it is
        self.overrides = overrides
        self._devices = devices
        self._history = history
        self.refusals = LevelRefusals(history, enforcer.places)
        self._has_freed_places = False
        self.gone = gone
        enforcer.commitments.held_elsewhere = gone.held_bytes
        self._awaited: dict[str, float] = {}  # own cgroups that nobody has entered yet: until when

    # -- deciding

    def decide(self, workload: Workload, override: Override | None = None) -> Decision:
        """What the policies say of a workload, and of the share that it has asked for."""
        decision = self.policies.resolve(workload, self._devices)
        override = override or self._override(workload.cgroup)
        if override is None or not override.share or decision.policy is None:
            return decision
        asked = requests(parse(override.share), decision.policy)
        return self.policies.resolve(replace(workload, labels={**workload.labels, **asked}), self._devices)

    def _tenant(self, path: str) -> Tenant | None:
        """What a cgroup is to be; one of source KEPT stays as it is pinned."""
        workload = self.workloads.identify(path)
        if workload is None:
            return None
        tenant = tenant_of(self.decide(workload), self._override(workload.cgroup), self._devices)
        before = self.enforcer.get(workload.cgroup)
        if before is None or before.source is not Source.KEPT:
            return tenant
        doubt = self._doubt(workload)
        if not doubt or (tenant and tenant.is_in_force_as(before)):
            return tenant
        return replace(before, workload=workload, notes=(doubt,))

    def _override(self, cgroup: int) -> Override | None:
        override = self.overrides.get(cgroup)
        return None if override is None or override.kept else override

    def _doubt(self, workload: Workload) -> str:
        """Why it is not known whether something wants the limits that are pinned for a cgroup; empty: it is known."""
        override = self.overrides.get(workload.cgroup)
        said = override.kept if override else ""
        unknown = self.overrides.unknown(workload.cgroup)
        return said or unknown or self.policies_unknown or self.workloads.missing(workload)

    def consider(self, paths: Iterable[str]) -> dict[str, int]:
        """Looks at these cgroups anew: managed, changed, or gone. Returns those that are to have a limit and have no
        place for it, by path.
        """
        wanted = {path: self._tenant(path) for path in sorted(paths)}
        gone = []
        for path, tenant in wanted.items():
            before = self.enforcer.at(path)
            if before and (tenant is None or tenant.cgroup != before.cgroup):
                gone.append(before)
        self._let_go(gone)
        self._enforce([tenant for tenant in wanted.values() if tenant])
        found = {path: tenant.cgroup for path, tenant in wanted.items() if tenant}
        lacking = {path: cgroup for path, cgroup in found.items() if self.enforcer.get(cgroup) is None}
        for path in wanted.keys() & {*self.enforcer.answered.refused} - lacking.keys():
            self.enforcer.answered.admit(path, self.workloads.cgroup(path) is None)
        return lacking

    def consider_all(self) -> None:
        """Looks at every cgroup that there is, and at every tenant whether it still is."""
        self.consider({*self.workloads.walk(), *(tenant.path for tenant in self.enforcer)})

    def reload(self, policies: PolicySet) -> None:
        """Another set of policies is in force from now on, as a whole."""
        self.policies = policies
        self.consider_all()

    def _enforce(self, tenants: Sequence[Tenant]) -> None:
        """Groups before those inside them, and of one depth the oldest first: inside a group only the group counts."""
        tenants = self.enforcer.names.named(tenants)  # before they are put in force one by one
        for tenant in tenants:
            if tenant.source is Source.KEPT:
                self.enforcer.keep(tenant)
        known = sorted((t for t in tenants if t.source is not Source.KEPT), key=lambda t: (_depth(t), t.cgroup))
        for _, of_one_depth in groupby(known, _depth):
            level = list(of_one_depth)
            for tenant in level:
                if tenant.by_hand:
                    self._put([tenant])
            self._put([tenant for tenant in level if not tenant.by_hand])

    def _put(self, tenants: Sequence[Tenant]) -> None:
        """Those for which there is no room, on a device or in the kernel, must not keep the others out."""
        fit, lacks = self.enforcer.places.divide(tenants)
        self.refusals.tell({t.path: lacks[t.cgroup] for t in tenants if t.cgroup in lacks})
        try:
            self.enforcer.put(fit)
        except (RoomError, OSError) as error:
            half = len(fit) // 2
            if half:
                self._put(fit[:half])
                self._put(fit[half:])
            else:
                self._history.add("no room", tenant=fit[0].name, text=str(error))
                before = self.enforcer.get(fit[0].cgroup)
                if before and before.source is Source.KEPT:
                    self.enforcer.keep(replace(before, notes=(str(error),)))

    def _let_go(self, tenants: Sequence[Tenant]) -> None:
        if not tenants:
            return
        removed = [t for t in tenants if self.workloads.cgroup(t.path) != t.cgroup]
        self.enforcer.release([tenant.cgroup for tenant in tenants], self.gone.keep(removed))
        self.overrides.drop(tenant.cgroup for tenant in removed)
        self._has_freed_places = True

    def bounds_met(self, path: str) -> list[str]:
        """Which bounds keep this cgroup, or one around it, from a limit or from entries."""
        wanted = [tenant for around in procfs.and_above(path) if (tenant := self._tenant(around))]
        _, lacks = self.enforcer.places.divide(tenant for tenant in wanted if not self.enforcer.get(tenant.cgroup))
        return [*lacks.values(), *self.enforcer.places.crowds([path])]

    def retry_refused(self) -> None:
        """Levels are gone: some of the cgroups that found no place may find one. All are tried at a full look."""
        if self._has_freed_places:
            self._has_freed_places = False
            self.consider(self.enforcer.answered.refused[:MOST_RETRIED])

    def sweep(self) -> None:
        """What was answered to programs of cgroups that are gone is forgotten."""
        live = {self.workloads.cgroup(path) for path in ("", *self.workloads.walk())}
        self.enforcer.answered.keep_only({cgroup for cgroup in live if cgroup is not None})

    # -- by hand

    def set(self, path: str, asked: Mapping[str, Any], name: str = "", own: bool = False) -> Tenant:
        """Puts limits in force on a cgroup: fields of Override; what is left out stays as it was set before.

        TargetError: there is none, or a part of the limits that it keeps would be lost; RoomError: it does not fit;
        OSError: it could not be kept, or the kernel has no room. Then all is as it was.
        """
        workload = self.workloads.identify(path)
        if workload is None:
            raise TargetError(f"no cgroup {path}")
        before = self.enforcer.get(workload.cgroup)
        says_memory = any(asked.get(field) is not None for field in ("memory_bytes", "memory_millionths"))
        if before and before.source is Source.KEPT and not says_memory:
            raise TargetError(f"{before.name} keeps limits from before the start: say --memory too, or fgpu unset it")
        override = self._override(workload.cgroup) or Override(workload.cgroup, workload.path, None, name, own)
        override = replace(override, path=workload.path, **asked)
        tenant = tenant_of(self.decide(workload, override), override, self._devices)
        assert tenant
        self.enforcer.put([tenant])
        try:
            self.overrides.put(override)
        except OSError:
            self._follow_what_is_left(path)
            raise
        return self.enforcer.get(tenant.cgroup) or tenant

    def share(self, path: str, share: Share) -> Tenant:
        """A container asks for a share before it runs; of several devices for the same share of each, one by one.

        TargetError: it has another, or there is no such device for it; RoomError: it does not fit.
        """
        cgroup = self.workloads.cgroup(path)
        before = self.overrides.get(cgroup) if cgroup is not None else None
        had = before.devices if before and before.share else ()
        if before and before.share and (before.share, bool(had)) != (share.name, bool(share.device)):
            raise TargetError(f"it has fgpu.dev/share={before.share} already: ask for one")
        if share.device and all(device.uuid_text != share.device for device in self._devices):
            raise TargetError(f"this host has no {share.device}")
        devices = tuple(dict.fromkeys((*had, share.device))) if share.device else ()
        tenant = self.set(path, {"share": share.name, "devices": devices})
        if devices and len(tenant.limits) < len(devices):
            self._forget(path, tenant.cgroup)
            raise TargetError(f"policy {tenant.policy} does not give it {share.device}")
        return tenant

    def unset(self, path: str) -> bool:
        """Takes away what was set by hand, or is only kept; the container's share or a policy holds again, if there is
        one. False: nothing was set.
        """
        cgroup = self.workloads.cgroup(path)
        tenant = self.enforcer.get(cgroup) if cgroup is not None else None
        override = self.overrides.get(cgroup) if cgroup is not None else None
        is_kept = tenant is not None and tenant.source is Source.KEPT
        if cgroup is None or not (is_kept or override):
            return False
        if override and override.share and override.says_limits:
            said = Override(cgroup, override.path, None, share=override.share, devices=override.devices)
            self.overrides.put(said)
            self._follow_what_is_left(path)
        else:
            self._forget(path, cgroup, is_kept)
        return True

    def _forget(self, path: str, cgroup: int, is_kept: bool = False) -> None:
        """Nothing is said of the cgroup any more."""
        self.overrides.drop([cgroup])
        if is_kept:
            self.enforcer.release([cgroup])
        self._follow_what_is_left(path)

    def settle(self) -> None:
        """The start has decided about every cgroup: what it could not learn of overrides stays so until `unset`."""
        kept = [
            Override(tenant.cgroup, tenant.path, None, own=is_of_run(tenant.path), kept=why)
            for tenant in self.enforcer
            if tenant.source is Source.KEPT and (why := self.overrides.unknown(tenant.cgroup))
        ]
        try:
            self.overrides.settle(kept)
        except OSError as error:
            log.error("what is kept of earlier limits is not written down: %s", error)

    def _follow_what_is_left(self, path: str) -> None:
        """What was set by hand before, or else a policy, holds; where nothing does, it is managed no longer."""
        self.consider([path])
        tenant = self.enforcer.at(path)
        if tenant and self._tenant(path) is None:
            self.enforcer.release([tenant.cgroup])

    def run(self, asked: Mapping[str, Any], name: str) -> Tenant:
        """A new cgroup with its limit in force before anybody is in it."""
        if name:
            self._clear_place(self.workloads.place(name))
        path = self.workloads.make(name)
        self._awaited[path] = time.monotonic() + ENTER_SECONDS
        try:
            return self.set(path, asked, name=os.path.basename(path), own=True)
        except (RoomError, OSError):
            self._awaited.pop(path, None)
            self.workloads.remove(path)
            self.consider([path])
            raise

    def _clear_place(self, path: str) -> None:
        """A `fgpu run` of that name has ended, and nobody has removed its cgroup yet."""
        if self._awaited.get(path, 0.0) > time.monotonic():
            return  # somebody is about to enter
        self._awaited.pop(path, None)
        if self.workloads.cgroup(path) is not None and not self.workloads.is_populated(path):
            self.workloads.remove(path)
            self.consider([path])

    # -- own cgroups

    def tidy(self, paths: Iterable[str]) -> None:
        """Removes those of these cgroups that are ours, were entered and are empty now."""
        now, gone = time.monotonic(), []
        for path in paths:
            cgroup = self.workloads.cgroup(path)
            override = self.overrides.get(cgroup or 0)
            own = override.own if override else self.workloads.is_own(path)  # without one: of an agent before a detach
            if cgroup is None or not own or now < self._awaited.get(path, 0.0):
                continue
            if not self.workloads.is_populated(path) and self.workloads.remove(path):
                self._awaited.pop(path, None)
                gone.append(path)
        if gone:
            self.consider(gone)

    def entered(self, path: str) -> None:
        """Somebody came into an own cgroup."""
        self._awaited.pop(path, None)

    def tidy_late(self) -> None:
        """Removes own cgroups that nobody entered in time."""
        late = [path for path, until in self._awaited.items() if until < time.monotonic()]
        for path in late:
            del self._awaited[path]
        self.tidy(late)

    def tidy_all(self) -> None:
        """Removes every own cgroup that is empty: events may have been lost, or have come while no agent ran."""
        self.tidy(self.workloads.own())


def _depth(tenant: Tenant) -> int:
    return tenant.path.count("/")
