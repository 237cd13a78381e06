"""The state of the host at one moment, as frozen data classes, which commands, metrics and the web page show.

The agent's main thread makes a Snapshot. Any thread may read the Snapshot, and commands read its JSON form. Names of
fields contain the unit. A number that was not measured is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Refusal:
    """The number of refusals of one operation for one reason."""

    operation: str
    reason: str
    count: int


@dataclass(frozen=True, slots=True)
class Shortfall:
    """The time of a device in the last ten seconds that was due to a busy tenant and that the tenant did not get.

    `ratio`: the part of the device's time. `why`: the reason, as text.
    """

    ratio: float
    why: str


@dataclass(frozen=True, slots=True)
class ComputeView:
    """A tenant's share of one device's time, and the part of that time that the tenant had.

    `had_ratio` and `entitled_ratio` cover the last half second. `free`: the tenant has no turns and is not measured,
    because it is alone without a ceiling, or runs beside others (`is_concurrent`). `waiting_seconds`: how long it has
    waited for a turn, or None. `beyond_ratio`: the part of the last ten seconds in which the tenant's kernels ran, by
    NVML's samples, minus the part that the tenant owned. `shortfall`: None if the tenant got its time or was not busy.
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
    is_concurrent: bool = False


@dataclass(frozen=True, slots=True)
class UsageView:
    """The use of one device by a tenant since the agent's start, as far as one source has measured it.

    `source`: `turns`, `nvml` (a sample), or `none` if the device's time is unknown. `held_seconds`: the time for which
    the tenant had memory on the device. `idle_seconds`: the sum of the measured intervals with < 1 % of use.
    """

    source: str
    run_seconds: float
    memory_byte_seconds: float
    held_seconds: float
    idle_seconds: float


@dataclass(frozen=True, slots=True)
class TenantDevice:
    """A tenant's memory on one device, and its share of the device's time.

    `compute`: None if the tenant is not gated. `limit_bytes`: 18446744073709551615 (2^64 - 1) if the tenant has no
    limit on the device. `drift_bytes`: bytes in the ledger minus bytes in the driver. `used_bytes` includes
    `orphaned_bytes` (of processes that have ended, or that have exported and freed the memory) and `unwitnessed_bytes`
    (not allocated by a call that a probe has recorded). `usage`: one entry for each source. `parked_bytes`: bytes of
    parked processes, on no device. The limit covers these bytes, but `used_bytes` does not include these bytes.
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
    parked_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ParkingView:
    """A tenant's parking since the agent's start.

    `state`: running, parking, parked, waiting (for room or for the parker, to be woken), waking or unknown (until the
    driver reports the state). `seconds`: the time in this state, or None. `why`: why the tenant waits, or why the state
    is unknown. `park_seconds` and `wake_seconds`: the sums of the times of the driver's copies. `after_seconds`: the
    idle time after which the policy parks the tenant. `idle_seconds`, `parked_in_seconds`: the idle time, the time
    until parking; None unless the tenant runs. `refused`: the reason for the last refusal.
    """

    state: str
    seconds: float | None
    why: str
    parks: int
    wakes: int
    park_seconds: float
    wake_seconds: float
    after_seconds: float | None = None
    idle_seconds: float | None = None
    parked_in_seconds: float | None = None
    refused: str = ""


@dataclass(frozen=True, slots=True)
class ProcessView:
    """A process on one device. `pid`: the pid on the host. `how`: the way in which the process bypasses the shim.

    `how` is empty if nothing is bypassed. `why`: why the process has no shim (`driver.bypass_reason`); empty if
    not known yet, or if the process has a shim. `loader`: the path of the dynamic loader, in quotes, if the loader is
    the reason. The process may have chosen the path. `parked_bytes`: bytes in host memory, not included in `bytes`.
    """

    pid: int
    gpu: int
    bytes: int
    how: str = ""
    why: str = ""
    loader: str = ""
    parked_bytes: int = 0


@dataclass(frozen=True, slots=True)
class UnmanagedView:
    """A process outside any tenant that holds memory of a device. `bytes`: None if NVML does not report the amount."""

    pid: int
    bytes: int | None


@dataclass(frozen=True, slots=True)
class OrphanView:
    """Orphaned bytes of process `pid` on one device. The bytes have been orphaned for `seconds`.

    `ended`: the process has ended or has executed another program. If False, the process has exported and freed the
    memory. `keepers`: processes that have descriptors of the driver open and may keep the memory; empty if no keeper
    was found. `parents`: the parent pid of each keeper, in the same order; 0 if the parent is unknown.
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
    """A managed cgroup. `kind`: `tenant`, `group`, or `gone` if the cgroup was removed while its memory is still held.

    `denied`: the reason why the tenant's limit is not in force on some device; empty if no device lacks the limit.
    `bypassing`: the number of processes for each way to bypass the shim. `shimless`: the number of processes without
    the shim for each reason. `labels`: the labels in `metricLabels` of policy and host. `opens_denied`: opens of the
    driver's device nodes by processes without the shim that were refused. `opens_would_deny`: opens that `onBypass:
    deny` would have refused. `parking`: None if the tenant was not parked since the agent's start.
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
    opens_denied: int = 0
    opens_would_deny: int = 0
    parking: ParkingView | None = None


@dataclass(frozen=True, slots=True)
class DeviceView:
    """A device of the host.

    `owner`: the tenant that has the turn. `reconcile_age_seconds`: the time since NVML last answered for the device.
    `xids`: the count of each XID since the agent's start; None if NVML does not report XIDs. `ignored_xids`: how many
    of these XIDs agent.yaml ignores; by default agent.yaml ignores the XIDs that programs cause. `fatal_xid`: the XID
    because of which no share of the device is offered, or None. `unexplained_bytes`: bytes in use that belong to no
    process, orphan or known reserve; None if unknown. `usable_bytes`: the capacity without the driver's reserve,
    against which `committed_bytes` counts. `sharing`: `turns` or `concurrent`.
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
    usable_bytes: int = 0
    sharing: str = "turns"


@dataclass(frozen=True, slots=True)
class SlicesView:
    """The gatekeeper's counts of the turns on one device.

    `lent_seconds`: the time for which all tenants of the device could launch at the same time. `drain_seconds`: the sum
    of all drains. `drains`: the number of drains in each interval that ends at one of `bounds_seconds`. The last item
    counts longer drains.
    """

    switches: int
    overruns: int
    drain_seconds: float
    bounds_seconds: tuple[float, ...]
    drains: tuple[int, ...]
    lent_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PoliciesView:
    """The last reading of the policy files. `good`: the reading had no error. `faults`: the errors of the reading.

    `loaded_seconds`: the time of the last reading without an error, since the epoch. `unsaved`: the reason why the set
    in force is not stored on disk for the next start; empty if the set is stored.
    """

    good: bool
    loaded_seconds: float
    count: int
    faults: tuple[str, ...]
    unsaved: str = ""


@dataclass(frozen=True, slots=True)
class EngineView:
    """A container engine from which the agent requests labels. `waiting`: the number of containers without an answer.

    `fault`: the reason why the last request failed; empty if the request succeeded, or if no container is requested.
    `found`, `unknown` and `failed`: the number of requests with this outcome.
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
    """A driver library that processes have mapped and that is not the host's own library.

    `digest`: empty until the contents of the file have been read. `role`: `listed` if the contents are trusted, because
    agent.yaml lists the digest or the host's driver has the same contents; else `unknown`. `tenant`: the tenant of one
    of the processes; empty if that process is in no tenant.
    """

    path: str
    digest: str
    role: str
    tenant: str
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MapView:
    """A table that all tenants share. `entries`: entries in use or reserved for a workload. `most`: the capacity."""

    name: str
    entries: int
    most: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The host at one moment: `time_seconds` since the epoch, `taken_seconds` on the monotonic clock.

    `unenforced`: the reason why no limit is in force; empty if limits are in force. `incomplete`: the reason why
    some requested limits may not be in force; empty if all of these limits are in force. `lacks`: the finding and the
    fix of each failed check that does not concern enforcement, by name. `trusted`: the digests that agent.yaml lists.
    `events`: the number of kernel events that were sent, and the numbers of lost events by reason. `writes_refused`:
    the number of requests on the control socket that lacked the permission to write. `failures`: the number of internal
    errors after which the agent continued. `gatekeeper`: the gatekeeper's counters for reports, whose names may change.
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
    """Return a view's fields by name, for json.dumps(…, default=plain). Unlike asdict(), plain() copies no value."""
    return {name: getattr(view, name) for name in view.__slots__}


class Fields(Mapping[str, Any]):
    """A mapping with the contents of a view's JSON. A field is converted at the time of reading."""

    __slots__ = ("_view",)

    def __init__(self, view: Any) -> None:
        self._view = view

    def __getitem__(self, name: str) -> Any:
        """Return a field in its JSON form. Raise KeyError if the view has no field with this name."""
        try:
            return _read(getattr(self._view, name))
        except AttributeError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._view.__slots__)

    def __len__(self) -> int:
        return len(self._view.__slots__)


_VIEWS = frozenset({
    Refusal, Shortfall, ComputeView, ParkingView, TenantDevice, ProcessView, OrphanView, TenantView, DeviceView,
    SlicesView, PoliciesView, EngineView, LibraryView, MapView, UnmanagedView, UsageView,
})  # fmt: skip


def _read(value: Any) -> Any:
    if type(value) is tuple:
        return [_read(part) for part in value]
    return Fields(value) if type(value) in _VIEWS else value
