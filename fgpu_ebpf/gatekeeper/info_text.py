"""The answer to `fgpu-info`: limits, use and share of time of the process's own cgroup, as text.

This module runs in the gatekeeper's main thread. The module reads the pages and map entries of the process's levels,
and stores nothing: a request creates no session, and does not count as the first use of a device. Errors are OSError.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Sequence

from fgpu_ebpf import abi
from fgpu_ebpf.ledger.ledger import Ledger

QUESTION = b"fgpu-info\n"  # sent instead of a hello; identical for all layouts of pages
REFUSED = "no memory: a limit of this container could not be put in force; `fgpu explain` on the host has the reason\n"
_RANKS = ("high", "normal", "low")
_NS = 1e9
_MILLIONTHS_OF_PERCENT = 10_000


def text(ledger: Ledger, cgroups: Iterable[int], devices: Iterable[tuple[int, bytes]], now_ns: int) -> str:
    """Return the lines that `fgpu-info` prints in a process's container.

    Args:
        ledger: the ledger.
        cgroups: the ids of the process's cgroup and of all enclosing cgroups, innermost first.
        devices: ledger index and UUID of the host's devices.
        now_ns: the current time of CLOCK_MONOTONIC.
    """
    pages = [page for cgroup in cgroups if (page := _page(ledger, cgroup))][-abi.LEVELS :]
    if not pages:
        return "no limit: no policy, share or command of fgpu applies to this container\n"
    found = [line for index, name in devices for line in _lines(ledger, pages, index, name, now_ns)]
    if any(page.flags & abi.LimitFlag.OBSERVE for page in pages):
        found.append("limits of this container are only observed: nothing is refused")
    return "".join(f"{line}\n" for line in found)


def _page(ledger: Ledger, cgroup: int) -> abi.UsagePage | None:
    """Return a copy of the level's usage page; None: the level has no page."""
    fd = ledger.page_fd(cgroup)
    if fd is None:
        return None
    try:
        with mmap.mmap(fd, abi.PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ) as page:
            return abi.UsagePage.from_buffer_copy(page)
    finally:
        os.close(fd)


def _lines(ledger: Ledger, pages: Sequence[abi.UsagePage], index: int, name: bytes, now_ns: int) -> Iterator[str]:
    usages, own = [page.devices[index] for page in pages], pages[0].devices[index]
    head, limit = f"gpu {index} {_uuid(name)}", min(usage.limit for usage in usages)
    if limit == abi.NO_LIMIT:
        yield f"{head}: no limit, used {_mib(own.used)}"
    elif limit == 0:
        yield f"{head}: limit 0, no allocation of this container fits"
        return
    else:
        free = min(max(0, usage.limit - usage.used) for usage in usages)
        yield f"{head}: limit {_mib(limit)}, used {_mib(own.used)}, free {_mib(free)}"
        if free < max(0, own.limit - own.used):
            yield "  the limit of a group around this container leaves less than the container's own limit"
    if any(page.flags & abi.uncommitted(index) for page in pages):
        yield "  not used so far: the limit counts against this device from the first use on"
    if own.refused:
        yield f"  refused so far: {own.refused}"
    for page in pages:
        if share := ledger.times.share(page.cgroup, index):
            ceiling = _percent(share.limit_millionths)
            yield f"  time: up to {ceiling}, weight {share.weight}, {_RANKS[share.rank]} priority"
            yield from _turn(ledger, page.cgroup, index, now_ns)
            return


def _turn(ledger: Ledger, cgroup: int, index: int, now_ns: int) -> Iterator[str]:
    """Yield the lines about a tenant's turns. The counters are at most half a second old."""
    turn = ledger.times.turn(cgroup, index)
    if turn is not None and turn.free > 1:
        yield "  turns: none; runs at the same time as other containers on this device"
        return
    if turn is None or turn.free:
        yield "  no other container shares the device's time now"
        return
    had, due = _percent(turn.had_millionths), _percent(turn.entitled_millionths)
    yield f"  turns: {had} of the last half second, entitled to {due}; waited {turn.wait_ns / _NS:.1f} s in total"
    if turn.since_ns:
        yield f"  waiting for its turn for {max(0, now_ns - turn.since_ns) / _NS:.1f} s"


def _uuid(name: bytes) -> str:
    """Return a device's UUID in the form that NVML prints, `GPU-5d1f0c1e-…`."""
    text = name.hex()
    return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _percent(millionths: int) -> str:
    return f"{millionths / _MILLIONTHS_OF_PERCENT:.0f}%"


def _mib(bytes_: int) -> str:
    """Return a size in the form that nvidia-smi prints."""
    return f"{bytes_ >> 20} MiB"
