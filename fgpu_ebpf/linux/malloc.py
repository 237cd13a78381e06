"""Settings of the allocators of the C library and of Python, so that freed memory returns to the system.

The agent and the gatekeeper run for months. This module runs in the main threads of both processes. The calls of
mallopt() and malloc_trim() are left out if the C library does not have these functions.
"""

from __future__ import annotations

import contextlib
import gc
import re

from fgpu_ebpf.linux.libc import LIBC

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of <malloc.h>
_LARGE_BYTES = 128 << 10  # the C library's initial threshold
_SMALL_BYTES, _STAYS_EVERY_BYTES = 400, 256 << 10  # sizes of objects that settle() allocates, and of gaps
# The process that starts the agent or the gatekeeper must set these tunables, because the C library reads them only at
# process start. tcache_count=0: no thread keeps freed blocks. With the default, a thread keeps up to seven freed blocks
# of each of 64 sizes (within some days a quarter of a megabyte) and the pages that contain the blocks.
# stack_cache_size=0: the stack of an ended thread is unmapped. With the default, the process keeps as many stacks as it
# ever had threads at one time. The systemd units and the Helm chart set the same value.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.pthread.stack_cache_size=0"}
_stays: list[bytes] = []


def keep_small() -> None:
    """Set one arena and a fixed mmap threshold. The caller calls this function before other threads start.

    Without the first setting, the C library keeps an arena of half a megabyte for each thread that ever allocated
    memory at the same time as other threads (scrapes, requests), up to eight for each processor. With a fixed
    threshold, each large block is a mapping of its own. Without the second setting, the first large block that is freed
    raises the threshold, and later blocks leave holes in the heap.
    """
    with contextlib.suppress(AttributeError):
        mallopt = LIBC.mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def settle(ahead_bytes: int) -> None:
    """Freeze the existing objects, and allocate memory for small objects.

    The caller calls this function at the end of the start.

    The cyclic garbage collector does not visit frozen objects. Therefore a full collection is short, and is not delayed
    until the new objects are a quarter of the existing objects. Python returns memory of small objects in whole
    mebibytes. After some time each mebibyte contains a long-lived object, so a process would grow at each new peak. The
    allocation of `ahead_bytes` at once avoids this growth.
    """
    gc.collect()
    gc.freeze()
    taken = [bytes(_SMALL_BYTES) for _ in range(ahead_bytes // _SMALL_BYTES)]
    _stays.extend(taken[:: _STAYS_EVERY_BYTES // _SMALL_BYTES])


def give_back() -> None:
    """Free cycles, compiled patterns and all unused whole pages of the heap. The caller calls this function regularly.

    `re` keeps the last 512 patterns that it compiled, including patterns of removed policies. Without malloc_trim() the
    C library returns only the end of the heap, and one small block at the end keeps all memory before this block.
    """
    re.purge()
    gc.collect()
    with contextlib.suppress(AttributeError):
        LIBC.malloc_trim(0)
