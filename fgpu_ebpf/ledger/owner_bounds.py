"""Bounds of one owner: the defaults of `bounds:` in agent.yaml, and the text of a refusal.

This module runs in the agent. The BPF programs and `tenancy.level_capacity` count the entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

PARTS = 4  # one owner gets at most 1/4 of the map `allocations`, as one level (maps.bpf.h)
KEYS = ("levels", "allocations", "threads", "processes", "orphans", "files", "unmanaged")


class Bounds(NamedTuple):
    """The bounds of one owner: a workload with all inner cgroups.

    `levels`: cgroups with a limit of their own. `allocations`, `threads`, `processes`, `orphans`: entries in the
    kernel's maps. `files`: probed files of libcuda. `unmanaged`: cgroups that are known to be unmanaged.
    """

    levels: int = 512
    allocations: int = 262_144
    threads: int = 16_384
    processes: int = 4_096
    orphans: int = 16_384
    files: int = 128
    unmanaged: int = 1_024

    def entries(self, sizes: Mapping[str, int]) -> tuple[int, int, int, int]:
        """Return the bounds for the kernel's maps, in the order of fgpu.h.

        Args:
            sizes: how many entries the maps can have. One workload gets at most a quarter of `allocations`.
        """
        allocations = min(self.allocations, sizes["allocations"] // PARTS)
        return allocations, self.threads, self.processes, self.orphans


def refusal(owner: str, key: str, has: int, most: int) -> str:
    """Return the message of a refused entry: the owner, its entries, its maximum, and the setting of the bound."""
    return f"{owner} has {has} of {most} {key} that one workload may have (bounds.{key} in agent.yaml)"
