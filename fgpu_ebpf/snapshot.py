"""The state of the host at one moment: all that status, metrics and pages show, as frozen data classes.

`agent.snapshot_builder` builds it; `api` and `cli` use it. Names contain the units; None is a number that was not
measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

RELEASED = "released devices"  # the name of the finding that the agent has released the devices


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
    ten seconds. `shortfall` None: it got what is due to it, or does not want more.
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
    shortfall: Shortfall | None = None


@dataclass(frozen=True, slots=True)
class UsageView:
    """The use of one device by a tenant since the agent's start, as far as one source has measured its time.

    `source`: turns, nvml (a sample), or none: the device's time is unknown. `held_seconds`: with memory there;
    `idle_seconds`: the part of it without running anything.
    """

    source: str
    run_seconds: float
    memory_byte_seconds: float
    held_seconds: float
    idle_seconds: float


@dataclass(frozen=True, slots=True)
class TenantDevice:
    """A tenant's memory on one device, and its share of the device's time: None, it is not gated.

    `limit_bytes` 18446744073709551615 (2^64 - 1): it has no limit there. `drift_bytes`: the ledger minus the driver.
    Parts of `used_bytes` are `orphaned_bytes` (of processes that have ended, or that exported and freed it) and
    `unwitnessed_bytes` (allocated by no call that a probe has seen). `usage`: by source.
    """

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
    orphaned_bytes: int = 0
    unwitnessed_bytes: int = 0
    usage: tuple[UsageView, ...] = ()


@dataclass(frozen=True, slots=True)
class ProcessView:
    """A process on one device; `pid` is the host's. `how`: in what way it bypasses the shim; empty: it does not.

    `why`: the reason why it has no shim (`driver.bypass_reason`); empty: it has one, or the reason is unknown.
    `loader`: the path of its loader, in quotes, if that is the reason; the process can have chosen it.
    """

    pid: int
    gpu: int
    bytes: int
    how: str = ""
    why: str = ""
    loader: str = ""


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

    `denied`: why it gets nothing although a policy gives it some. `bypassing`: processes by how they bypass the shim;
    `shimless`: processes without the shim by the reason. `labels`: those that the policy's `metricLabels` name.
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
    shimless: Mapping[str, int] = field(default_factory=dict)
    orphans: tuple[OrphanView, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device of the host.

    `owner`: the tenant whose turn it is. `reconcile_age_seconds`: since NVML answered for it. `xids`: counts by XID
    since the agent began; None: NVML does not report them; `ignored_xids`: how many of them are errors of programs;
    `fatal_xid`: the XID after which no share of the device is offered; None: there was none. `unexplained_bytes`: in
    use, and of no process, orphan or known reserve; None: unknown.
    """

    index: int
    uuid: str
    name: str
    pci_bus_id: str
    capacity_bytes: int
    used_bytes: int | None
    committed_bytes: int
    unmanaged_bytes: int | None
    slices: SlicesView | None = None
    owner: str | None = None
    reconcile_age_seconds: float | None = None
    unmanaged_processes: int | None = None
    xids: Mapping[int, int] | None = None
    ignored_xids: int = 0
    fatal_xid: int | None = None
    orphaned_bytes: int = 0
    unexplained_bytes: int | None = None
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
    """The host at one moment; `time_seconds` since the epoch, `taken_seconds` the same on the monotonic clock.

    `unenforced`: why no limit is in force; empty: limits are in force. `incomplete`: why it is unknown whether all that
    was asked for is in force; empty: it is. `lacks`: what is missing beside enforcement, and its fix. `trusted`:
    digests that agent.yaml lists. `events`: of the kernel, sent, and lost by reason. `writes_refused`: requests on the
    control socket without permission. `failures`: errors of the agent's own code that it has survived. `gatekeeper`:
    the gatekeeper's own counters, for reports; their names may change.
    """

    time_seconds: float
    devices: tuple[DeviceView, ...] = ()
    tenants: tuple[TenantView, ...] = ()
    anomalies: Mapping[str, int] = field(default_factory=dict)
    gatekeeper: Mapping[str, Any] = field(default_factory=dict)
    events: Mapping[str, int] = field(default_factory=dict)
    policies: PoliciesView | None = None
    probe_hits: Mapping[str, int] = field(default_factory=dict)
    engines: tuple[EngineView, ...] = ()
    libraries: tuple[LibraryView, ...] = ()
    trusted: tuple[str, ...] = ()
    writes_refused: int = 0
    failures: int = 0
    taken_seconds: float = 0.0
    reconcile_failure: str = ""
    unenforced: str = ""
    incomplete: str = ""
    gatekeeper_up: bool | None = None
    lacks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
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
    EngineView, LibraryView, MapView, UnmanagedView, UsageView,
})  # fmt: skip


def _read(value: Any) -> Any:
    if type(value) is tuple:
        return [_read(part) for part in value]
    return Fields(value) if type(value) in _VIEWS else value


def no_limit(snapshot: Mapping[str, Any]) -> str:
    """Return what a reader must know before all other parts of a Snapshot's JSON; empty: limits are in force."""
    if snapshot["unenforced"]:
        return f"No limit is enforced: {snapshot['unenforced']}"
    if released := snapshot.get("lacks", {}).get(RELEASED):
        return f"Released devices: {released[0]}"
    incomplete = snapshot.get("incomplete")  # an agent of an older version does not say so
    return f"Not everything is in force: {incomplete}" if incomplete else ""
