"""The memory of this process, C library's and Python's, so that what is freed goes back to the system, for months.

Owns: three settings of the C library, what is taken ahead, and when both are asked to. Never: limits it. When it fails:
a C library that knows none of this goes on without.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of <malloc.h>
_LARGE_BYTES = 128 << 10  # what it is at first
_SMALL_BYTES, _STAYS_EVERY_BYTES = 400, 256 << 10  # of what is taken ahead
# For whoever starts agent or gatekeeper, since the C library reads it when a process begins, and never later: no thread
# keeps for itself what it has freed, up to seven of each of 64 sizes, which a thread comes to have within some days:
# a quarter of a megabyte, and whatever page a piece of that lies on; and of a thread that has ended nothing is left,
# else as many stacks are as ever were in use at one time. The units and the chart say the same.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.pthread.stack_cache_size=0"}
_stays: list[bytes] = []
_libc = ctypes.CDLL(None)


def keep_small() -> None:
    """To be called before there are threads.

    All of them share one arena. Else as many as ever allocate at one time (a scrape, a request) leave one behind each,
    of half a megabyte, up to eight for a processor. And what is large stays a mapping of its own: the first of those
    that is freed would make all of its size parts of the heap, which leave holes there.
    """
    with contextlib.suppress(AttributeError):
        mallopt = _libc.mallopt
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def settle(ahead_bytes: int) -> None:
    """To be called once all is there that stays: the collector of cycles looks at it no more.

    So it has little to look at, and does so soon: else it waits until a quarter as much as all of that has come. And
    so much is had for small objects at once: Python gives none of it back but by the mebibyte, in each of which
    something comes to lie that stays, and a process would grow with each moment that is greater than all before.
    """
    gc.collect()
    gc.freeze()
    taken = [bytes(_SMALL_BYTES) for _ in range(ahead_bytes // _SMALL_BYTES)]
    _stays.extend(taken[:: _STAYS_EVERY_BYTES // _SMALL_BYTES])


def give_back() -> None:
    """Cycles that nobody holds, patterns of policies that are gone (`re` keeps the last 512 that it compiled), and each
    whole page that nothing lies on, also in the middle of the heap; to be called now and then.

    By itself only the heap's end is given back, and one small block there keeps all the rest.
    """
    re.purge()
    gc.collect()
    with contextlib.suppress(AttributeError):
        _libc.malloc_trim(0)
