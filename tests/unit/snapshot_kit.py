"""A Snapshot in which every field has a value."""

from __future__ import annotations

from fgpu_ebpf.snapshot import (
    ComputeView,
    DeviceView,
    EngineView,
    MapView,
    ParkingView,
    PoliciesView,
    ProcessView,
    Refusal,
    Shortfall,
    SlicesView,
    Snapshot,
    TenantDevice,
    TenantView,
    UsageView,
)


def snapshot(name: str = "notebook") -> Snapshot:
    device = DeviceView(0, "GPU-1", "NVIDIA H200", "00000000:06:00.0", 150754820096, 644939776, 8 << 30, 23,
                        SlicesView(907, 2, 1.5, (0.001, 0.004), (811, 89, 5), 12.5), name, 0.25, 2,
                        {31: 3, 79: 1}, 3, 79, 13, 17)  # fmt: skip
    compute = ComputeView(
        0.5, 300, "high", 12.5, 71, 3.25, 11, 2, True, 0.45, 0.5, False, 1.5, None, Shortfall(0.21, "why")
    )  # fmt: skip
    memory = TenantDevice(
        0,
        8 << 30,
        101,
        1009,
        5,
        303,
        202,
        -7,
        (Refusal("memory", "limit", 5),),
        compute,
        13,
        usage=(UsageView("turns", 12.5, 3000.0, 40.0, 7.0), UsageView("nvml", 2.0, 500.0, 3.0, 1.0)),
        parked_bytes=29,
    )
    processes = (ProcessView(11, 0, 90), ProcessView(12, 0, 11))
    tenant = TenantView(
        name, "tenant", "/docker/1f", 481, "policy", "notebooks", "dev", "jupyter", "1f3a", "kernel", "", (),
        {"team": "vision"}, {"no_admission": 1}, (memory,), processes, {"musl": 1},
        parking=ParkingView("parked", 61.0, "", 5, 4, 9.5, 3.5),
    )  # fmt: skip
    policies = PoliciesView(True, 1700000000.5, 3, ())
    events = {"sent": 9, "rate": 7, "full": 0}
    hits = {"alloc": 23, "admit": 101}
    docker = EngineView("docker", "/run/docker.sock", True, "", 2, 31, 1, 4)
    return Snapshot(1.0, (device,), (tenant,), {"release": 0, "bypass": 3}, {}, events, policies, hits, (docker,),
                    gatekeeper_up=True, maps=(MapView("levels", 101, 4096),))  # fmt: skip
