"""Kill bypassing processes of tenants that exceed their limits, if the policy has `onBypass: kill`.

The BPF programs kill a process in a call that has a probe. Memory that was allocated through a driver library without
probes is visible in NVML alone, so the agent kills the process that holds the memory. This module runs in the agent's
main loop, once a round, and needs the capability KILL.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping

from fgpu_ebpf import abi
from fgpu_ebpf.agent.nvml_reconcile import Truth
from fgpu_ebpf.driver.device_sample import Rows
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.ledger.unwitnessed_memory import Unwitnessed
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.tenant import Tenant


class BypassKiller:
    """The steps that kill bypassing processes. `truth` returns the last result of NVML."""

    def __init__(
        self,
        truth: Callable[[], Truth],
        ledger: Ledger,
        enforcer: Enforcer,
        unwitnessed: Unwitnessed,
        history: EventLog,
    ) -> None:
        self._truth = truth
        self._ledger = ledger
        self._enforcer = enforcer
        self._unwitnessed = unwitnessed
        self._history = history
        self._last: Truth | None = None
        self._before: dict[int, Mapping[int, Rows]] = {}  # NVML's rows when a tenant's cgroup got its limit

    def look(self) -> None:
        """Kill processes, once for each new result of NVML.

        The ledger has already been corrected according to this result.
        """
        truth, kills = self._truth(), [tenant for tenant in self._enforcer if self._kills(tenant)]
        new = {tenant.cgroup: truth.held if tenant.cgroup in self._enforcer.since else {} for tenant in kills}
        self._before = {cgroup: self._before.get(cgroup, held) for cgroup, held in new.items()}
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
            if tenant.cgroup not in process.levels or bytes_ <= self._spared(pid, tenant, device):
                continue
            if self._kill(pid, process.generation):
                self._report(tenant, pid, device, bytes_)

    def _kills(self, tenant: Tenant) -> bool:
        return tenant.kill and not tenant.observe and not self._enforcer.spares(tenant)

    def _spared(self, pid: int, tenant: Tenant, device: int) -> int:
        """Return the bytes for which a process is not killed: the memory from the time before the limit of the cgroup.

        No probe could record these bytes. Some of these bytes may be for modules, which the driver loads later.
        """
        before = self._before[tenant.cgroup].get(device, {}).get(pid) or 0
        started, since = procfs.started(pid) if before else None, self._enforcer.since.get(tenant.cgroup, 0.0)
        is_older = started is not None and started / os.sysconf("SC_CLK_TCK") <= since
        return before + self._unwitnessed.modules if is_older else 0

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
