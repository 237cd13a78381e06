"""XIDs: errors that devices report, and which devices are fit for nobody after that.

Owns: which of them are programs' own mistakes, and how often each came. Never: asks NVML, or ends anything: who holds a
share goes on, as the driver lets it. Cannot fail.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fgpu_ebpf.checks import Check

# As NVIDIA's device plugin has them: a kernel's exceptions and page faults, and what the driver does about a program.
OF_PROGRAMS = (13, 31, 43, 45, 68, 109)
_MEND = (
    "dmesg | grep -i xid, then what docs.nvidia.com/deploy/xid-errors says; a reset clears it, or fgpu device clear GPU"
)


@dataclass(frozen=True, slots=True)
class Reported:
    """By one device since it was first watched: how often by XID, and how many of them all were ignored. `fatal`: the
    first that was not, since the device was last found; None: there was none.
    """

    counts: Mapping[int, int]
    ignored: int = 0
    fatal: int | None = None


class Tally:
    """Of all devices that are watched. `ignored`: XIDs after which a device is as fit as before; `fatal`: those that
    devices have reported before, by ledger index.
    """

    def __init__(self, ignored: Collection[int] = OF_PROGRAMS, fatal: Mapping[int, int] | None = None) -> None:
        self._ignored = frozenset(ignored)
        before = (fatal or {}).items()
        self._reported = {device: Reported({}, fatal=xid) for device, xid in before if xid not in self._ignored}

    def take(self, watched: Iterable[int], came: Iterable[tuple[int, int | None]]) -> Mapping[int, Reported]:
        """Devices and XIDs as they came, None: it was lost or reset, and has been found again. By device, what there is
        after that; a device that was never watched is not in it.
        """
        for device in watched:
            self._reported.setdefault(device, Reported({}))
        for device, xid in came:
            before = self._reported.get(device, Reported({}))
            self._reported[device] = replace(before, fatal=None) if xid is None else self._after(before, xid)
        return dict(self._reported)

    def _after(self, before: Reported, xid: int) -> Reported:
        counts = {**before.counts, xid: before.counts.get(xid, 0) + 1}
        if xid in self._ignored:
            return replace(before, counts=counts, ignored=before.ignored + 1)
        return replace(before, counts=counts, fatal=xid if before.fatal is None else before.fatal)


def fault(xid: int) -> str:
    """Why nothing of a device may be given."""
    return f"it has reported XID {xid}"


def check(devices: Iterable[Mapping[str, Any]]) -> Check:
    """That no device has reported what is no program's own, by a Snapshot's devices."""
    seen = [device for device in devices if device["xids"] is not None]
    failed = [f"device {d['index']}: {fault(d['fatal_xid'])}" for d in seen if d["fatal_xid"] is not None]
    if failed:
        return Check("xids", False, "; ".join(failed), _MEND)
    return Check("xids", True, "none but programs' own" if seen else "NVML tells of none")
