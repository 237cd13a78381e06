"""The ctypes structures of the pages, messages and map values that several processes share.

The structures mirror bpf/fgpu.h; tests/unit/test_layout.py compares each structure with its C structure, offset by
offset. This module runs in every Python process of fgpu, in any thread, and has no state.

An assignment to a field writes one aligned word, so a reader in another process reads either the old or the new value.
`struct.pack_into` would write zeros first. Sizes are in bytes, times in nanoseconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import ctypes
from ctypes import Structure
from ctypes import c_int64 as s64
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64
from enum import IntEnum, IntFlag

LAYOUT = 3
PAGE_BYTES = 4096
DEVICES = 16
LEVELS, SHARED, OPENS = 4, 3, 2
DEPTH = 16  # the BPF programs search this many cgroups of a path for levels: the root of the hierarchy and 15 below it
OWNERS, OWNED, OWNED_ORPHANS = 4096, 4, 3
BOTH_LEVELS = 2 * LEVELS
VERDICTS, ROWS, PATH = 128, 128, 192
ENDS, TOLD_BYPASS, SEEN_DEVICE, PARKED, SEEN_CALLED = 65536, 64, 128, 256, 512
EVENT_BUDGETS, BUDGET_OTHERS, BUDGET_ROOT = 1024, 0, 1
FNV_BASIS, FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
KIND_MASK, FULL, TAGGED, PATIENT, KNOCK, FREED, ANNOUNCE, CALLED, LACKS = 0xFF, *(0x100 << bit for bit in range(8))
TICKET_BITS, TAG_SHIFT, TAG_BITS = 0xFFFFFFFF, 34, 0x3FFFFFFF
FUNCTION_MASK, CLASS_SHIFT, REASONS = 0xFF, 8, 8
HITS, HIT_ADMIT, HIT_GIVE_BACK = 32, 30, 31
NO_LIMIT = 2**64 - 1
MOST_BYTES = 1 << 48
LEASE_NS, BUDGET_NS, ROOM_NS, NO_ROOM = 2_000_000_000, 4_000_000, 5_000_000_000, 1
GATE_SHIFT, UNCOMMITTED_SHIFT, OUTSIDE_SHIFT, UNSEEN_SHIFT = 2, 16, 32, 16
MAGIC = 0x75706766
SOCKET_DIR = "/run/fgpu/shim"
SOCKET = SOCKET_DIR + "/shim.sock"

# The numbers are those of the header, from 0.
Verdict = IntEnum("Verdict", "REFUSED ADMITTED AGAIN UNLIMITED", start=0)
Kind = IntEnum("Kind", "MEMORY POOL CONTEXT HELLO VMM KINDS EVENTS", start=0)
Shared = IntEnum("Shared", "ALLOCATIONS THREADS PROCESSES", start=0)
Reason = IntEnum("Reason", "LIMIT DEVICE_FULL OBSERVED ENTRIES", start=0)
Anomaly = IntEnum("Anomaly", "RELEASE FULL DEVICE LOST BYPASS STALE", start=0)
Code = IntEnum("Code", "REFUSED MANAGED UNMANAGED", start=0)
Space = IntEnum("Space", "POINTER HANDLE MAPPING CONTEXT ARRAY", start=0)
Function = IntEnum(
    "Function",
    "NONE ALLOC ALLOC_MANAGED ALLOC_PITCH ARRAY ARRAY_3D ARRAY_MIPMAPPED CREATE MAP UNMAP RETAIN_HANDLE "
    "EXPORT EXPORT_POINTER RETAIN PRIMARY_RELEASE PRIMARY_RESET CONTEXT_V2 CONTEXT_V3 CONTEXT_V4 "
    "FREE RELEASE ARRAY_DESTROY DESTROY EXPORT_RANGE EXPORT_POOL IMPORT GREEN GREEN_DESTROY",
    start=0,
)
Class = IntEnum("Class", "HOST LISTED UNKNOWN", start=0)
Adjust = IntEnum(
    "Adjust",
    "PUBLISH OVERHEAD MOVE REAP DISOWN RAISE WITHDRAW SWEPT RING LET_GO MARK ENTER LOOKED OWN TRIM EXEMPT "
    "BEGIN_PARK PARK WAKE END_PARK ROOM FINISH_MOVE CONTEXT_SEEN CONTEXT_GONE",
    start=0,
)
News = IntEnum(
    "News",
    "PROCESS REFUSED BYPASS KILLED ORPHANED MOVED MADE EMPTIED REMOVED ENDED EXECUTED FIRST_USE KNOCK OPEN LACKS",
    start=0,
)
Fate = IntEnum("Fate", "SENT RATE FULL", start=0)

# LimitFlag is used in limits and usage pages, ControlFlag in control pages and answers, Seen in processes.
LimitFlag = IntFlag("LimitFlag", "OBSERVE KILL DENY WAITS")
ControlFlag = IntFlag("ControlFlag", "MANAGED MPS")
Gate = IntFlag("Gate", "OPEN GATED")  # the bits below GATE_SHIFT; the bits above are the number of the turn
Seen = IntFlag("Seen", "SHIM BYPASS EXPORT CALL POOL_EXPORT IMPORT")


def uncommitted(device: int) -> int:
    """Return the flag that marks a limit as not yet counted against this device."""
    return 1 << UNCOMMITTED_SHIFT << device


def limit(bytes_: int) -> int | None:
    """Return a limit of the ledger in bytes, or None for NO_LIMIT."""
    return None if bytes_ == NO_LIMIT else bytes_


class Usage(Structure):
    """One device on a usage page: the limit, the charged bytes, the peak of these bytes, and the number of refusals."""

    _fields_ = (("limit", u64), ("used", u64), ("peak", u64), ("refused", u64))


class Tally(Structure):
    """Two counters of bytes on one device: admitted bytes, and witnessed bytes. The counters only grow."""

    _fields_ = (("admitted", u64), ("witnessed", u64))


class UsagePage(Structure):
    """One level's limits and usage. The page is a frozen BPF map, which only BPF programs can write."""

    _fields_ = (
        ("version", u64),
        ("cgroup", u64),
        ("flags", u64),
        ("place", u64),
        ("spare", u64 * 4),
        ("devices", Usage * DEVICES),
        ("verdicts", u64 * VERDICTS),
        ("tallies", Tally * DEVICES),
        ("orphaned", u64 * DEVICES),
        ("event_second", u64),
        ("event_count", u64),
        ("process_second", u64),
        ("entries", u64 * SHARED),
        ("exec_second", u64),
        ("exec_count", u64),
        ("orphaned_ns", u64 * DEVICES),
        ("answers", u64 * VERDICTS),
        ("orphans", u64),
        ("urgent_second", u64),
        ("urgent_count", u64),
        ("looked_ns", u64 * DEVICES),
        ("owner", u64),
        ("undecided", u64 * DEVICES),
        ("crowded", u64),
        ("outside", u64 * DEVICES),
        ("freed_ns", u64),
        ("opens", u64 * OPENS),
        ("open_second", u64),
        ("open_count", u64),
        ("parked", u64 * DEVICES),
        ("held", u64),
        ("called_ns", u64),
        ("room_ns", u64 * DEVICES),
        ("tail", u64 * 20),
    )


class Device(Structure):
    """A device of a tenant. `index` is the device's index in the ledger."""

    _fields_ = (("uuid", u8 * 16), ("index", u32), ("spare", u32 * 3))


class Row(Structure):
    """One process of the tenant on one device. `pid` is valid in the pid namespace of the page's reader."""

    _fields_ = (("pid", u32), ("device", u32), ("bytes", u64))


class ControlPage(Structure):
    """The control page: the gatekeeper's decisions for one process."""

    _fields_ = (
        ("version", u32),
        ("flags", u32),
        ("boot", u8 * 16),
        ("heartbeat_ns", u64),
        ("epoch", u64),
        ("device_count", u32),
        ("tag", u32),
        ("spare", u32 * 4),
        ("devices", Device * DEVICES),
        ("gates", u32 * DEVICES),
        ("sequence", u32),
        ("row_count", u32),
        ("spare2", u64),
        ("rows", Row * ROWS),
        ("budget_ns", u64 * DEVICES),
        ("passes", u64 * DEVICES),
    )


class Status(Structure):
    """One device on a status page."""

    _fields_ = (("waiting", u32), ("drained", u32), ("launches", u64))


class Flight(Structure):
    """A process's work on one gated device."""

    _fields_ = (("in_flight", u64), ("busy_until_ns", u64), ("wanted_ns", u64), ("idle_ns", u64))


class Span(Structure):
    """The start and the end of a process's work in the last turn on one gated device."""

    _fields_ = (("begun_ns", u64), ("ended_ns", u64))


class StatusPage(Structure):
    """The status page: the reports of one process about itself. These reports are never trusted."""

    _fields_ = (
        ("version", u32),
        ("bell", u32),
        ("spare", u32 * 14),
        ("devices", Status * DEVICES),
        ("flights", Flight * DEVICES),
        ("spans", Span * DEVICES),
    )


class Hello(Structure):
    """The hello of a shim. No field identifies the process, because the kernel reports the peer of the socket."""

    _fields_ = (("magic", u32), ("version", u16), ("size", u16), ("boot", u8 * 16), ("flags", u32), ("spare", u32 * 9))


class Answer(Structure):
    """The gatekeeper's answer to a hello. The descriptors of the process's pages are sent with the answer."""

    _fields_ = (
        ("magic", u32), ("version", u16), ("size", u16), ("code", u32), ("levels", u32), ("devices", u32),
        ("flags", u32), ("epoch", u64), ("spare", u64 * 12),
    )  # fmt: skip


class LevelDevice(Structure):
    """The key of the map `limits`."""

    _fields_ = (("cgroup", u64), ("device", u64))


class Limit(Structure):
    """A value of the map `limits`."""

    _fields_ = (("bytes", u64), ("flags", u64))


class Owner(Structure):
    """A value of the map `owners`, by slot: a bound owner's entries in each shared map, and the maximum of entries."""

    _fields_ = (
        ("cgroup", u64), ("entries", u64 * OWNED), ("claimed", u64 * OWNED), ("most", u64 * OWNED),
        ("knock_second", u64), ("knock_count", u64), ("spare", u64),
    )  # fmt: skip


class Share(Structure):
    """A value of the map `shares`."""

    _fields_ = (("limit_millionths", u64), ("weight", u64), ("rank", u64), ("quantum_ns", u64))


class Turn(Structure):
    """A value of the map `turns`."""

    _names = "owned_ns waits wait_ns overruns switches throttled owner had_millionths entitled_millionths free since_ns"
    _fields_ = tuple((name, u64) for name in _names.split())


class FileKey(Structure):
    """The key of the map `files`."""

    _fields_ = (("dev", u64), ("ino", u64))


class Level(Structure):
    """A level of a process: the level's cgroup, and the slot of the usage page when the process entered the level."""

    _fields_ = (("cgroup", u64), ("place", u64))


class Holding(Structure):
    """The charges of a process on one device."""

    _fields_ = (
        ("bytes", u64),
        ("charged", s64 * 2),
        ("era", u32),
        ("openings", u32),
        ("vmm", u64),
        ("managed", u64),
        ("pool", u64),
        ("overhead", s64),
        ("contexts", u64),
        ("retained", u64),
        ("primary", u64),
        ("exported", u64),
        ("exported_vmm", u64),
        ("owed", u64),
        ("ended", u64),
        ("peak", u64),
    )


class Process(Structure):
    """A value of the map `processes`, by tgid."""

    _fields_ = (
        ("state", u64),
        ("generation", u64),
        ("changes", u64),
        ("begun", u64),
        ("turn", u64),
        ("moved_ns", u64),
        ("level_count", u32),
        ("flags", u32),
        ("last_device", u32),
        ("tag", u32),
        ("sides", Level * BOTH_LEVELS),
        ("levels", u64 * LEVELS),
        ("counted", Level),
        ("threads", s64),
        ("space", u64),
        ("devices", Holding * DEVICES),
    )


class AllocationKey(Structure):
    """The key of the map `allocations`."""

    _fields_ = (("tgid", u32), ("space", u32), ("generation", u64), ("handle", u64))


class Allocation(Structure):
    """A value of the map `allocations`."""

    _fields_ = (
        ("bytes", u64), ("device", u32), ("era", u32), ("references", u64), ("owner", u64), ("exported", u64),
        ("level", Level),
    )  # fmt: skip


class OrphanKey(Structure):
    """The key of the map `orphans`."""

    _fields_ = (("tgid", u32), ("device", u32), ("generation", u64), ("turn", u64))


class Orphan(Structure):
    """A value of the map `orphans`: bytes that stay charged after the process has ended or freed these bytes."""

    _fields_ = (("bytes", u64), ("since_ns", u64), ("ended_ns", u64), ("spare", u64), ("levels", Level * LEVELS))


class ParkedKey(Structure):
    """The key of the map `parked`."""

    _fields_ = (("tgid", u32), ("spare", u32), ("generation", u64))


class Parked(Structure):
    """A value of the map `parked`: bytes of a process, which no device holds."""

    _fields_ = (("since_ns", u64), ("level", Level), ("bytes", u64 * DEVICES), ("spare", u64))


class Admission(Structure):
    """An admission that no driver call has settled yet. `ticket` is 0 if there is no unsettled admission."""

    _fields_ = (("ticket", u64), ("bytes", u64), ("device", u32), ("kind", u32), ("verdict", u64))


class Call(Structure):
    """The driver call that a thread is in. `function` is 0 if the thread is in no driver call."""

    _fields_ = (
        ("function", u64), ("arguments", u64 * 3), ("bytes", u64), ("device", u32), ("admitted", u32),
        ("references", u64), ("exported", u64), ("uncovered", u64),
    )  # fmt: skip


class Thread(Structure):
    """A value of the map `threads`."""

    _fields_ = (("admission", Admission), ("call", Call), ("open", u64))


class CounterKey(Structure):
    """The key of the map `counters`."""

    _fields_ = (("cgroup", u64), ("device", u32), ("kind", u16), ("reason", u16))


class Event(Structure):
    """A rare event that the kernel reports to the agent immediately."""

    _fields_ = (
        ("at_ns", u64), ("kind", u32), ("tgid", u32), ("cgroup", u64), ("bytes", u64),
        ("device", u32), ("operation", u16), ("reason", u16),
    )  # fmt: skip


class CgroupEvent(Structure):
    """An Event of a cgroup. `path` has at most PATH bytes. A longer path is cut off."""

    _fields_ = (("event", Event), ("path", ctypes.c_char * PATH))


class EventBudget(Structure):
    """A value of the map `event_budgets`."""

    _fields_ = (("second", u64), ("count", u64), ("lost", u64))
