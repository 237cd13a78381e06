"""Wake all parked tenants while no agent runs, before the removal of parts that tenants need in order to wake up.

The steps are the steps of an agent for which parking is off: the driver is queried, room is charged, and the parker
restores the tenant. This module runs in the process of a command, which holds the agent's lock. Entries of tenants that
are not woken stay in the ledger, so that the next agent or the next call continues.
"""

from __future__ import annotations

import selectors
import time
from pathlib import Path

from fgpu_ebpf.agent import host_config, parker_client
from fgpu_ebpf.agent.parkable import Parkable, PromptNvml
from fgpu_ebpf.agent.parking import Parking
from fgpu_ebpf.check import Check
from fgpu_ebpf.driver import device_indexes, other_layouts
from fgpu_ebpf.driver.nvml import DriverError, Nvml
from fgpu_ebpf.ledger.ledger import Ledger, LedgerMissing
from fgpu_ebpf.linux import procfs
from fgpu_ebpf.tenancy.enforcer import Enforcer
from fgpu_ebpf.tenancy.event_log import EventLog
from fgpu_ebpf.tenancy.moves import Moves
from fgpu_ebpf.workloads.cgroups import Workloads

LEAST_SECONDS = 20.0
ROUND_SECONDS = 0.1


def wake_all(run_dir: Path, pins: Path) -> str:
    """Wake all tenants that are parked in the ledger. Return which tenants were not woken and why, or an empty text."""
    return _wake_own(run_dir, pins) or other_layouts.parked(pins)


def _wake_own(run_dir: Path, pins: Path) -> str:
    root = procfs.cgroup2_root()
    try:
        ledger = Ledger(pins)
    except LedgerMissing:
        return ""
    try:
        if root is None or not ledger.parked.entries():
            return ""
        return _wake(run_dir, pins, ledger, root)
    finally:
        ledger.close()


def limit_seconds(bytes_: int) -> float:
    """Return the seconds that the wake-up of a tenant with this number of bytes may take."""
    return LEAST_SECONDS + bytes_ / parker_client.SLOWEST


def _wake(run_dir: Path, pins: Path, ledger: Ledger, root: Path) -> str:
    failed: dict[str, Check] = {}
    enforcer = Enforcer(ledger, Workloads(root), (), overcommit=False)
    enforcer.moves = Moves(ledger, root, frozenset(ledger.tenants()))  # this enforcer has no tenants
    host, _ = host_config.read()
    try:
        root_of_driver = (host.driver_root if host else Path("/")).resolve()
        nvml = PromptNvml(Nvml(root_of_driver, device_indexes.pinned(pins)))
    except DriverError:  # a wrong root of the driver must not prevent the wake-up
        nvml = None
    parking = Parking(run_dir, Parkable(False, root, ledger, nvml, enforcer, dict), EventLog(), failed)
    with selectors.DefaultSelector() as selector:
        parking.begin(selector)
        until = time.monotonic() + limit_seconds(sum(parked.bytes for parked in parking.tenants()))
        while parking.names() and time.monotonic() < until:
            if why := parker_client.missing(run_dir):
                return f"{', '.join(parking.names())}: {why}"
            for key, _ in selector.select(ROUND_SECONDS):
                key.data()
            parking.look()
        names = ", ".join(parking.names())
        parking.stop()
    return failed["parking"].found if names and "parking" in failed else names
