"""Sparse arrays: when the memory that is mapped into their tiles is freed, and which mappings are refused.

conformance_arrays.c has the results that were measured on a card.
"""

from __future__ import annotations

import pytest

from .conftest import Machine

ARRAY = """
import struct
MAP, UNMAP, POOL = 1, 2, 1
def array(width=512, height=512, depth=0, format_=0x20, channels=4):
    out, shape = C.c_void_p(), struct.pack("3Q3I4x", width, height, depth, format_, channels, 0x40)
    result = L.cuArray3DCreate_v2(C.byref(out), shape)
    return out.value or -result
def pool(size=4 << 20, usage=POOL):  # 512 x 512 elements of 16 bytes
    out, prop = C.c_uint64(), struct.pack("4IQ2xH4x", 1, 0, 1, 0, 0, usage)
    need("cuMemCreate", C.byref(out), C.c_size_t(size), prop, C.c_uint64(0))
    return out.value
def change(to, operation, handle=0, x=0, y=0, width=512, height=512, z=0, depth=1, offset=0, mask=1, kind=0):
    part = (0, 0, x, y, z, width, height, depth)
    info = struct.pack("I4xQI4x8I2I2Q4I", kind, to, 0, *part, operation, 0, handle, offset, mask, 0, 0, 0)
    return L.cuMemMapArrayAsync(info, 1, None)
def taken():
    return (before - info()[0]) >> 20
start()
before = info()[0]
"""


def test_memory_stays_until_its_last_tile_is_unmapped(machine: Machine) -> None:
    script = """
a, first, second = array(), pool(), pool()
say(change(a, MAP, first), change(a, MAP, second, height=64), taken())
L.cuMemRelease(C.c_uint64(second))
say(taken(), change(a, UNMAP, height=64, width=448), taken(), change(a, UNMAP, height=64, x=448, width=64), taken())
L.cuMemRelease(C.c_uint64(first))
say(change(a, MAP, pool(), height=256), taken(), change(a, MAP, pool(), y=256, height=256), taken())
"""
    assert machine.python(ARRAY + script) == ["0 0 8", "8 0 8 0 4", "0 8 0 8"]
    machine.settles_at(0)


@pytest.mark.parametrize("end", ["L.cuArrayDestroy(C.c_void_p(a))", "L.cuDevicePrimaryCtxReset_v2(0); start()", ""])
def test_mapped_memory_is_freed_with_its_array_context_or_process(machine: Machine, end: str) -> None:
    script = (
        f"a, p = array(), pool(); say(change(a, MAP, p), L.cuMemRelease(C.c_uint64(p)), taken()); {end}\nsay(taken())"
    )
    assert machine.python(ARRAY + script) == ["0 0 4", "0" if end else "4"]
    machine.settles_at(0)


def test_changes_that_are_no_whole_tiles_of_a_sparse_array_or_have_no_tile_pool_are_refused(machine: Machine) -> None:
    script = """
a, small, plain, p = array(500, 100), pool(2 << 20), pool(usage=0), pool()
say(change(a, MAP, p, width=500, height=100), change(a, UNMAP, width=500, height=100))
b = array()
for wrong in (dict(x=1), dict(width=65), dict(width=0), dict(height=576), dict(x=512, width=64), dict(z=1),
              dict(depth=2), dict(mask=2), dict(kind=1), dict(handle=plain), dict(handle=small), dict(handle=0),
              dict(offset=64 << 10), dict(offset=1 << 63), dict(operation=3), dict(operation=UNMAP, handle=p)):
    say(change(b, **{"operation": MAP, "handle": p, **wrong}))
say(change(0, MAP, p), L.cuMemMapArrayAsync(None, 1, None), L.cuMemMapArrayAsync(None, 0, None), taken())
say(array(depth=2), array(height=0), array(format_=1), array(channels=2), array(width=0), array(channels=3))
"""
    said = machine.python(ARRAY + script)
    assert said == ["0 0", *["1"] * 16, "1 1 1 10", "-801 -801 -801 -801 -1 -1"]
    machine.settles_at(0)
