"""Keeps `onBypass: deny` in force: programs without the shim may not open the driver's device nodes.

A BPF program decides about each open (bpf/opens.bpf.h), by the flag of a limit. This module adds the major numbers of
modules that were loaded later, and maintains a file, MARK. While the file exists, the shim registers a program before
the driver opens a node. Runs in the agent's main loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path

from fgpu_ebpf import abi
from fgpu_ebpf.agent.nvml_reconcile import Truth
from fgpu_ebpf.check import Check
from fgpu_ebpf.driver import device_nodes
from fgpu_ebpf.ledger.ledger import Ledger
from fgpu_ebpf.policy.rules import PolicySet
from fgpu_ebpf.tenancy.tenant import Tenant

MARK = "shim/deny"  # in the run folder; containers have the folder mounted
NAME = "device nodes"
_FIX = "use a kernel with CONFIG_CGROUP_BPF=y, or set `onBypass: kill` in the policy"


class DeniedOpens:
    """The state of `onBypass: deny` on this host.

    Args:
        run_dir: the run folder.
        ledger: the ledger.
        truth: returns the last result of NVML.
        tenants: all tenants.
        fault: returns the reason why no program decides about opens; an empty text if a program does.
        failed_checks: the agent's failed checks.
    """

    def __init__(
        self, run_dir: Path, ledger: Ledger, truth: Callable[[], Truth], tenants: Iterable[Tenant],
        fault: Callable[[], str], failed_checks: MutableMapping[str, Check],
    ) -> None:  # fmt: skip
        self._mark, self._ledger, self._truth, self._tenants = run_dir / MARK, ledger, truth, tenants
        self._fault, self._failed_checks = fault, failed_checks
        self._is_in_policies = False

    def prepare(self, policies: PolicySet) -> None:
        """Create the file, if a policy of this set denies opens. To be called before the set is in force."""
        self._is_in_policies = any(policy.deny for policy in policies.policies)
        if self._is_in_policies:
            self._mark.parent.mkdir(mode=0o755, exist_ok=True)
            self._mark.touch(mode=0o644)

    def look(self) -> None:
        """Exempt the processes that NVML shows, renew numbers and file, and report whether the policy is in force."""
        truth = self._truth()
        for pid in truth.strangers() & truth.processes.keys():
            process = truth.processes[pid]
            if not process.flags & abi.SEEN_DEVICE:
                self._ledger.opens.exempt(pid, process.generation)
        denied = [tenant.name for tenant in self._tenants if tenant.deny]
        self._failed_checks.pop(NAME, None)
        if denied:
            self._ledger.opens.set_majors(device_nodes.majors())
            if fault := self._fault():
                found = f"onBypass: deny is not in force for {', '.join(denied[:5])}: {fault}"
                self._failed_checks[NAME] = Check("device nodes", False, found, _FIX)
        elif not self._is_in_policies:
            with contextlib.suppress(FileNotFoundError):
                self._mark.unlink()
