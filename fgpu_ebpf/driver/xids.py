"""XIDs: errors that devices report. After a fatal XID, a device must not be assigned to programs.

Tally runs in the agent's reconcile thread, and check() in `fgpu doctor`. Programs that already have a share of such a
device continue, as far as the driver allows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from fgpu_ebpf.check import Check

# NVIDIA's device plugin ignores these XIDs too: exceptions and page faults of kernels, and reactions to a program.
OF_PROGRAMS = (13, 31, 43, 45, 68, 109)
_FIX = "see dmesg | grep -i xid, and docs.nvidia.com/deploy/xid-errors; reset the device, or run fgpu device clear GPU"


class Reported(NamedTuple):
    """The XIDs of one device since the device was first watched: `counts` by XID, and the number of ignored XIDs.

    `fatal`: the first XID that was not ignored since the device was last found again or cleared; None: there was no
    such XID.
    """

    counts: Mapping[int, int]
    ignored: int = 0
    fatal: int | None = None


class Tally:
    """The XIDs of all watched devices.

    `ignored`: XIDs that do not make a device unfit. `fatal`: fatal XIDs that devices have reported to earlier agents,
    by ledger index.
    """

    def __init__(self, ignored: Collection[int] = OF_PROGRAMS, fatal: Mapping[int, int] | None = None) -> None:
        self._ignored = frozenset(ignored)
        before = (fatal or {}).items()
        self._reported = {device: Reported({}, fatal=xid) for device, xid in before if xid not in self._ignored}

    def take(self, watched: Iterable[int], came: Iterable[tuple[int, int | None]]) -> Mapping[int, Reported]:
        """Add XIDs, and return the totals by device. Devices without an XID that were never watched are left out.

        Args:
            watched: the devices that NVML watches now.
            came: pairs of device and XID in order; XID None: the device has been found again after a loss or a reset,
                or `fgpu device clear` has cleared the device.
        """
        for device in watched:
            self._reported.setdefault(device, Reported({}))
        for device, xid in came:
            before = self._reported.get(device, Reported({}))
            self._reported[device] = before._replace(fatal=None) if xid is None else self._after(before, xid)
        return dict(self._reported)

    def _after(self, before: Reported, xid: int) -> Reported:
        counts = {**before.counts, xid: before.counts.get(xid, 0) + 1}
        if xid in self._ignored:
            return before._replace(counts=counts, ignored=before.ignored + 1)
        return before._replace(counts=counts, fatal=xid if before.fatal is None else before.fatal)


def failure(xid: int) -> str:
    """Return the reason why a device must not be assigned to programs."""
    return f"the device has reported XID {xid}"


def check(devices: Iterable[Mapping[str, Any]]) -> Check:
    """Return the finding for `fgpu doctor`: whether a device of a Snapshot has reported a fatal XID."""
    seen = [device for device in devices if device["xids"] is not None]
    failed = [f"device {d['index']} has reported XID {d['fatal_xid']}" for d in seen if d["fatal_xid"] is not None]
    if failed:
        return Check("xids", False, "; ".join(failed), _FIX)
    return Check(
        "xids",
        True,
        "no device has reported a fatal XID since its last reset or clearing"
        if seen
        else "not checked: NVML reports no XIDs",
    )
