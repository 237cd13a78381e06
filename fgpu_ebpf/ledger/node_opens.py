"""Settings and counters of bpf/opens.bpf.h, which decides about opens of device nodes by processes without the shim.

This module runs in the agent's main thread. Errors are OSError of bpf(2).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.usage_pages import UsagePages
from fgpu_ebpf.linux import bpf

_U32 = struct.Struct("I")


class Opens(NamedTuple):
    """Opens by processes of a level: the number of refusals, and the number that `onBypass: deny` would refuse."""

    denied: int
    would_deny: int


class NodeOpens:
    """The ledger's part for opens of the driver's device nodes. `run` runs the BPF program `adjust`."""

    def __init__(self, maps: Mapping[str, int], run: Callable[..., int], pages: UsagePages) -> None:
        self._maps, self._run, self._pages = maps, run, pages

    def set_majors(self, majors: Iterable[int]) -> None:
        """Set the major numbers of the nodes about which the BPF program decides."""
        fd, wanted = self._maps["node_majors"], {_U32.pack(major): _U32.pack(0) for major in majors}
        bpf.update_all(fd, wanted)
        for major, _ in bpf.items(fd, _U32.size, _U32.size):
            if major not in wanted:  # a module of the driver was unloaded: another driver may get the number
                bpf.delete(fd, major)

    def exempt(self, tgid: int, generation: int) -> None:
        """Let a process open nodes, because a process with memory has opened the devices before."""
        self._run(abi.Adjust.EXEMPT, tgid, generation)

    def of(self, cgroup: int) -> Opens:
        """Return the numbers of a level since its page was created. The numbers are 0 if the level has no page."""
        return Opens(*self._pages.opens(cgroup))
