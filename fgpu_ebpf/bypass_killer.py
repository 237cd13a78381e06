"""Under `onBypass: kill`: kills processes of a tenant beyond its limit whose memory no probe has seen them take.

The kernel's programs kill a process in a call that they see. What is taken through a driver library that is not probed
shows in NVML alone, so the agent kills then. A chore of the agent's main loop; it needs the capability KILL.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping

from fgpu_ebpf import pages
from fgpu_ebpf.enforcer import Enforcer
from fgpu_ebpf.history import History
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.reconcile import Truth
from fgpu_ebpf.tenants import Tenant
from fgpu_ebpf.unwitnessed import Unwitnessed


class BypassKiller:
    """`truth` returns NVML's last look."""

    def __init__(
        self,
        truth: Callable[[], Truth],
        ledger: Ledger,
        enforcer: Enforcer,
        unwitnessed: Unwitnessed,
        history: History,
    ) -> None:
        self._truth = truth
        self._ledger = ledger
        self._enforcer = enforcer
        self._unwitnessed = unwitnessed
        self._history = history
        self._last: Truth | None = None

    def look(self) -> None:
        """Kills once for each look of NVML's, so that the ledger is what the device shows."""
        truth, kills = self._truth(), [tenant for tenant in self._enforcer if self._kills(tenant)]
        if truth is self._last or not kills:
            return
        self._last = truth
        beyond = self._unwitnessed.find(truth.processes, truth.orphans)
        for tenant in kills:
            for device in self._beyond_limit(tenant):
                self._kill_those_of(tenant, device, truth, beyond)

    def _kill_those_of(self, tenant: Tenant, device: int, truth: Truth, beyond: Mapping[tuple[int, int], int]) -> None:
        for pid, process in truth.processes.items():
            is_seen = process.flags & (pages.Seen.SHIM | pages.Seen.CALL)
            bytes_ = beyond.get((pid, device), 0) if is_seen else process.bytes[device]
            if tenant.cgroup in process.levels and bytes_ and self._kill(pid, process.generation):
                self._tell(tenant, pid, device, bytes_)

    def _kills(self, tenant: Tenant) -> bool:
        return tenant.kill and not tenant.observe and not self._enforcer.spares(tenant)

    def _beyond_limit(self, tenant: Tenant) -> list[int]:
        """Devices on which a tenant is charged more than its limit."""
        found = self._ledger.usage(tenant.cgroup) or []
        return [d for d, u in enumerate(found) if u.limit != pages.NO_LIMIT and u.used > u.limit]

    def _kill(self, pid: int, generation: int) -> bool:
        """A pidfd names the process for good; it is that of the ledger's entry if that is the same once it is open."""
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

    def _tell(self, tenant: Tenant, pid: int, device: int, bytes_: int) -> None:
        self._history.add(
            "killed", tenant=tenant.name, pid=pid, gpu=device, bytes=bytes_, reason="onBypass",
            text="memory that no probe has seen it take, beyond the limit",
        )  # fmt: skip
