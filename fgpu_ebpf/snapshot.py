"""The state of the host at one moment: all that status, metrics and pages show, as frozen data classes.

`agent.snapshot_builder` builds it; `api` and `cli` use it. Units stand in the names; None is a number that was not
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Refusal:
    """Number of refusals of an operation, and their reason."""

    operation: str
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class Shortfall:
    """Ratio of a device's time by which a tenant that wants it got less than is due to it in ten seconds, and why."""

    ratio: float
    why: str


@dataclass(frozen=True, slots=True)
class ComputeView:
    """A tenant's share of one device's time, and its use. `had` and `entitled` are of the last half second.

    `free`: it shares the device with no other tenant and has no ceiling, so nothing is measured. `waiting_seconds`
    None: it is not waiting. `beyond_ratio`: the part of the device's time that it ran outside its turns, by NVML, of
    ten seconds.
    """

    limit_ratio: float
    weight: int
    priority: str
    owned_seconds: float
    waits: int
    wait_seconds: float
    throttled: int
    overruns: int
    is_owner: bool
    had_ratio: float
    entitled_ratio: float
    free: bool
    waiting_seconds: float | None
    beyond_ratio: float | None = None
    shortfall: Shortfall | None = None  # it got what is due to it, or does not want more


@dataclass(frozen=True, slots=True)
class TenantDevice:
    """A tenant's memory on one device, and its share of the device's time: None, it is not gated."""

    gpu: int
    limit_bytes: int
    used_bytes: int
    peak_bytes: int
    refused: int
    admitted_bytes: int
    witnessed_bytes: int
    drift_bytes: int | None
    refusals: tuple[Refusal, ...] = ()
    compute: ComputeView | None = None
    orphaned_bytes: int = 0  # of used_bytes: of processes that have ended, or that exported and freed it
    unwitnessed_bytes: int = 0  # of used_bytes: allocated by no call that a probe has seen


@dataclass(frozen=True, slots=True)
class ProcessView:
    """A process on one device; `pid` is the host's. `how`: in what way it bypasses the shim; empty: it does not.

    `why`: the reason why it has no shim (`driver.bypass_reason`); empty: it has one, or the reason is unknown.
    """

    pid: int
    gpu: int
    bytes: int
    how: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class UnmanagedView:
    """A process outside tenants that holds memory of a device; `bytes` None: NVML does not report how much."""

    pid: int
    bytes: int | None


@dataclass(frozen=True, slots=True)
class OrphanView:
    """Bytes on one device that stay charged after process `pid` has released them, for `seconds` now.

    `ended`: the process has ended, or executed another program; otherwise it exported the bytes and freed them.
    `keepers`: processes that have descriptors of the driver open and may keep the memory; empty: none was found.
    `parents`: the parent pids of `keepers`, in the same order; 0: unknown.
    """

    pid: int
    gpu: int
    bytes: int
    seconds: float
    ended: bool
    keepers: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TenantView:
    """A managed cgroup; `kind` is tenant, group, or gone: the cgroup was removed and memory of it is still held.

    `denied`: why it gets nothing although a policy gives it some.
    """

    tenant: str
    kind: str
    path: str
    cgroup: int
    source: str
    policy: str
    namespace: str
    pod: str
    container: str
    enforcement: str
    denied: str
    notes: tuple[str, ...]
    labels: Mapping[str, str]
    bypassing: Mapping[str, int]
    devices: tuple[TenantDevice, ...]
    processes: tuple[ProcessView, ...]
    shimless: Mapping[str, int] = field(default_factory=dict)  # processes by the reason
    orphans: tuple[OrphanView, ...] = ()


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
    slices: SlicesView | None = None
    owner: str | None = None  # the tenant whose turn it is
    reconcile_age_seconds: float | None = None  # since NVML answered for it
    unmanaged_processes: int | None = None
    xids: Mapping[int, int] | None = None  # counts by XID since the agent began; None: NVML does not report them
    ignored_xids: int = 0  # how many of them are errors of programs
    fatal_xid: int | None = None  # the XID after which no share of the device is offered; None: there was none
    orphaned_bytes: int = 0
    unexplained_bytes: int | None = None  # in use, and of no process, orphan or known reserve; None: unknown
    unmanaged_by: tuple[UnmanagedView, ...] = ()


@dataclass(frozen=True, slots=True)
class SlicesView:
    """Turns on one device, as the gatekeeper counts them: drains as numbers up to each bound, and longer."""

    switches: int
    overruns: int
    drain_seconds: float
    bounds_seconds: tuple[float, ...]
    drains: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PoliciesView:
    """The last reading of the policy files; `loaded_seconds` since the epoch is that of the last good one.

    `unsaved`: why the set in force is not stored on disk for the next start; empty: it is.
    """

    good: bool
    loaded_seconds: float
    count: int
    faults: tuple[str, ...]
    unsaved: str = ""


@dataclass(frozen=True, slots=True)
class EngineView:
    """A container engine that is asked for labels: `waiting` containers have no answer yet; the rest counts questions.

    `fault`: why the last question failed; empty: it did not.
    """

    name: str
    path: str
    is_there: bool
    fault: str
    waiting: int
    found: int
    unknown: int
    failed: int


@dataclass(frozen=True, slots=True)
class LibraryView:
    """A driver that processes map and that is not the host's own; `digest` is empty until its contents have been read.

    `role`: listed or unknown. `tenant`: of one of the processes; empty: it is in none.
    """

    path: str
    digest: str
    role: str
    tenant: str
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MapView:
    """A table that all tenants share: `entries` of it are taken or reserved for a workload, of at most `most`."""

    name: str
    entries: int
    most: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The host at one moment; `time_seconds` since the epoch, `taken_seconds` the same on the monotonic clock."""

    time_seconds: float
    devices: tuple[DeviceView, ...] = ()
    tenants: tuple[TenantView, ...] = ()
    anomalies: Mapping[str, int] = field(default_factory=dict)
    gatekeeper: Mapping[str, Any] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=dict)  # sent, and lost by reason
    policies: PoliciesView | None = None
    probe_hits: Mapping[str, int] = field(default_factory=dict)
    engines: tuple[EngineView, ...] = ()
    libraries: tuple[LibraryView, ...] = ()
    trusted: tuple[str, ...] = ()  # digests that agent.yaml lists
    writes_refused: int = 0  # requests on the control socket without permission
    failures: int = 0  # errors of the agent's own code that it has survived
    taken_seconds: float = 0.0
    reconcile_failure: str = ""
    unenforced: str = ""  # why no limit is in force; empty: limits are in force
    incomplete: str = ""  # why it is unknown whether all that was asked for is in force; empty: it is
    gatekeeper_up: bool | None = None
    lacks: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # beside enforcement: what is missing, its fix
    maps: tuple[MapView, ...] = ()


def plain(view: Any) -> dict[str, Any]:
    """Return a view's fields for json.dumps(…, default=plain); copies nothing, as dataclasses.asdict would."""
    return {name: getattr(view, name) for name in view.__slots__}


class Fields(Mapping[str, Any]):
    """A view that is read like its JSON; only fields that are read are converted."""

    __slots__ = ("_view",)

    def __init__(self, view: Any) -> None:
        self._view = view

    def __getitem__(self, name: str) -> Any:
        """Return a field as JSON has it. Raises KeyError: there is no such field."""
        try:
            return _read(getattr(self._view, name))
        except AttributeError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._view.__slots__)

    def __len__(self) -> int:
        return len(self._view.__slots__)


_VIEWS = frozenset({
    Refusal, ComputeView, TenantDevice, ProcessView, OrphanView, TenantView, DeviceView, SlicesView, PoliciesView,
    EngineView, LibraryView, MapView, UnmanagedView,
})  # fmt: skip


def _read(value: Any) -> Any:
    if type(value) is tuple:
        return [_read(part) for part in value]
    return Fields(value) if type(value) in _VIEWS else value


def no_limit(snapshot: Mapping[str, Any]) -> str:
    """Return what a reader must know before all other parts of a Snapshot's JSON; empty: limits are in force."""
    if snapshot["unenforced"]:
        return f"No limit is enforced: {snapshot['unenforced']}"
    incomplete = snapshot.get("incomplete")  # an agent of an older version does not say so
    return f"Not all is in force: {incomplete}" if incomplete else ""
