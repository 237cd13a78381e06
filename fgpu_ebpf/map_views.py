"""How full the tables are that all tenants share.

Owns: their names and sizes. Never: counts entries of the large maps one by one. On failure: OSError of bpf(2).
"""

from __future__ import annotations

from fgpu_ebpf import resolutions
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.level_places import PLACES
from fgpu_ebpf.snapshot import MapView

# As in maps.bpf.h, in the order of fgpu.h.
COUNTED = (("allocations", 262_144), ("threads", 65_536), ("processes", 16_384), ("orphans", 65_536))


def maps(ledger: Ledger) -> tuple[MapView, ...]:
    """Each table: of those that owners of bounds have parts of, what they have claimed."""
    claimed = zip(COUNTED, ledger.owners.claimed(), strict=True)
    return (
        MapView("levels", ledger.levels_taken(), PLACES),
        MapView("resolved", ledger.resolutions.count(), resolutions.MOST),
        *(MapView(name, entries, most) for (name, most), entries in claimed),
    )
