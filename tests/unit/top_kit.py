"""Snapshots for the tests of views, as the agent sends them."""

from __future__ import annotations

import json
from typing import Any

from fgpu_ebpf import abi
from fgpu_ebpf.cli.top_input import LatestSnapshot
from fgpu_ebpf.snapshot import ComputeView, DeviceView, Snapshot, TenantDevice, TenantView, plain

MIB, GIB = 1 << 20, 1 << 30


def compute(had: float, entitled: float = 0.5, waited: float = 0.0, free: bool = False) -> ComputeView:
    return ComputeView(1.0, 100, "normal", 9.0, 7, waited, 0, 0, False, had, entitled, free, None)


def on(gpu: int, used: int, limit: int = abi.NO_LIMIT, refused: int = 0, time: ComputeView | None = None) -> Any:
    return TenantDevice(gpu, limit, used, used + MIB, refused, used, used, 0, (), time)


def tenant(name: str, *devices: TenantDevice, kind: str = "tenant", enforcement: str = "kernel") -> TenantView:
    return TenantView(
        name, kind, f"/batch/{name}", hash(name), "policy", "notebooks", "", "", "", enforcement, "", (), {}, {},
        devices, (),
    )  # fmt: skip


def device(index: int = 0, used: int | None = 40 * GIB, owner: str | None = "bob", unmanaged: int | None = 0) -> Any:
    committed = 100 * GIB
    return DeviceView(
        index, "GPU-1", "NVIDIA H200", "0", 160 * GIB, used, committed, unmanaged, None, owner
    )  # fmt: skip


def latest(
    *tenants: TenantView, devices: tuple[DeviceView, ...] = (), error: str = "", unenforced: str = ""
) -> LatestSnapshot:
    snapshot = Snapshot(1.0, devices or (device(),), tenants, unenforced=unenforced)
    return LatestSnapshot(json.loads(json.dumps(snapshot, default=plain)), error, 0.0)


ALICE = tenant("alice", on(0, 4 * GIB, 8 * GIB, refused=3, time=compute(0.251, 0.25, 12.34)))
BOB = tenant("bob", on(0, 6 * GIB, 16 * GIB, time=compute(0.749, 0.75)))
CAROL = tenant("carol", on(0, 0, time=compute(0.0, 0.0, free=True)))
BATCH = tenant("batch", on(0, 10 * GIB, 12 * GIB), kind="group", enforcement="observe")
ALL = (ALICE, BOB, CAROL, BATCH)
