"""How full the tables are that all tenants share.

Owns: their names and sizes. Never: counts entries of the large maps one by one. On failure: OSError of bpf(2).
"""

from __future__ import annotations

from fgpu_ebpf import resolutions
from fgpu_ebpf.ledger import Ledger
from fgpu_ebpf.level_places import PLACES
from fgpu_ebpf.owner_table import COUNTED
from fgpu_ebpf.snapshot import MapView


def maps(ledger: Ledger) -> tuple[MapView, ...]:
    """Each table: of those that owners of bounds have parts of, what they have claimed."""
    claimed = zip(COUNTED.items(), ledger.owners.claimed(), strict=False)
    return (
        MapView("levels", ledger.levels_taken(), PLACES),
        MapView("resolved", ledger.resolutions.count(), resolutions.MOST),
        *(MapView(name, entries, most) for (name, most), entries in claimed),
    )
