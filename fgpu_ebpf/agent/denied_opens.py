"""Keep `onBypass: deny` in force, so that programs without the shim cannot open the driver's device nodes.

A BPF program decides about each open (bpf/opens.bpf.h), by the flag of a limit. This module renews the major numbers,
which change when modules of the driver are loaded, and exempts processes that already have a device. The module runs in
the agent's main loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping

from fgpu_ebpf import abi
from fgpu_ebpf.agent.nvml_reconcile import Truth
from fgpu_ebpf.check import Check
from fgpu_ebpf.driver import device_nodes
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.tenancy.tenant import Tenant

NAME = "device nodes"
_FIX = "use a kernel with CONFIG_CGROUP_BPF=y, or set `onBypass: kill` in the policy"


class DeniedOpens:
    """The state of `onBypass: deny` on this host.

    Args:
        ledger: the kernel's ledger.
        truth: returns the last result of NVML.
        tenants: all tenants.
        fault: returns the reason why no BPF program decides about opens, or an empty text if a program decides.
        failed_checks: the agent's failed checks.
    """

    def __init__(
        self, ledger: Ledger, truth: Callable[[], Truth], tenants: Iterable[Tenant],
        fault: Callable[[], str], failed_checks: MutableMapping[str, Check],
    ) -> None:  # fmt: skip
        self._ledger, self._truth, self._tenants = ledger, truth, tenants
        self._fault, self._failed_checks = fault, failed_checks

    def look(self) -> None:
        """Exempt the processes that NVML shows, renew the major numbers, and report whether the policy is in force."""
        truth = self._truth()
        for pid in truth.strangers() & truth.processes.keys():
            process = truth.processes[pid]
            if not process.flags & abi.SEEN_DEVICE:
                self._ledger.opens.exempt(pid, process.generation)
        denied = [tenant.name for tenant in self._tenants if tenant.deny and not tenant.observe]
        self._failed_checks.pop(NAME, None)
        if denied:
            self._ledger.opens.set_majors(device_nodes.majors())
            if fault := self._fault():
                found = f"onBypass: deny is not in force for {', '.join(denied[:5])}: {fault}"
                self._failed_checks[NAME] = Check("device nodes", False, found, _FIX)
