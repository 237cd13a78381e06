"""The way in which a process bypasses the shim, and the reason for a missing shim, as in `fgpu ps` and the metrics.

This module runs in the agent's main thread, on the readings for one Snapshot.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from fgpu_ebpf import abi
from fgpu_ebpf.agent.turn_audit import Verdict
from fgpu_ebpf.driver.bypass_reason import Reasons
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.linux import procfs

_WITHOUT = ("no_admission", "no_shim", "unwitnessed", "unprobed")


@dataclass(frozen=True, slots=True)
class Bypasses:
    """The inputs: sets of pids by property, the audit of turns, and the reasons why processes have no shim.

    `unwitnessed`: processes that hold more memory than recorded calls explain.
    """

    preexisting: Container[int]
    unprobed: Container[int]
    standalone: Container[int]
    unwitnessed: Container[int]
    turns: Verdict
    reasons: Reasons

    def how(self, tgid: int, process: Process) -> str:
        """Return the way in which a process bypasses the shim, or an empty text if there is no bypass.

        The result is the first way in this list that applies. The first three ways apply only to processes that have
        memory:

        * `older`: the process started before fgpu.
        * `unprobed`: the process has mapped a library that could not be probed, so the calls are unknown.
        * `standalone`: the shim of the process found no agent, and enforces the image's own limit.
        * `no_admission`: probes have recorded calls for which the process requested no admission.
        * `no_shim`: the process has memory and no shim. Probes record the calls.
        * `unwitnessed`: the process has memory that no recorded call explains.
        * `outside_turns`: according to NVML, the process runs outside its tenant's turns.
        * `empty_turns`: according to NVML, the process runs nothing in its tenant's turns.

        A process that exits during its adoption bypasses nothing, and its entry in the ledger is deleted soon.
        """
        if tgid in self.preexisting and any(process.bytes) and not procfs.ended(tgid):
            return "older"
        if tgid in self.unprobed and any(process.bytes):
            return "unprobed"
        if tgid in self.standalone and any(process.bytes) and not process.flags & abi.Seen.SHIM:
            return "standalone"
        if process.flags & abi.Seen.BYPASS:
            return "no_admission"
        if not process.flags & abi.Seen.SHIM and any(process.bytes) and not procfs.ended(tgid):
            return "no_shim" if process.flags & abi.Seen.CALL else "unwitnessed"
        if tgid in self.unwitnessed:
            return "unwitnessed"
        if tgid in self.turns.outside:
            return "outside_turns"
        return "empty_turns" if tgid in self.turns.empty else ""

    def why(self, tgid: int, process: Process, how: str) -> str:
        """Return why a bypassing process has no shim.

        The result is empty if the process has a shim or the reason is not known yet.
        """
        if how not in _WITHOUT or process.flags & abi.Seen.SHIM:
            return ""
        return self.reasons.of(tgid, process.generation) or ""

    def loader(self, tgid: int, process: Process) -> str:
        """Return the path of a process's dynamic loader if why() names the loader as the reason, else an empty text."""
        return self.reasons.loader(tgid, process.generation)
