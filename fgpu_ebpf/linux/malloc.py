"""Settings of the allocators of the C library and of Python, so that freed memory goes back to the system.

The agent and the gatekeeper run for months. They use this module in their main threads. A C library without these
functions is left as it is.
"""

from __future__ import annotations

import contextlib
import gc
import re

from fgpu_ebpf.linux.libc import LIBC

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of <malloc.h>
_LARGE_BYTES = 128 << 10  # the C library's first threshold
_SMALL_BYTES, _STAYS_EVERY_BYTES = 400, 256 << 10  # sizes of the objects that settle() allocates and of their gaps
# For the process that starts the agent or the gatekeeper: the C library reads it at the start of a process only.
# tcache_count=0: no thread keeps freed blocks. It would keep up to seven of each of 64 sizes, which a thread reaches
# within some days: a quarter of a megabyte, and the pages that the blocks lie on. stack_cache_size=0: the stacks of
# ended threads are unmapped; otherwise as many stay as threads ever lived at one time. The units and the chart set the
# same.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.pthread.stack_cache_size=0"}
_stays: list[bytes] = []


def keep_small() -> None:
    """Set one arena and a fixed mmap threshold; to be called before there are threads.

    With an arena for each thread, as many arenas as threads ever allocate at one time (scrapes, requests) stay behind,
    half a megabyte each, up to eight for each processor. With a fixed threshold, large blocks stay mappings of their
    own. Otherwise the first of them that is freed raises the threshold, and later ones leave holes in the heap.
    """
    with contextlib.suppress(AttributeError):
        mallopt = LIBC.mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def settle(ahead_bytes: int) -> None:
    """Freeze the objects that exist and allocate memory for small objects; to be called at the end of the start.

    Frozen objects are not visited by the cyclic garbage collector, so it has little to visit and runs soon;
    otherwise it waits until a quarter as many new objects exist. Python gives memory of small objects back in whole
    mebibytes, and long-lived objects come to lie in each of them, so a process would grow at each new peak.
    Allocating `ahead_bytes` at once avoids that.
    """
    gc.collect()
    gc.freeze()
    taken = [bytes(_SMALL_BYTES) for _ in range(ahead_bytes // _SMALL_BYTES)]
    _stays.extend(taken[:: _STAYS_EVERY_BYTES // _SMALL_BYTES])


def give_back() -> None:
    """Free cycles, compiled patterns and all unused whole pages of the heap; to be called now and then.

    `re` keeps the last 512 patterns that it compiled, also of policies that are gone. Without malloc_trim() the C
    library gives back the end of the heap only, and one small block there keeps all the rest.
    """
    re.purge()
    gc.collect()
    with contextlib.suppress(AttributeError):
        LIBC.malloc_trim(0)
