"""The ledger's pinned maps, as the agent writes and everybody reads them.

Owns: what each map's keys and values mean. Never: decides a limit, or adds to `used`: BPF programs alone do, one of
them (`adjust`) on the agent's word. On failure: LedgerMissing before the loader has run; OSError of bpf(2) else.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fgpu_ebpf import bpf, pages

PINS = Path(f"/sys/fs/bpf/fgpu/v{pages.LAYOUT}")
_U64 = struct.Struct("Q")
_U32 = struct.Struct("I")
_ALLOCATION_KEY = ctypes.sizeof(pages.AllocationKey)
_ALLOCATION = ctypes.sizeof(pages.Allocation)
_PROCESS = ctypes.sizeof(pages.Process)
_THREAD = ctypes.sizeof(pages.Thread)
_LIMIT = struct.Struct("QQ")
_LIMIT_KEY = struct.Struct("QQ")
_COUNTER_KEY = struct.Struct("QIHH")
_FILE = struct.Struct("QQ")
_DEVICE = ctypes.sizeof(pages.Device)
_ZERO = _U32.pack(0)
HOST_EPOCH, HOST_FLAGS = 0, 1


class LedgerMissing(Exception):
    """The maps are not pinned: the loader has not run."""


@dataclass(frozen=True, slots=True)
class Usage:
    """One device of one level, in bytes; `refused` is a count."""

    limit: int
    used: int
    peak: int
    refused: int
    admitted: int
    witnessed: int


@dataclass(frozen=True, slots=True)
class Process:
    """What one process is charged, in bytes per ledger index."""

    generation: int
    levels: tuple[int, ...]
    flags: int
    changes: int
    quiet: bool
    bytes: tuple[int, ...]
    overhead: tuple[int, ...]
    managed: tuple[int, ...]
    pool: tuple[int, ...]
    contexts: tuple[int, ...]

    def witnessed(self, device: int) -> int:
        """Bytes that NVML should show for it, but for what NVML alone knows."""
        return self.bytes[device] - self.overhead[device] - self.managed[device]


@dataclass(frozen=True, slots=True)
class Count:
    """A counter's key: anomalies have cgroup 0 and the anomaly as reason."""

    cgroup: int
    device: int
    kind: int
    reason: int


def _process(raw: bytes) -> Process:
    p = pages.Process.from_buffer_copy(raw)
    levels = tuple(p.levels[: p.level_count])
    values = (tuple(p.bytes), tuple(p.overhead), tuple(p.managed), tuple(p.pool), tuple(p.contexts))
    return Process(p.generation, levels, p.flags, p.changes, p.begun == p.changes, *values)


class Ledger:
    """The pinned maps of one layout. Not for several threads at once, but for `processes` and `overhead`."""

    def __init__(self, pins: Path = PINS) -> None:
        self._adjust = -1
        self._maps: dict[str, int] = {}
        self._open_pages: dict[int, int] = {}
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._open(pins)
            undo.pop_all()

    def _open(self, pins: Path) -> None:
        try:
            for path in (pins / "maps").iterdir():
                self._maps[path.name] = bpf.pinned(path)
            self._adjust = bpf.pinned(pins / "programs" / "adjust")
        except FileNotFoundError as error:
            raise LedgerMissing(f"no ledger under {pins}: is `fgpu agent` running?") from error

    def close(self) -> None:
        """Closes every descriptor; what is pinned stays."""
        for fd in (*self._maps.values(), *self._open_pages.values(), self._adjust):
            if fd >= 0:
                os.close(fd)
        self._maps.clear()
        self._open_pages.clear()
        self._adjust = -1

    # -- tenants and groups

    def page_fd(self, cgroup: int) -> int | None:
        """A new descriptor of the level's usage page; the caller closes it."""
        raw = bpf.lookup(self._maps["pages"], _U64.pack(cgroup), 4)
        return None if raw is None else bpf.map_by_id(_U32.unpack(raw)[0])

    def page_missing(self, cgroup: int) -> bool:
        """The level has no page yet."""
        return bpf.lookup(self._maps["pages"], _U64.pack(cgroup), 4) is None

    def tenants(self) -> list[int]:
        """Cgroup ids of every level that has a page."""
        return [_U64.unpack(key)[0] for key, _ in bpf.items(self._maps["pages"], 8, 4)]

    def usage(self, cgroup: int) -> list[Usage] | None:
        """The level's page, one Usage per ledger index; None where it has none."""
        if cgroup not in self._open_pages:
            fd = self.page_fd(cgroup)
            if fd is None:
                return None
            self._open_pages[cgroup] = fd
        raw = bpf.lookup(self._open_pages[cgroup], _ZERO, ctypes.sizeof(pages.UsagePage))
        page = pages.UsagePage.from_buffer_copy(raw or b"")
        both = zip(page.devices, page.tallies, strict=True)
        return [Usage(u.limit, u.used, u.peak, u.refused, t.admitted, t.witnessed) for u, t in both]

    def limit(self, cgroup: int, device: int) -> int | None:
        """The level's limit on a device in bytes; None: the level may not use it."""
        raw = bpf.lookup(self._maps["limits"], _LIMIT_KEY.pack(cgroup, device), _LIMIT.size)
        return None if raw is None else int(_LIMIT.unpack(raw)[0])

    def set_limits(self, cgroup: int, limits: Mapping[int, int], flags: int = 0) -> None:
        """Puts a level's limits in force: bytes per ledger index; an index left out is denied.

        Makes the level's page where it has none. Charges stand in the page alone, so none is lost.
        """
        for device in range(pages.DEVICES):
            key = _LIMIT_KEY.pack(cgroup, device)
            if device in limits:
                bpf.update(self._maps["limits"], key, _LIMIT.pack(limits[device], flags))
            else:
                bpf.delete(self._maps["limits"], key)
        if self.page_missing(cgroup):
            self._make_page(cgroup, limits, flags)
        code = self._run(pages.Adjust.PUBLISH, cgroup)
        if code < 0:
            raise OSError(-code, f"adjust(publish): {os.strerror(-code)}")

    def _make_page(self, cgroup: int, limits: Mapping[int, int], flags: int) -> None:
        fd = bpf.create_array_page("fgpu_usage", ctypes.sizeof(pages.UsagePage))
        try:
            page = pages.UsagePage(version=pages.LAYOUT, cgroup=cgroup, flags=flags)
            for device, limit in limits.items():  # before it is seen: 0 would deny
                page.devices[device].limit = limit
            bpf.update(fd, _ZERO, bytes(page))
            bpf.update(self._maps["pages"], _U64.pack(cgroup), _U32.pack(fd))
            bpf.freeze(fd)
        finally:
            os.close(fd)

    def remove(self, cgroup: int) -> None:
        """Forgets a level: its page, limits and counters. Its processes must have been moved or be gone."""
        fd = self._open_pages.pop(cgroup, None)
        if fd is not None:
            os.close(fd)
        bpf.delete(self._maps["pages"], _U64.pack(cgroup))
        self.unresolve(cgroup)
        for device in range(pages.DEVICES):
            bpf.delete(self._maps["limits"], _LIMIT_KEY.pack(cgroup, device))
        for count in [c for c in self.counters() if c.cgroup == cgroup]:
            bpf.delete(self._maps["counters"], _COUNTER_KEY.pack(count.cgroup, count.device, count.kind, count.reason))

    # -- identity

    def resolved(self, cgroup: int) -> bool | None:
        """True: managed, False: unmanaged, None: the agent has not decided yet."""
        raw = bpf.lookup(self._maps["resolved"], _U64.pack(cgroup), 4)
        return None if raw is None else bool(_U32.unpack(raw)[0])

    def resolve(self, cgroup: int, managed: bool) -> None:
        """Says what a cgroup is. The epoch moves on, so that shims say hello again, unless this answers a new one."""
        before = self.resolved(cgroup)
        if before is managed:
            return
        bpf.update(self._maps["resolved"], _U64.pack(cgroup), _U32.pack(managed))
        if managed or before is not None:
            self._set_host(HOST_EPOCH, self.epoch() + 1)

    def forget(self, cgroup: int) -> None:
        """Deletes what was decided about an unmanaged cgroup that is gone: nobody needs to ask anew."""
        bpf.delete(self._maps["resolved"], _U64.pack(cgroup))

    def unresolve(self, cgroup: int) -> None:
        """Forgets a cgroup: who asks from it now is looked at anew."""
        if bpf.delete(self._maps["resolved"], _U64.pack(cgroup)):
            self._set_host(HOST_EPOCH, self.epoch() + 1)

    def unmanaged(self) -> list[int]:
        """Cgroup ids that were found to be unmanaged."""
        found = bpf.items(self._maps["resolved"], 8, 4)
        return [_U64.unpack(key)[0] for key, value in found if not _U32.unpack(value)[0]]

    def epoch(self) -> int:
        """Changes whenever `resolved` does."""
        return self._host(HOST_EPOCH)

    def settle(self) -> bool:
        """This kernel has no return probes: shims settle their admissions themselves."""
        return bool(self._host(HOST_FLAGS) & pages.ControlFlag.SETTLE)

    def _host(self, index: int) -> int:
        raw = bpf.lookup(self._maps["host"], _U32.pack(index), 8)
        return _U64.unpack(raw or bytes(8))[0]  # type: ignore[no-any-return]

    def _set_host(self, index: int, value: int) -> None:
        bpf.update(self._maps["host"], _U32.pack(index), _U64.pack(value))

    def file_known(self, dev: int, ino: int) -> bool:
        """The file is probed."""
        return bpf.lookup(self._maps["files"], _FILE.pack(dev, ino), 4) is not None

    def enter_file(self, dev: int, ino: int) -> None:
        """Records a file as probed."""
        bpf.update(self._maps["files"], _FILE.pack(dev, ino), _U32.pack(1))

    def forget_file(self, dev: int, ino: int) -> None:
        """The file is no longer probed."""
        bpf.delete(self._maps["files"], _FILE.pack(dev, ino))

    def forget_files(self) -> None:
        """No file is probed any more."""
        for key, _ in list(bpf.items(self._maps["files"], _FILE.size, 4)):
            bpf.delete(self._maps["files"], key)

    # -- devices

    def devices(self) -> list[tuple[int, bytes]]:
        """(ledger index, 16-byte UUID) of the host's devices."""
        found = []
        for index in range(pages.DEVICES):
            raw = bpf.lookup(self._maps["devices"], _U32.pack(index), _DEVICE) or bytes(_DEVICE)
            if any(raw[:16]):
                found.append((index, raw[:16]))
        return found

    def set_device(self, index: int, uuid: bytes) -> None:
        """Names the device at a ledger index."""
        device = pages.Device(uuid=(ctypes.c_uint8 * 16)(*uuid), index=index)
        bpf.update(self._maps["devices"], _U32.pack(index), bytes(device))

    def context_bytes(self, device: int) -> int:
        """What a new context on this device is charged until NVML says better."""
        raw = bpf.lookup(self._maps["contexts"], _U32.pack(device), 8)
        return _U64.unpack(raw or bytes(8))[0]  # type: ignore[no-any-return]

    def set_context_bytes(self, device: int, bytes_: int) -> None:
        """Enters the size of a context, as last measured."""
        bpf.update(self._maps["contexts"], _U32.pack(device), _U64.pack(bytes_))

    # -- processes

    def processes(self) -> dict[int, Process]:
        """All entries that are ready: tgid -> Process."""
        found = bpf.items(self._maps["processes"], 4, _PROCESS)
        entries = ((_U32.unpack(key)[0], _process(raw)) for key, raw in found)
        return {tgid: p for tgid, p in entries if p.generation}

    def process(self, tgid: int) -> Process | None:
        """One process's entry, or None."""
        raw = bpf.lookup(self._maps["processes"], _U32.pack(tgid), _PROCESS)
        return _process(raw) if raw else None

    def busy(self) -> set[int]:
        """Processes between an admission and what settles it, or in a call that is witnessed."""
        threads = bpf.items(self._maps["threads"], 8, _THREAD)
        entries = ((_U64.unpack(key)[0] >> 32, pages.Thread.from_buffer_copy(raw)) for key, raw in threads)
        return {tgid for tgid, thread in entries if thread.admission.bytes or thread.call.function}

    def overhead(self, tgid: int, generation: int, device: int, bytes_: int, changes: int) -> bool:
        """Sets what NVML alone knows of a process; False where it was charged or ended meanwhile: ask again."""
        return self._run(pages.Adjust.OVERHEAD, tgid, generation, device, bytes_, changes) == 0

    def move(self, tgid: int, generation: int, levels: tuple[int, ...]) -> bool:
        """Moves a process and its charges to other levels, leaf first; generation 0 adopts an unknown one."""
        return self._run(pages.Adjust.MOVE, tgid, generation, len(levels), *levels) == 0

    def reap(self, tgid: int, generation: int) -> bool:
        """Ends a process of whose end the kernel said nothing."""
        return self._run(pages.Adjust.REAP, tgid, generation) == 0

    def sweep(self) -> int:
        """Deletes allocations whose process or era is gone; answers how many."""
        processes, swept = self.processes(), 0
        for raw_key, _ in list(bpf.items(self._maps["allocations"], _ALLOCATION_KEY, _ALLOCATION, 1024)):
            key = pages.AllocationKey.from_buffer_copy(raw_key)
            owner = processes.get(key.tgid) or self.process(key.tgid)
            if owner is None or owner.generation != key.generation:
                swept += bpf.delete(self._maps["allocations"], raw_key)
        return swept

    def entries(self, name: str) -> int:
        """How many entries a map holds: for checks and tests."""
        sizes = {"allocations": (_ALLOCATION_KEY, _ALLOCATION), "processes": (4, _PROCESS), "threads": (8, _THREAD)}
        return sum(1 for _ in bpf.items(self._maps[name], *sizes[name], 1024))

    def counters(self) -> dict[Count, int]:
        """Refusals and anomalies, counted in the kernel."""
        found = bpf.items(self._maps["counters"], _COUNTER_KEY.size, 8)
        return {Count(*_COUNTER_KEY.unpack(key)): _U64.unpack(value)[0] for key, value in found}

    def _run(self, *arguments: int) -> int:
        """Runs `adjust`, which reads arguments that were not given as 0; answers 0 or -errno."""
        return bpf.run_raw_tracepoint(self._adjust, *arguments, *[0] * (12 - len(arguments)))
