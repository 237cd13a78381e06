"""A tenant's share of a device's time, in the form that a Snapshot has. No I/O; runs in the agent's main loop."""

from __future__ import annotations

from fgpu_ebpf.ledger.compute_maps import TurnCounts
from fgpu_ebpf.policy.rules import Priority
from fgpu_ebpf.scheduling.fair_queue import MILLION, Share
from fgpu_ebpf.snapshot import ComputeView, Shortfall

NS = 1e9


def compute_view(
    share: Share, t: TurnCounts, now_ns: int, beyond_ratio: float | None, shortfall: Shortfall | None
) -> ComputeView:
    """Return the view of a tenant on one device.

    Args:
        share: the tenant's share of the device's time.
        t: the gatekeeper's counts of the tenant's turns.
        now_ns: the current time, CLOCK_MONOTONIC.
        beyond_ratio: see `ComputeView`.
        shortfall: set if the tenant gets less time than is due to it.
    """
    return ComputeView(
        share.limit_millionths / MILLION, share.weight, list(Priority)[share.rank].value, t.owned_ns / NS, t.waits,
        t.wait_ns / NS, t.throttled, t.overruns, bool(t.owner), t.had_millionths / MILLION,
        t.entitled_millionths / MILLION, bool(t.free), (now_ns - t.since_ns) / NS if t.since_ns else None,
        beyond_ratio, shortfall,
    )  # fmt: skip
