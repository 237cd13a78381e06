"""The manager of the desired state, which applies policies and overrides to every cgroup.

The module runs in the agent's main loop, and has the policies, the overrides and the cgroups of `fgpu run`. The
enforcer writes the limits to the kernel. A limit that a user sets and that cannot be put in force raises TargetError or
RoomError. A limit of a policy that cannot be put in force is reported in the tenant's notes and in the event log.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.owner_bounds import Bounds
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.policy.requests import ADAPTERS
from fgpu_ebpf.policy.rules import NO_CLASSES, Decision, Device, PolicySet
from fgpu_ebpf.policy.share_name import Share, parse
from fgpu_ebpf.tenancy import pod_shares
from fgpu_ebpf.tenancy.enforcer import Enforcer, RoomError
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.gone_tenants import GoneTenants
from fgpu_ebpf.tenancy.level_capacity import LevelCapacity, LevelRefusals
from fgpu_ebpf.tenancy.overrides import Override, Overrides
from fgpu_ebpf.tenancy.preexisting import PreexistingProcesses
from fgpu_ebpf.tenancy.tenant import Source, Tenant, requests, tenant_of, with_labels
from fgpu_ebpf.tenancy.tenant_names import FILE as NAMES
from fgpu_ebpf.tenancy.tenant_tree import above
from fgpu_ebpf.workloads.cgroups import Namer, TargetError, Workloads, is_of_run
from fgpu_ebpf.workloads.workload import Workload

log = logging.getLogger("fgpu.agent")
ENTER_SECONDS = 10.0
MOST_RETRIED = 64  # refused cgroups in one batch


class Manager:
    """The policies, overrides and tenants of the host."""

    def __init__(
        self,
        workloads: Workloads,
        enforcer: Enforcer,
        overrides: Overrides,
        devices: Sequence[Device],
        history: EventLog,
        gone: GoneTenants,
    ) -> None:
        self.workloads = workloads
        self.enforcer = enforcer
        self.policies = PolicySet(())
        self.classes = NO_CLASSES  # the priorities of agent.yaml
        self.adapters: Collection[str] = ADAPTERS  # the adapters of agent.yaml
        self.metric_labels: Collection[str] = ()  # the labels of agent.yaml that every tenant's metrics carry
        self.policies_unknown = ""  # why the policies could not be read, or empty
        self.overrides = overrides
        self._devices = devices
        self._history = history
        self.refusals = LevelRefusals(history, enforcer.places)
        self._has_freed_places = False
        self.gone = gone
        enforcer.commitments.held_elsewhere = gone.held_bytes
        self._awaited: dict[str, float] = {}  # deadlines for the first process in cgroups of `fgpu run`

    @classmethod
    def of_host(
        cls, run_dir: Path, ledger: Ledger, namer: Namer, history: EventLog, devices: Sequence[Device],
        preexisting: PreexistingProcesses, bounds: Bounds, overcommit: bool,
    ) -> Manager:  # fmt: skip
        """Return the manager of this host's cgroups, with the enforcer and the files in the run folder."""
        root = procfs.cgroup2_root()
        assert root  # checked by host_checks()
        workloads = Workloads(root, namer)
        overrides = Overrides(run_dir / "overrides.json")
        capacity = LevelCapacity(root, bounds, ledger.owners, ledger.levels_taken)
        enforcer = Enforcer(ledger, workloads, devices, overcommit, preexisting, capacity)
        enforcer.answered.forget_earlier()
        enforcer.names.keep_in(run_dir / NAMES, workloads.cgroup)
        return cls(workloads, enforcer, overrides, devices, history, GoneTenants(ledger, enforcer.names))

    # -- deciding

    def decide(self, workload: Workload, override: Override | None = None) -> Decision:
        """Return the decision of the policies about a workload, with the share that its container requests."""
        decision = self.policies.resolve(workload, self._devices, self.classes, self.adapters)
        decision = pod_shares.with_shares(decision, self.overrides, self.workloads, self._devices)
        override = override or self._override(workload.cgroup)
        if override is None or not override.share or decision.policy is None:
            return decision
        asked = requests(parse(override.share), decision.policy)
        labelled = replace(workload, labels={**workload.labels, **asked})
        return self.policies.resolve(labelled, self._devices, self.classes, self.adapters)

    def _tenant(self, path: str) -> Tenant | None:
        """Return the tenant that a cgroup should be, or None if the cgroup is gone or should not be managed.

        A tenant of source KEPT keeps its pinned limits as long as _doubt() returns a reason. A pod that
        an earlier agent left without a limit gets no limit while the claims of the pod are unknown.
        """
        workload = self.workloads.identify(path)
        if workload is None:
            return None
        tenant = self._tenant_of(workload, self._override(workload.cgroup))
        before = self.enforcer.get(workload.cgroup)
        if before is None and tenant and not tenant.by_hand:
            return None if self.enforcer.answered.kept_free(workload, self.workloads) else tenant
        if before is None or before.source is not Source.KEPT:
            return tenant
        doubt = self._doubt(workload)
        if not doubt or (tenant and tenant.is_in_force_as(before)):
            return tenant
        return with_labels(replace(before, workload=workload, notes=(doubt,)), self.metric_labels)

    def _tenant_of(self, workload: Workload, override: Override | None) -> Tenant | None:
        """Return the tenant by policies and an override, or None if the workload is not managed."""
        tenant = tenant_of(self.decide(workload, override), override, self._devices, self.enforcer.context_bytes)
        return tenant and with_labels(tenant, self.metric_labels)

    def _override(self, cgroup: int) -> Override | None:
        override = self.overrides.get(cgroup)
        return None if override is None or override.kept else override

    def _doubt(self, workload: Workload) -> str:
        """Return why the agent cannot establish whether the limits pinned for a cgroup are still wanted.

        The result is empty if the agent can establish whether the limits are wanted.
        """
        override = self.overrides.get(workload.cgroup)
        said = override.kept if override else ""
        unknown = self.overrides.unknown(workload.cgroup)
        return said or unknown or self.policies_unknown or self.workloads.missing(workload)

    def consider(self, paths: Iterable[str]) -> dict[str, int]:
        """Decide about these cgroups again, and put the result in force. A cgroup may be new, changed or gone.

        Returns:
            The cgroups, by path, that should have a limit and for which the kernel has no free slot.
        """
        wanted = {path: self._tenant(path) for path in sorted(paths)}
        gone = []
        for path, tenant in wanted.items():
            before = self.enforcer.at(path)
            if before and (tenant is None or tenant.cgroup != before.cgroup):
                gone.append(before)
        groups = {group for before in gone for group in self._groups(before.path)}  # these have fewer shares inside now
        wanted |= {path: self._tenant(path) for path in groups - wanted.keys()}
        self._let_go(gone)
        self._enforce([tenant for tenant in wanted.values() if tenant])
        found = {path: tenant.cgroup for path, tenant in wanted.items() if tenant}
        lacking = {path: cgroup for path, cgroup in found.items() if self.enforcer.get(cgroup) is None}
        for path in wanted.keys() & {*self.enforcer.answered.refused} - lacking.keys():
            self.enforcer.answered.admit(path, self.workloads.cgroup(path) is None)
        self.enforcer.answered.refuse_unmanaged(lacking, self.workloads, self.enforcer.places.owner)
        return lacking

    def _groups(self, path: str) -> list[str]:
        """Return the paths of the tenants around a cgroup."""
        return [around for around in above(path) if self.enforcer.at(around)]

    def consider_all(self) -> None:
        """Decide again which limits every cgroup of the host and every tenant gets, and put the result in force."""
        self.consider({*self.workloads.walk(), *(tenant.path for tenant in self.enforcer)})

    def reload(self, policies: PolicySet) -> None:
        """Replace the set of policies, and decide about every cgroup again."""
        self.policies = policies
        self.consider_all()

    def _enforce(self, tenants: Sequence[Tenant]) -> None:
        """Put limits in force from the outermost cgroups inwards, because only a group's limit counts inside the group.

        At each depth, limits set by hand precede policies' limits, and older cgroups precede newer cgroups.
        """
        # The tenants are named before put(), because a name depends on all tenants, and put() gets only a part.
        tenants = self.enforcer.names.named(tenants)
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
        """Put limits in force. A list with a limit that does not fit is halved, until all other limits are in force."""
        fit, shortages = self.enforcer.places.divide(tenants)
        self.refusals.report({t.path: shortages[t.cgroup] for t in tenants if t.cgroup in shortages})
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
        """Return a text for each bound that prevents a limit or entries of this cgroup or of an enclosing cgroup."""
        wanted = [tenant for around in procfs.and_above(path) if (tenant := self._tenant(around))]
        _, shortages = self.enforcer.places.divide(tenant for tenant in wanted if not self.enforcer.get(tenant.cgroup))
        return [*shortages.values(), *self.enforcer.places.crowds([path])]

    def retry_refused(self) -> None:
        """Retry the limits of refused cgroups, in batches, after levels were released.

        A full scan of the host retries all refused cgroups.
        """
        if self._has_freed_places:
            self._has_freed_places = False
            self.consider(self.enforcer.answered.refused[:MOST_RETRIED])

    # -- by hand

    def set(self, path: str, asked: Mapping[str, Any], name: str = "", own: bool = False) -> Tenant:
        """Set limits of a cgroup by hand. If TargetError or RoomError is raised, nothing has changed.

        Args:
            path: the cgroup.
            asked: fields of Override. Fields that are left out keep their values.
            name: the name of the tenant, or an empty text for the name of its workload.
            own: whether the cgroup was made for `fgpu run`.

        Raises:
            TargetError: the cgroup does not exist, or part of its kept limits would be lost.
            RoomError: the limit does not fit.
            OSError: the override cannot be written to its file, or a map of the kernel is full. If a map is full, the
                limit may be in force.
        """
        workload = self.workloads.identify(path)
        if workload is None:
            raise TargetError(f"no cgroup {path}")
        before = self.enforcer.get(workload.cgroup)
        has_memory = any(asked.get(field) is not None for field in ("memory_bytes", "memory_millionths"))
        if before and before.source is Source.KEPT and not has_memory:
            text = "keeps limits from before the start: give --memory too, or run fgpu unset first"
            raise TargetError(f"{before.name} {text}")
        override = self._override(workload.cgroup) or Override(workload.cgroup, workload.path, None, name, own)
        override = replace(override, path=workload.path, **asked)
        tenant = self._tenant_of(workload, override)
        assert tenant
        self.enforcer.put([tenant])
        try:
            self.overrides.put(override)
        except OSError:
            self._follow_what_is_left(path)
            raise
        return self.enforcer.get(tenant.cgroup) or tenant

    def share(self, path: str, share: Share) -> Tenant:
        """Set the share that a container requests, before the container runs.

        A container may request the same share of several devices, with one call for each.

        Raises:
            TargetError: the container has another share, or its policy does not permit this device.
            RoomError: the share does not fit.
        """
        cgroup = self.workloads.cgroup(path)
        before = self.overrides.get(cgroup) if cgroup is not None else None
        had = before.share_devices if before and before.share else ()
        if before and before.share and (before.share, bool(had)) != (share.name, bool(share.device)):
            raise TargetError(f"the container has fgpu.dev/share={before.share} already: request a single share")
        if share.device and all(device.uuid_text != share.device for device in self._devices):
            raise TargetError(f"this host has no device {share.device}")
        devices = tuple(dict.fromkeys((*had, share.device))) if share.device else ()
        tenant = self.set(path, {"share": share.name, "devices": devices, "share_devices": devices})
        if devices and len(tenant.limits) < len(devices):
            self._forget(path, tenant.cgroup)
            raise TargetError(f"policy {tenant.policy} does not permit device {share.device} for this container")
        self.consider(self._groups(path))
        if text := pod_shares.shortage(tenant, self.enforcer):
            self._forget(path, tenant.cgroup)
            raise RoomError(text)
        return tenant

    def unset(self, path: str) -> bool:
        """Remove the override or the kept limit of a cgroup, so that the container's share or the policy applies again.

        Returns:
            False if nothing was set.
        """
        cgroup = self.workloads.cgroup(path)
        tenant = self.enforcer.get(cgroup) if cgroup is not None else None
        override = self.overrides.get(cgroup) if cgroup is not None else None
        is_kept = tenant is not None and tenant.source is Source.KEPT
        if cgroup is None or not (is_kept or override):
            return False
        if override and override.share and override.has_limits:
            share, own = override.share, override.share_devices
            self.overrides.put(Override(cgroup, override.path, None, share=share, devices=own, share_devices=own))
            self._follow_what_is_left(path)
        else:
            self._forget(path, cgroup, is_kept)
        return True

    def _forget(self, path: str, cgroup: int, is_kept: bool = False) -> None:
        """Remove everything that was set for a cgroup, and the cgroup's kept limits."""
        self.overrides.drop([cgroup])
        if is_kept:
            self.enforcer.release([cgroup])
        self._follow_what_is_left(path)

    def settle(self) -> None:
        """End the start of the agent. Tenants whose overrides could not be read keep their limits until `unset`."""
        kept = [
            Override(tenant.cgroup, tenant.path, None, own=is_of_run(tenant.path), kept=why)
            for tenant in self.enforcer
            if tenant.source is Source.KEPT and (why := self.overrides.unknown(tenant.cgroup))
        ]
        try:
            self.overrides.settle(kept)
        except OSError as error:
            log.error("limits kept from before the start cannot be written to the file of overrides: %s", error)

    def _follow_what_is_left(self, path: str) -> None:
        """Apply the remaining override or policy of a cgroup, or release the cgroup if nothing remains."""
        self.consider([path, *self._groups(path)])
        tenant = self.enforcer.at(path)
        if tenant and self._tenant(path) is None:
            self.enforcer.release([tenant.cgroup])

    def run(self, asked: Mapping[str, Any], name: str) -> Tenant:
        """Make a cgroup for `fgpu run`, and put the limit in force before a process enters. Raise as set() does."""
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
        """Remove the empty cgroup of an earlier `fgpu run` of the same name."""
        if self._awaited.get(path, 0.0) > time.monotonic():
            return  # a process will enter the cgroup within ENTER_SECONDS
        self._awaited.pop(path, None)
        if self.workloads.cgroup(path) is not None and not self.workloads.is_populated(path):
            self.workloads.remove(path)
            self.consider([path])

    # -- cgroups of `fgpu run`

    def remove_empty(self, paths: Iterable[str]) -> None:
        """Remove empty cgroups of `fgpu run`, except those that a process may still enter (ENTER_SECONDS)."""
        now, gone = time.monotonic(), []
        for path in paths:
            cgroup = self.workloads.cgroup(path)
            override = self.overrides.get(cgroup or 0)
            own = override.own if override else self.workloads.is_own(path)  # without override: older than a detach
            if cgroup is None or not own or now < self._awaited.get(path, 0.0):
                continue
            if not self.workloads.is_populated(path) and self.workloads.remove(path):
                self._awaited.pop(path, None)
                gone.append(path)
        if gone:
            self.consider(gone)

    def entered(self, path: str) -> None:
        """Record that a process has entered a cgroup of `fgpu run`."""
        self._awaited.pop(path, None)

    def remove_not_entered(self) -> None:
        """Remove cgroups of `fgpu run` that no process has entered within ENTER_SECONDS."""
        late = [path for path, until in self._awaited.items() if until < time.monotonic()]
        for path in late:
            del self._awaited[path]
        self.remove_empty(late)

    def remove_all_empty(self) -> None:
        """Remove every empty cgroup of `fgpu run`. The event of an empty cgroup may be lost or older than the agent."""
        self.remove_empty(self.workloads.own())


def _depth(tenant: Tenant) -> int:
    return tenant.path.count("/")
