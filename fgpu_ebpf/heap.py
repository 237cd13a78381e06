"""The C library's memory of this process, which all of its threads share.

Owns: that they share it. Never: limits it. When it fails: a C library that knows no arenas has none to share.
"""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8  # of <malloc.h>


def share_one_arena() -> None:
    """To be called before there are threads. Else as many of them as ever allocate at one time (a scrape, a request)
    leave an arena behind each, of half a megabyte, up to eight for a processor."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
