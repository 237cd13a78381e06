"""The ways in which a process bypasses the shim, and why it has none: the words of `fgpu ps` and of the metrics.

The agent's main thread uses this module, with the readings of one Snapshot.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from fgpu_ebpf import abi
from fgpu_ebpf.agent.turn_audit import Verdict
from fgpu_ebpf.driver.bypass_reason import Reasons
from fgpu_ebpf.ledger.process_entry import Process
from fgpu_ebpf.linux import procfs

_WITHOUT = ("no_admission", "no_shim", "unwitnessed")


@dataclass(frozen=True, slots=True)
class Bypasses:
    """Pids, by what is known of them. `unwitnessed`: those with more memory than can be explained."""

    preexisting: Container[int]
    unprobed: Container[int]
    standalone: Container[int]
    unwitnessed: Container[int]
    turns: Verdict
    reasons: Reasons

    def how(self, tgid: int, process: Process) -> str:
        """Return how a process bypasses the shim; empty: it does not.

        The first that applies: `older`, it started before fgpu; `unprobed`, it maps a library that could not be probed,
        so that its calls are unknown; `standalone`, it found no agent and keeps its image's own limit; `no_admission`,
        its calls are seen without an admission; `no_shim` or `unwitnessed`, it has memory and no shim, or no call of it
        is seen; `outside_turns` or `empty_turns`, NVML sees it run outside its turns, or run nothing in them. A process
        that exits during its adoption bypasses nothing; its entry is deleted soon.
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
        """Return why a bypassing process has no shim; empty: it has one, or the reason is unknown."""
        if how not in _WITHOUT or process.flags & abi.Seen.SHIM:
            return ""
        return self.reasons.of(tgid, process.generation) or ""

    def loader(self, tgid: int, process: Process) -> str:
        """Return the loader of a process for which it is the reason of `why`; else empty."""
        return self.reasons.loader(tgid, process.generation)
