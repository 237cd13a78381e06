"""Kill bypassing processes of tenants that exceed their limits, if the policy has `onBypass: kill`.

The BPF programs kill a process in a call that has a probe. Memory that was allocated through a driver library without
probes is visible in NVML alone, so the agent kills the process that holds the memory. This module runs in the agent's
main loop, once a round, and needs the capability KILL.

Memory that a process had before the first limit of its cgroup is spared. These bytes are stored in a file, because a
later agent cannot tell them from memory that was allocated around the limit.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from fgpu_ebpf import abi
from fgpu_ebpf.agent.nvml_reconcile import Truth
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.unwitnessed_memory import Unwitnessed
from fgpu_ebpf.linux import atomic_file, procfs
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.tenant import Tenant

log = logging.getLogger("fgpu.agent")
_Spared = dict[int, tuple[int, dict[int, int]]]  # by pid: the start of the process in clock ticks, the bytes by device


class _Holder(NamedTuple):
    """A process with memory: its cgroup's path, its start in clock ticks since boot, and NVML's bytes by device."""

    path: str
    start: int
    rows: dict[int, int]


class BypassKiller:
    """The steps that kill bypassing processes. `truth` returns the last result of NVML. `place`: the file."""

    FILE = "spared.json"

    def __init__(
        self,
        truth: Callable[[], Truth],
        ledger: Ledger,
        enforcer: Enforcer,
        unwitnessed: Unwitnessed,
        history: EventLog,
        place: Path,
    ) -> None:
        self._truth = truth
        self._ledger = ledger
        self._enforcer = enforcer
        self._unwitnessed = unwitnessed
        self._history = history
        self._last: Truth | None = None
        self._place = place
        self._spared = _read(place)  # by cgroup
        self._known: set[int] = set()  # the cgroups that were searched for older processes
        self._is_stored = True

    def look(self) -> None:
        """Kill processes, once for each new result of NVML.

        The ledger has already been corrected according to this result.
        """
        truth, kills = self._truth(), [tenant for tenant in self._enforcer if self._kills(tenant)]
        self._spare(truth)
        if truth is self._last or not kills:
            return
        self._last = truth
        beyond = self._unwitnessed.find(truth.processes, truth.orphans)
        for tenant in kills:
            for device in self._beyond_limit(tenant):
                self._kill_those_of(tenant, device, truth, beyond)

    def _kill_those_of(self, tenant: Tenant, device: int, truth: Truth, beyond: Mapping[tuple[int, int], int]) -> None:
        for pid, process in truth.processes.items():
            is_seen = process.flags & (abi.Seen.SHIM | abi.Seen.CALL)
            bytes_ = beyond.get((pid, device), 0) if is_seen else process.bytes[device]
            if tenant.cgroup not in process.levels or bytes_ <= self._spared_bytes(pid, tenant, device):
                continue
            if self._kill(pid, process.generation):
                self._report(tenant, pid, device, bytes_)

    def _kills(self, tenant: Tenant) -> bool:
        return tenant.kill and not tenant.observe and not self._enforcer.spares(tenant)

    def _spare(self, truth: Truth) -> None:
        """Enter the memory that processes of new tenants have, and store the table if it has changed."""
        tenants = {tenant.cgroup: tenant for tenant in self._enforcer}
        new = [tenants[cgroup] for cgroup in tenants.keys() & self._enforcer.since.keys() - self._known]
        older = _holders(truth) if new else {}
        found = {tenant.cgroup: self._had(tenant, older) for tenant in new}
        kept = {cgroup: spared for cgroup, spared in self._spared.items() if cgroup in tenants}
        self._known = (self._known & tenants.keys()) | found.keys()
        before, self._spared = self._spared, kept | {cgroup: had for cgroup, had in found.items() if had}
        if not self._is_stored or before.keys() != self._spared.keys():
            self._store()

    def _had(self, tenant: Tenant, holders: Mapping[int, _Holder]) -> _Spared:
        """Return the bytes of the processes in a tenant's cgroup that are older than the cgroup's first limit."""
        since, inside = self._enforcer.since[tenant.cgroup], f"{tenant.path.rstrip('/')}/"
        ticks = since * os.sysconf("SC_CLK_TCK")
        return {
            pid: (one.start, one.rows)
            for pid, one in holders.items()
            if one.start <= ticks and f"{one.path}/".startswith(inside)
        }

    def _spared_bytes(self, pid: int, tenant: Tenant, device: int) -> int:
        """Return the bytes for which a process is not killed: the memory from the time before the limit of the cgroup.

        No probe could record these bytes. Some of these bytes may be for modules, which the driver loads later.
        """
        start, rows = self._spared.get(tenant.cgroup, {}).get(pid, (0, {}))
        before = rows.get(device, 0)
        return before + self._unwitnessed.modules if before and procfs.started(pid) == start else 0

    def _store(self) -> None:
        try:
            atomic_file.write(self._place, json.dumps(self._spared))
            self._is_stored = True
        except OSError as error:
            if self._is_stored:
                log.warning("%s cannot be written, and the next agent needs it: %s", self._place, error)
            self._is_stored = False

    def _beyond_limit(self, tenant: Tenant) -> list[int]:
        """Return the devices on which a tenant is charged more than its limit, even if the limit is not committed."""
        found = self._ledger.usage(tenant.cgroup) or []
        limits = [max(u.limit, tenant.limits.get(device, 0)) for device, u in enumerate(found)]
        return [d for d, u in enumerate(found) if limits[d] != abi.NO_LIMIT and u.used > limits[d]]

    def _kill(self, pid: int, generation: int) -> bool:
        """Kill a process by its pidfd, if the ledger's entry is still the same after the pidfd was opened.

        Return whether the process was killed.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return False
        try:
            now = self._ledger.process(pid)
            if now is None or now.generation != generation:
                return False
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except OSError:
            return False
        finally:
            os.close(pidfd)
        return True

    def _report(self, tenant: Tenant, pid: int, device: int, bytes_: int) -> None:
        self._history.add(
            "killed", tenant=tenant.name, pid=pid, gpu=device, bytes=bytes_, reason="onBypass",
            text="the process exceeded the limit with memory that no probe has recorded",
        )  # fmt: skip


def _holders(truth: Truth) -> dict[int, _Holder]:
    """Return the processes with memory, by pid. Raise OSError in a shortage: the next round tries again."""
    found: dict[int, dict[int, int]] = {}
    for device, rows in truth.held.items():
        for pid, bytes_ in rows.items():
            if bytes_:
                found.setdefault(pid, {})[device] = bytes_
    holders = {}
    for pid, rows in found.items():
        path, start = procfs.cgroup_path(pid), procfs.started(pid)
        if start and path is None and procfs.started(pid) == start:
            raise OSError(errno.EAGAIN, f"the cgroup of process {pid} cannot be read")
        if start and path:
            holders[pid] = _Holder(path, start, rows)
    return holders


def _read(place: Path) -> dict[int, _Spared]:
    """Return the bytes by cgroup that an earlier agent has stored. An unreadable file counts as empty."""
    try:
        said = json.loads(place.read_text(encoding="utf-8"))
        return {
            int(cgroup): {
                int(pid): (int(start), {int(device): int(bytes_) for device, bytes_ in rows.items()})
                for pid, (start, rows) in spared.items()
            }
            for cgroup, spared in said.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s cannot be read, so that no memory from before a limit is spared: %s", place, error)
        return {}
