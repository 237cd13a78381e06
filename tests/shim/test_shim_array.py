"""Arrays and the former 32-bit functions: the sizes that the shim requests for them."""

import pytest

from tests.shim.array_kit import ARRAYS
from tests.shim.shim_kit import Agent

MEMORY, POOL, HELLO, RELEASED = 0, 1, 3, 101
MIB, MOST = 1 << 20, 1 << 48
OOM = 2
U8, U16, U32, S8, S16, S32, HALF, FLOAT, NV12, BC7 = 1, 2, 3, 8, 9, 10, 16, 32, 0xB0, 0x9D
LAYERED, CUBEMAP, SPARSE, DEFERRED = 1, 4, 0x40, 0x80


def asked(held: Agent, call: str, kind: int = MEMORY) -> list[int]:
    held.python(ARRAYS + f"out({call})")
    assert not [c for c in held.calls() if c["kind"] not in (kind, HELLO)]
    return [c["bytes"] for c in held.calls(kind)]


@pytest.mark.parametrize(
    ("call", "bytes_"),
    [
        (f"two(1024, 1024, {FLOAT}, 1)", 4 * MIB),
        (f"two(1024, 0, {FLOAT}, 4)", 16384),  # one-dimensional
        (f"two(1000, 3000, {U8}, 1)", 4 * MIB),  # 3,000,000 bytes: whole granules
        (f"two(100, 1, {HALF}, 2)", 512),
        (f"two(1024, 1024, {S16}, 2)", 4 * MIB),
        (f"two(1024, 1024, {U16}, 4)", 8 * MIB),
        (f"two(1024, 1024, {S8}, 4)", 4 * MIB),
        (f"two(1024, 1024, {U32}, 2)", 8 * MIB),
        (f"two(1024, 1024, {S32}, 2)", 8 * MIB),
        (f"two(1024, 1024, {NV12}, 3)", 2 * MIB),  # 1.5 MiB: whole granules
        (f"two(2048, 1024, {BC7}, 4)", 2 * MIB),
        ("two(4096, 1024, 0x91, 4)", 2 * MIB),  # BC1
        ("two(4096, 1024, 0xFFFF, 4)", 2 * MIB),  # an unknown format counts as the smallest
        (f"three(256, 256, 64, {FLOAT}, 1, 0)", 16 * MIB),
        (f"three(1024, 1024, 6, {FLOAT}, 1, {CUBEMAP})", 24 * MIB),
        (f"three(1024, 1024, 0, {FLOAT}, 1, 2)", 4 * MIB),
        (f"mip(1, 1024, 1024, 0, {FLOAT}, 1, 0)", 4 * MIB),
        (f"mip(3, 1024, 1024, 0, {FLOAT}, 1, 0)", 6 * MIB),  # 4 + 1 + 1/4
        (f"mip(11, 1024, 1024, 0, {FLOAT}, 1, 0)", 6 * MIB),
        (f"mip(2, 512, 512, 8, {FLOAT}, 1, 0)", 10 * MIB),  # 8 + 1: depth halves
        (f"mip(2, 1024, 1024, 8, {FLOAT}, 1, {LAYERED})", 40 * MIB),  # 32 + 8: layers do not
        (f"mip(4000000000, 4, 4, 0, {FLOAT}, 1, 0)", 512),
        (f"two({1 << 40}, {1 << 40}, {FLOAT}, 4)", MOST + 1),
        (f"two({2**64 - 1}, 1, {FLOAT}, 1)", MOST + 1),
        (f"two(1, {2**63}, {FLOAT}, 2)", MOST + 1),
        (f"three({2**32}, {2**31}, {2**32 - 1}, {U8}, 1, 0)", MOST + 1),
        (f"two({2**63}, 1, {U8}, 4294967295)", MOST + 1),
        (f"mip(32, {2**63}, 1, 1, {U8}, 1, 0)", MOST + 1),
    ],
)
def test_the_requested_size_of_an_array_is_extent_times_format_summed_over_its_levels(
    held: Agent, call: str, bytes_: int
) -> None:
    assert asked(held, call) == [bytes_]


@pytest.mark.parametrize(
    "call",
    [
        f"three(1024, 1024, 1, {FLOAT}, 1, {SPARSE})",
        f"three(1024, 1024, 1, {FLOAT}, 1, {DEFERRED})",
        f"mip(3, 1024, 1024, 1, {FLOAT}, 1, {SPARSE})",
        f"mip(0, 1024, 1024, 1, {FLOAT}, 1, 0)",
        f"two(0, 5, {FLOAT}, 1)",
        f"two(5, 5, {FLOAT}, 0)",
        "L.cuArrayCreate_v2(C.byref(C.c_void_p()), None)",
        "L.cuArray3DCreate_v2(C.byref(C.c_void_p()), None)",
        "L.cuMipmappedArrayCreate(C.byref(C.c_void_p()), None, 1)",
        f"(L.fake_context(0), two(5, 5, {FLOAT}, 1))",
    ],
)
def test_array_calls_that_allocate_no_memory_reach_the_driver_without_a_request(held: Agent, call: str) -> None:
    assert asked(held, call) == []
    assert held.python(ARRAYS + f"{call}; out(L.fake_calls())") == [[1]]


@pytest.mark.parametrize("call", [f"two(1 << 14, 1 << 14, {FLOAT}, 1)", f"three(1 << 14, 1 << 14, 2, {FLOAT}, 1, 0)"])
def test_arrays_are_refused_at_the_limit(held: Agent, call: str) -> None:
    assert held.python(ARRAYS + f"out({call}, {call}, {call})")[0][-1] == OOM
    assert held.do("look")["used"] <= 1 << 30


def test_mipmapped_arrays_are_refused_at_the_limit(held: Agent) -> None:
    call = f"mip(15, 1 << 14, 1 << 13, 0, {FLOAT}, 1, 0)"
    assert held.python(ARRAYS + f"out({call}, {call}, L.fake_calls())") == [[0, OOM, 1]]


# -- the former 32-bit functions have no witness: their admission is committed at once, and released on an error

OLD = [
    ("L.cuMemAlloc(C.byref(C.c_uint()), 3 << 20)", 4 * MIB),
    ("L.cuMemAllocPitch(C.byref(C.c_uint()), C.byref(C.c_uint()), 1000, 2000, 4)", 2 * MIB),
    ("L.cuMemAllocPitch(C.byref(C.c_uint()), C.byref(C.c_uint()), 0xffffffff, 0xffffffff, 4)", MOST + 1),
    (f"L.cuArrayCreate(C.byref(C.c_void_p()), C.byref(O2(1024, 1024, {FLOAT}, 1)))", 4 * MIB),
    (f"L.cuArray3DCreate(C.byref(C.c_void_p()), C.byref(O3(1024, 1024, 2, {FLOAT}, 1, 0)))", 8 * MIB),
]


@pytest.mark.parametrize(("call", "bytes_"), OLD)
def test_allocations_by_32_bit_functions_are_requested_with_their_size_as_pool_memory(
    held: Agent, call: str, bytes_: int
) -> None:
    assert asked(held, call, POOL) == [bytes_]


@pytest.mark.parametrize(("call", "bytes_"), [o for o in OLD if o[1] <= MOST])
def test_a_failed_allocation_by_a_32_bit_function_is_released(held: Agent, call: str, bytes_: int) -> None:
    assert held.python(ARRAYS + f"L.fake_result(2); out({call})") == [[OOM]]
    assert [c["bytes"] for c in held.calls(RELEASED)] == [bytes_]
    assert held.do("look")["used"] == 0


def test_allocations_by_32_bit_functions_are_refused_at_the_limit(held: Agent) -> None:
    call = "L.cuMemAlloc(C.byref(C.c_uint()), 600 << 20)"
    assert held.python(f"out({call}, {call}, L.fake_calls())") == [[0, OOM, 1]]
    assert held.calls(RELEASED) == []


@pytest.mark.parametrize(
    ("limit", "used", "seen"),
    [
        (1 << 30, 256 * MIB, [768 * MIB, 1 << 30]),
        (8 << 30, 0, [3 << 30, 0xFFFFFFFF]),  # the largest 32-bit value, and the driver's value
    ],
)
def test_32_bit_views_show_the_share_up_to_the_largest_32_bit_value(
    held: Agent, limit: int, used: int, seen: list[int]
) -> None:
    held.do("limit", limit=limit, used=used)
    script = """
f, t, d = C.c_uint(), C.c_uint(), C.c_uint()
out(L.cuMemGetInfo(C.byref(f), C.byref(t)), f.value, t.value, L.cuDeviceTotalMem(C.byref(d), 0), d.value)"""
    assert held.python(script) == [[0, *seen, 0, seen[1]]]
