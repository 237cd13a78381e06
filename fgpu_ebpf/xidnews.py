"""XIDs that devices report: told in `fgpu events`.

Owns: how many of each have been told. Never: judges them. Cannot fail.
"""

from __future__ import annotations

from collections.abc import Callable

from fgpu_ebpf import xids
from fgpu_ebpf.history import History
from fgpu_ebpf.reconcile import Truth


class XidNews:
    """`truth` answers what NVML has said so far."""

    def __init__(self, truth: Callable[[], Truth], history: History) -> None:
        self._truth = truth
        self._history = history
        self._told: dict[tuple[int, int], int] = {}

    def look(self) -> None:
        """Tells of what is new."""
        for device, reported in self._truth().xids.items():
            for xid, count in reported.counts.items():
                more = count - self._told.get((device, xid), 0)
                if more:
                    self._told[device, xid] = count
                    self._tell(device, xid, more, reported)

    def _tell(self, device: int, xid: int, more: int, reported: xids.Reported) -> None:
        times = "" if more == 1 else f", {more} times"
        meaning = ": no share of the device is offered" if reported.fatal == xid else ""
        self._history.add("xid", gpu=device, text=f"{xid}{times}{meaning}")
