"""One look at the host: all that status, metrics and pages show. Frozen; no I/O.

Units stand in the names; None is a number that nobody measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Refusal:
    """How often an operation was refused, and why."""

    operation: str
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class TenantDevice:
    """A tenant's memory on one device."""

    gpu: int
    limit_bytes: int
    used_bytes: int
    peak_bytes: int
    refused: int
    admitted_bytes: int
    witnessed_bytes: int
    drift_bytes: int | None
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class ProcessView:
    """A process on one device; `pid` is the host's."""

    pid: int
    gpu: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Tenant:
    """A managed cgroup; `kind` is tenant or group."""

    tenant: str
    kind: str
    path: str
    cgroup: int
    enforcement: str
    bypassing: int
    devices: tuple[TenantDevice, ...]
    processes: tuple[ProcessView, ...]


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device of the host."""

    index: int
    uuid: str
    name: str
    pci_bus_id: str
    capacity_bytes: int
    used_bytes: int | None
    committed_bytes: int
    unmanaged_bytes: int | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The host at one moment; `time_seconds` since the epoch."""

    time_seconds: float
    devices: tuple[DeviceView, ...] = ()
    tenants: tuple[Tenant, ...] = ()
    anomalies: Mapping[str, int] = field(default_factory=dict)
    reconcile_age_seconds: float | None = None
    gatekeeper: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)
