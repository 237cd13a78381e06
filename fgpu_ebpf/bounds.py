"""How much one owner of bounds may have: the defaults of `bounds:` in agent.yaml.

Owns: the numbers, and the words of a refusal for one of them. Never: counts. Cannot fail.
"""

from __future__ import annotations

from dataclasses import dataclass

KEYS = ("levels", "allocations", "threads", "processes", "orphans", "files", "unmanaged")


@dataclass(frozen=True, slots=True)
class Bounds:
    """Each for one owner: a workload with all cgroups that are inside it.

    `levels`: cgroups with a limit of their own. `allocations`, `threads`, `processes`, `orphans`: entries in the
    kernel's maps. `files`: files of libcuda that are probed. `unmanaged`: cgroups that are known to be unmanaged.
    """

    levels: int = 512
    allocations: int = 65_536
    threads: int = 16_384
    processes: int = 4_096
    orphans: int = 16_384
    files: int = 128
    unmanaged: int = 1_024

    def entries(self) -> tuple[int, int, int, int]:
        """Of the kernel's maps, in the order of fgpu.h."""
        return self.allocations, self.threads, self.processes, self.orphans


def refusal(owner: str, key: str, has: int, most: int) -> str:
    """Why an owner gets no more: its name, what it has, and the setting that would give it more."""
    return f"{owner} has {has} of {most} {key} that one workload may have (bounds.{key} in agent.yaml)"
