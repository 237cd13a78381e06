"""Stream-ordered allocation: the shim requests whole blocks.

Their use needs no request, and unused blocks are released.
"""

import json
import time
from pathlib import Path

import pytest

from tests.shim.pool_kit import GIB, MEMORY, MIB, OOM, POOL, POOLS, RELEASED
from tests.shim.shim_kit import Agent, Build

WAITS, LACKS = 8, 0x8000


def grants(held: Agent) -> list[int]:
    return [c["bytes"] for c in held.calls(POOL)]


def given_back(held: Agent) -> list[int]:
    return [c["bytes"] for c in held.calls(RELEASED)]


@pytest.mark.parametrize("name", ["cuMemAllocAsync", "cuMemAllocAsync_ptsz"])
def test_blocks_are_requested_instead_of_each_call(held: Agent, name: str) -> None:
    script = POOLS + f"out(results(new(MiB, 0, '{name}') for _ in range(64)), L.fake_reserved(0) >> 20)"
    assert held.python(script) == [[[0] * 64, 64]]
    assert grants(held) == [32 * MIB] * 2
    assert given_back(held) == []


def test_a_large_allocation_requests_as_many_blocks_as_needed(held: Agent) -> None:
    assert held.python(POOLS + "out(results([new(MiB), new(100 * MiB)]), L.fake_reserved(0) >> 20)") == [[[0, 0], 128]]
    assert grants(held) == [32 * MIB, 96 * MIB]


@pytest.mark.parametrize("name", ["cuMemAllocAsync", "cuMemAllocAsync_ptsz"])
@pytest.mark.parametrize("size", [MIB, 4 * MIB, 100 * MIB])
def test_a_loop_in_one_stream_requests_and_measures_once(held: Agent, name: str, size: int) -> None:
    free = name.replace("Alloc", "Free")
    script = (
        POOLS
        + f"""
for _ in range(500):
    p = new({size}, 0, "{name}"); assert p > 1000 and not drop(p, 0, "{free}")
out(L.fake_queries())"""
    )
    assert held.python(script) == [[4]]  # two measurements before and two after the only growth
    assert len(grants(held)) == 1


FRAGMENT = (
    POOLS
    + """
L.fake_fragmented.argtypes = [C.c_uint64]; L.fake_fragmented(0)
ps = [new(6 * MiB) for _ in range(160)]  # 960 MiB of 1 GiB
for p in ps[::2]: drop(p)
L.fake_fragmented(6 * MiB)
"""
)


@pytest.mark.parametrize("wait", ["", "L.fake_sync()"])
@pytest.mark.parametrize("size", [96 * MIB, 400 * MIB])
def test_a_fragmented_pool_does_not_grow_beyond_the_limit(held: Agent, wait: str, size: int) -> None:
    """The pool has enough free bytes, but in pieces that are too small, and takes more of the device."""
    script = FRAGMENT + f"{wait}\nout(results([new({size}), new({size})]), L.fake_given()); L.cuStreamSynchronize(V(0))"
    results, given = held.python(script + "; out(L.fake_reserved(0) >> 20)")[0:2]
    assert results == [[OOM, OOM], 80], "memory of a refused request was not returned to the pool"
    assert given == [960]
    assert held.do("look")["used"] <= GIB


def test_after_such_a_refusal_the_freed_pieces_still_serve_requests(held: Agent) -> None:
    script = (
        FRAGMENT + "p = new(400 * MiB); n = L.fake_queries(); out(p, *results([new(6 * MiB)]), L.fake_queries() - n)"
    )
    assert held.python(script) == [[OOM, 0, 0]]


def test_such_a_refusal_is_not_a_full_device(held: Agent) -> None:
    """The host makes room for requests that wait for a device, but no room on the device helps this request."""
    held.do("limit", limit=GIB, flags=WAITS)
    assert held.python(FRAGMENT + "out(new(400 * MiB))") == [[OOM]]
    assert [c for c in held.calls() if c["flags"] & LACKS] == []


@pytest.mark.parametrize(("first", "second"), [(64, 32), (32, 64), (48, 32)])
def test_a_stream_gets_freed_memory_of_two_sizes_again(held: Agent, first: int, second: int) -> None:
    """The program uses its whole limit, and never waits."""
    script = (
        POOLS
        + f"""
sizes = [{first} * MiB] * 8 + [{second} * MiB] * 8
for _ in range(3):
    ps = [new(n) for n in sizes]; got = results(ps)
    for p in ps: drop(p)
out(got)"""
    )
    assert held.python(script) == [[[0] * 16]]


def test_memory_of_a_request_that_was_refused_after_the_call_leaves_the_device_at_the_next_wait(held: Agent) -> None:
    """The pool has a high release threshold, so that a wait alone releases nothing."""
    script = FRAGMENT + (
        "L.fake_lazy(1); p = new(400 * MiB); full = L.fake_reserved(0) >> 20; L.cuStreamSynchronize(V(0));"
        "out(p, full, L.fake_reserved(0) >> 20)"
    )
    assert held.python(script) == [[OOM, 960 + 416, 960]]
    assert held.do("look")["used"] <= GIB


def test_pieces_of_a_fragmented_pool_serve_requests_of_their_size_without_a_measurement(held: Agent) -> None:
    script = FRAGMENT + "n = L.fake_queries(); out(results(new(6 * MiB) for _ in range(40)), L.fake_queries() - n)"
    assert held.python(script) == [[[0] * 40, 0]]


def test_each_piece_serves_one_request(held: Agent) -> None:
    """Three requests of 8 MiB fit into three pieces of 12 MiB, and a fourth one does not, although 12 MiB are left."""
    script = (
        POOLS
        + """
ps = [new(12 * MiB) for _ in range(6)]
for p in ps[::2]: drop(p)
counts = [L.fake_queries()]
for _ in range(4): assert new(8 * MiB) > 1000; counts.append(L.fake_queries())
out(*[b > a for a, b in zip(counts, counts[1:])])"""
    )
    assert held.python(script) == [[False, False, False, True]], "the pool is measured when it may have grown"


def test_memory_freed_in_one_stream_does_not_serve_another_stream(held: Agent) -> None:
    """Eight streams allocate 200 MiB each and free it, without waiting. Five of them fit."""
    script = (
        POOLS
        + """
got = []
for s in range(3, 11):
    p = new(200 * MiB, s); got.append(p)
    if p > 1000: drop(p, s)
out(results(got), L.fake_reserved(0) >> 20)"""
    )
    assert held.python(script) == [[[0, 0, 0, 0, 0, OOM, OOM, OOM], 1024]]
    assert held.do("look")["used"] <= GIB


def test_per_thread_default_streams_of_two_threads_do_not_share_credit(held: Agent) -> None:
    script = (
        POOLS
        + """
p = new(300 * MiB, 0, "cuMemAllocAsync_ptsz"); drop(p, 0, "cuMemFreeAsync_ptsz")
before = L.fake_queries()
t = threading.Thread(target=lambda: new(300 * MiB, 2)); t.start(); t.join()
a = L.fake_queries() - before
new(300 * MiB, 2)
out(a, L.fake_queries() - before - a)"""
    )
    assert held.python(script)[0] == [4, 0]  # the other thread measured; this one had credit by either stream name


def test_the_default_stream_of_a_thread_that_has_ended_gives_no_credit(held: Agent) -> None:
    """The C library gives a new thread the memory of an ended thread, and with it the pointer of that thread."""
    script = (
        POOLS
        + """
dl = C.CDLL(None)
def run(work):
    t, call = C.c_ulong(), C.CFUNCTYPE(V, V)(work)
    dl.pthread_create(C.byref(t), None, call, None); dl.pthread_join(t, None); return t.value
def first(_): drop(new(300 * MiB, 2), 2)
def second(_): new(300 * MiB, 2)
a = run(first); before = L.fake_queries(); b = run(second)
out(a == b, L.fake_queries() - before)"""
    )
    assert held.python(script)[0] == [True, 4]  # the second thread measured


@pytest.mark.parametrize("size", [2 * MIB, 3 * MIB, 32 * MIB, 100 * MIB])
def test_pool_allocations_use_nearly_all_of_the_limit_and_are_refused_beyond(held: Agent, size: int) -> None:
    script = (
        POOLS
        + f"""
n = 0
while new({size}) > 1000: n += 1
out(n, new({size}), L.fake_reserved(0))"""
    )
    n, result, reserved = held.python(script)[0]
    assert (n, result) == (GIB // size, OOM)
    assert reserved <= GIB
    assert held.do("look")["used"] <= GIB


@pytest.mark.parametrize(("limit", "size"), [(100 * MIB, 2 * MIB), (505 * MIB, 2 * MIB)])
def test_near_the_limit_only_the_bytes_in_use_count(held: Agent, limit: int, size: int) -> None:
    """A whole block no longer fits, but the bytes that the program needs do."""
    held.do("limit", limit=limit)
    script = (
        POOLS
        + f"""
n = 0
while n < 100000 and new({size}) > 1000: n += 1
out(n, new(2 * MiB))"""
    )
    n, result = held.python(script)[0]
    assert result == OOM
    assert n * size >= limit * 0.975
    assert held.do("look")["used"] <= limit


def test_a_huge_size_is_refused_and_later_allocations_succeed(held: Agent) -> None:
    script = POOLS + "out(results([new(MiB), new(2**64 - 1), new(2**63), new(1 << 48), new(MiB), new(20 * MiB)]))"
    assert held.python(script) == [[[0, OOM, OOM, OOM, 0, 0]]]


def test_an_allocation_of_zero_bytes_requests_nothing(held: Agent) -> None:
    script = POOLS + "new(0); L.cuMemAllocAsync(None, C.c_size_t(5), None) if 0 else 0; L.fake_context(0); out(1)"
    held.python(script)
    assert grants(held) == []


def test_a_failed_allocation_releases_its_block_at_once(held: Agent) -> None:
    script = POOLS + "L.fake_pool_result(719); out([new(200 * MiB) for _ in range(3)])"
    assert held.python(script)[0][0] == [719] * 3
    assert held.do("look")["used"] == 0
    assert sum(grants(held)) == sum(given_back(held))


def test_a_trim_releases_the_freed_bytes(held: Agent) -> None:
    script = POOLS + "p = new(200 * MiB); drop(p); L.fake_sync(); out(trim(0x1000), L.fake_reserved(0))"
    assert held.python(script) == [[0, 0]]
    assert given_back(held) == [224 * MIB]
    assert held.do("look")["used"] == 0


def test_a_trim_discards_the_credit_of_freed_memory(held: Agent) -> None:
    script = (
        POOLS
        + "p = new(200 * MiB); drop(p); L.fake_sync(); trim(0x1000); new(200 * MiB); out(L.fake_reserved(0) >> 20)"
    )
    assert held.python(script) == [[224]]
    assert held.do("look")["used"] == 224 * MIB


def test_a_trim_releases_only_unused_blocks(held: Agent) -> None:
    held.python(POOLS + "p, q = new(40 * MiB), new(200 * MiB); drop(q); L.fake_sync(); out(trim(0x1000))")
    assert held.do("look")["used"] == 64 * MIB


def test_memory_trimmed_at_a_synchronise_is_released_before_another_call_is_refused(held: Agent) -> None:
    script = POOLS + "p = new(900 * MiB); drop(p); L.fake_sync(); out(alloc(900 * MiB), L.fake_calls())"
    assert held.python(script) == [[0, 2]]
    assert held.do("look")["used"] == 900 * MIB


def test_unused_pool_memory_is_trimmed_before_another_call_is_refused(held: Agent) -> None:
    """The shim trims a pool, as the driver itself does when a device is full."""
    script = (
        POOLS
        + """
a, b = create(), create()
p, q = new_from(a, 500 * MiB), new_from(b, 400 * MiB)
drop(p); L.fake_sync.argtypes = []
L.fake_sync()
out(results([new(700 * MiB)]), results([new_from(a, 500 * MiB)]), L.fake_trims() > 0)"""
    )
    assert held.python(script) == [[[OOM], [0], True]]
    assert held.do("look")["used"] <= GIB


def test_a_pool_in_use_is_not_released_on_a_refusal(held: Agent) -> None:
    assert held.python(POOLS + "p = new(600 * MiB); out(alloc(600 * MiB), alloc(300 * MiB))") == [[OOM, 0]]
    assert held.do("look")["used"] == (608 + 300) * MIB


def test_a_refusal_without_pools_is_requested_once(held: Agent) -> None:
    assert held.python("out(alloc(2 * GiB))") == [[OOM]]
    assert len(held.calls(MEMORY)) == 1


def test_a_pool_that_other_streams_filled_is_measured(held: Agent) -> None:
    """Streams that keep freed memory make a pool larger than the bytes in use."""
    script = (
        POOLS
        + """
for s in range(3, 7):
    p = new(100 * MiB, s); drop(p, s)
out(L.fake_reserved(0) >> 20)"""
    )
    reserved = held.python(script)[0][0]
    assert held.do("look")["used"] >= reserved * MIB - 32 * MIB


@pytest.mark.parametrize(
    "wait",
    ["cuCtxSynchronize()", "cuStreamSynchronize(None)", "cuStreamSynchronize_ptsz(None)", "cuEventSynchronize(None)"],
)
def test_memory_freed_by_a_synchronise_is_released_for_other_processes(held: Agent, wait: str) -> None:
    held.python(POOLS + f"p, q = new(200 * MiB), new(40 * MiB); drop(p); L.{wait}; out(L.fake_reserved(0) >> 20)")
    assert held.do("look")["used"] == 64 * MIB


@pytest.mark.parametrize("free", ["drop(p)", "L.cuMemFree_v2(C.c_uint64(p))"])
def test_a_freed_pointer_without_a_note_makes_the_next_wait_release_its_memory(held: Agent, free: str) -> None:
    """The table of notes has 256 slots, so the notes of later pointers have replaced the note of the first."""
    script = POOLS + f"p = new(200 * MiB); qs = [new(512) for _ in range(3000)]; out({free}); L.cuCtxSynchronize()"
    assert held.python(script) == [[0]]
    assert held.do("look")["used"] == 32 * MIB


def test_a_pool_is_measured_a_few_times_after_a_wait_that_released_nothing(held: Agent) -> None:
    script = (
        POOLS
        + """
p = new(200 * MiB); L.cuCtxSynchronize(); n = L.fake_queries(); drop(p); L.fake_lazy(1)
for _ in range(100): L.cuCtxSynchronize()
out(n, L.fake_queries() - n)"""
    )
    assert held.python(script) == [[4, 16]]
    assert held.do("look")["used"] == 224 * MIB


def test_streams_that_share_a_slot_do_not_share_credit(held: Agent) -> None:
    """Ten streams hold 100 MiB each and request more. There is no room for any of them."""
    script = (
        POOLS
        + """
for s in range(3, 16):
    p = new(100 * MiB, s); p > 1000 and drop(p, s)
first = L.fake_reserved(0) >> 20
for s in range(3, 16):
    p = new(150 * MiB, s); p > 1000 and drop(p, s)
out(first, L.fake_reserved(0) >> 20)"""
    )
    assert held.python(script) == [[1024, 1024]]


def test_a_failed_allocation_on_credit_causes_no_measurement(held: Agent) -> None:
    script = (
        POOLS
        + """
drop(new(300 * MiB)); L.fake_pool_result(719); new(300 * MiB); L.fake_pool_result(0)
n = L.fake_queries(); new(300 * MiB); out(L.fake_queries() - n)"""
    )
    assert held.python(script) == [[0]]


def test_a_pool_far_beyond_its_admitted_bytes_gets_no_more(held: Agent) -> None:
    script = POOLS + "new(MiB); L.fake_held(C.c_uint64(2000 * MiB)); out(new(60 * MiB))"
    assert held.python(script) == [[OOM]]


def test_a_free_of_the_null_pointer_gives_no_credit(held: Agent) -> None:
    """The call succeeds and frees nothing. Before it, each slot of the notes has been used."""
    script = (
        POOLS
        + """
[drop(p) for p in [new(MiB) for _ in range(1000)]]
out({drop(0) for _ in range(3000)} == {0}, [new(MiB) > 1000 for _ in range(2000)].count(True), L.fake_reserved(0))"""
    )
    assert held.python(script) == [[True, 1024, GIB]]
    assert held.do("look")["used"] == GIB


# -- choice of a pool


def test_a_pool_is_charged_to_its_own_device(held: Agent) -> None:
    held.do("limit", device=4, limit=GIB)
    held.python(POOLS + "a = create(1, 1); out(results([new_from(a, 40 * MiB)]))")
    assert [(c["device"], c["bytes"]) for c in held.calls(POOL)] == [(4, 64 * MIB)]


def test_an_allocation_is_charged_to_the_device_of_its_stream(held: Agent) -> None:
    held.do("limit", device=4, limit=GIB)
    held.python(POOLS + "L.fake_active(0); L.cuDevicePrimaryCtxRetain(C.byref(c), 1); out(new(MiB, 0x10), new(MiB, 1))")
    assert [c["device"] for c in held.calls(POOL)] == [4, 3]


def test_a_host_pool_is_not_charged(held: Agent) -> None:
    assert held.python(POOLS + "out(results([new_from(create(3), 8 * GiB), new_from(create(2), 8 * GiB)]))") == [
        [[0, 0]]
    ]
    assert grants(held) == []


@pytest.mark.parametrize(
    "how", ["cuDeviceSetMemPool(0, V(a))", "cuMemSetMemPool(C.byref((C.c_int * 2)(1, 0)), 1, V(a))"]
)
def test_allocations_use_the_current_pool_after_a_change(held: Agent, how: str) -> None:
    script = (
        POOLS
        + f"new(MiB); a = create(); L.{how}; new(40 * MiB); out(L.fake_reserved(0) >> 20, L.fake_reserved(3) >> 20)"
    )
    assert held.python(script) == [[32, 64]]
    assert grants(held) == [32 * MIB, 64 * MIB]


def test_a_destroyed_pool_is_released_and_its_slot_is_reused(held: Agent) -> None:
    script = (
        POOLS
        + """
for _ in range(50):
    a = create(); p = new_from(a, 40 * MiB); drop(p); L.fake_sync(); L.cuMemPoolDestroy(V(a))
    if _ == 40: break
out(1)"""
    )
    held.python(script)
    assert held.do("look")["used"] == 0
    assert grants(held) == [64 * MIB] * 41


def test_memory_in_use_of_a_destroyed_pool_stays_charged(held: Agent) -> None:
    held.python(
        POOLS
        + """
a = create(); p, q = new_from(a, 40 * MiB), new_from(a, 100 * MiB)
drop(q); L.cuMemPoolDestroy(V(a)); out(1)"""
    )
    assert held.do("look")["used"] == 64 * MIB


def test_memory_of_destroyed_pools_causes_no_refusal(held: Agent) -> None:
    """The shim has no hook for frees after the end of their pool. NVML shows which memory is still allocated."""
    script = (
        POOLS
        + """
rs = []
for _ in range(20):
    a = create(); p = new_from(a, 300 * MiB); rs.append(p); L.cuMemPoolDestroy(V(a))
out(results(rs)); drop(rs[-1]); out(alloc(900 * MiB))"""
    )
    assert held.python(script) == [[[0] * 20], [0]]
    assert held.do("look")["used"] <= GIB


def test_memory_that_fifty_pools_keep_is_charged(held: Agent) -> None:
    """Each pool keeps the memory that was freed in it, and no pool gets the memory of another pool."""
    script = (
        POOLS
        + """
L.fake_lazy(1); ps = [create() for _ in range(50)][35:]
def use(p): at = new_from(p, 96 * MiB); return at > 1000 and not drop(at)
out([use(p) for p in ps].count(True), sum(L.fake_reserved(n) for n in range(60)))"""
    )
    assert held.python(script) == [[10, 960 * MIB]]
    assert held.do("look")["used"] == 960 * MIB


def test_pools_beyond_the_size_of_the_table_get_no_memory(held: Agent) -> None:
    """A destroyed pool makes room in the table."""
    script = (
        POOLS
        + """
ps = [create() for _ in range(260)]
out([new_from(p, MiB) for p in ps[256:]], results([new_from(ps[255], MiB)]))
L.cuMemPoolDestroy(V(ps[3])); out(results([new_from(create(), MiB)]))"""
    )
    assert held.python(script) == [[[OOM] * 4, [0]], [[0]]]
    assert held.do("look")["used"] == 64 * MIB


MEANWHILE = POOLS + "def meanwhile(f): global kept; kept = C.CFUNCTYPE(None)(f); L.fake_meanwhile(kept)\n"


def test_a_pool_with_the_handle_of_a_destroyed_pool_has_a_part_of_its_own(held: Agent) -> None:
    """Another thread creates that pool, and allocates from it, before the destroying call returns."""
    script = (
        MEANWHILE
        + """
a = create(); new_from(a, MiB); got = []
def other(): b = create(); got.extend([b == a, new_from(b, 200 * MiB) > 1000])
meanwhile(other); out(L.cuMemPoolDestroy(V(a)), got)"""
    )
    assert held.python(script) == [[0, [True, True]]]
    assert held.do("look")["used"] >= 200 * MIB


def test_a_pool_that_cannot_be_destroyed_keeps_its_part(held: Agent) -> None:
    script = MEANWHILE + "new(40 * MiB); out(L.cuMemPoolDestroy(V(0x1000)), results([new(20 * MiB)]))"
    assert held.python(script) == [[1, [0]]]
    assert grants(held) == [64 * MIB]


def test_a_pool_that_two_threads_use_for_the_first_time_is_charged_once(held: Agent) -> None:
    script = MEANWHILE + "meanwhile(lambda: new(40 * MiB)); out(results([new_from(0x1000, 20 * MiB)]))"
    assert held.python(script) == [[[0]]]
    assert held.do("look")["used"] == 64 * MIB


def test_allocations_are_charged_to_a_pool_that_another_thread_has_chosen_meanwhile(held: Agent) -> None:
    script = (
        MEANWHILE
        + """
a = create(); meanwhile(lambda: L.cuDeviceSetMemPool(0, V(a))); new(MiB)
out([new(96 * MiB) > 1000 for _ in range(12)].count(True), L.fake_reserved(3))"""
    )
    n, reserved = held.python(script)[0]
    assert n == 10
    assert reserved <= GIB
    assert held.do("look")["used"] >= reserved


def test_a_pool_that_cannot_be_measured_is_not_charged_beyond_the_limit(held: Agent) -> None:
    held.python(POOLS + "L.fake_break(1); out(results(new(20 * MiB) for _ in range(60)))")
    assert held.do("look")["used"] <= GIB


# -- contexts, captures, links


ENDS = ("L.cuDevicePrimaryCtxReset_v2(0)", "L.cuDevicePrimaryCtxRelease_v2(0)", "L.cuCtxDestroy_v2(c)")


@pytest.mark.parametrize("end", ENDS)
def test_the_charge_of_a_pool_survives_the_end_of_every_context(held: Agent, end: str) -> None:
    """The pool's memory stays, as with a real driver. Its charge stays too, without any gap."""
    script = POOLS + f"p = new(200 * MiB); {end}; out(drop(p)); L.cuCtxSynchronize(); out(L.fake_reserved(0))"
    assert held.python(script) == [[0], [0]]
    calls = [(c["kind"], c["bytes"]) for c in held.calls() if c["kind"] in (POOL, RELEASED)]
    assert calls == [(POOL, 224 * MIB), (RELEASED, 224 * MIB)]  # after the free and the wait
    assert held.do("look")["used"] == 0


@pytest.mark.parametrize("end", ENDS)
def test_memory_freed_in_an_ended_context_is_released(held: Agent, end: str) -> None:
    held.python(POOLS + f"p, q = new(200 * MiB), new(40 * MiB); drop(p); {end}; out(L.fake_reserved(0))")
    assert held.do("look")["used"] == 64 * MIB


@pytest.mark.parametrize("end", ENDS)
def test_memory_freed_in_a_stream_of_an_ended_context_serves_any_stream(held: Agent, end: str) -> None:
    """The pool keeps the memory, so the shim requests and trims nothing."""
    script = POOLS + f"p = new(600 * MiB, 3); L.fake_lazy(1); drop(p, 3); {end}\n"
    assert held.python(script + "out(results([new(600 * MiB, 4)]), L.fake_trims())") == [[[0], 0]]
    assert grants(held) == [608 * MIB]


def test_the_end_of_a_context_releases_no_memory_that_a_pool_holds(held: Agent) -> None:
    """A pool holds a whole limit before, during and after the end of the context."""
    script = POOLS + "p = new(960 * MiB); [L.cuDevicePrimaryCtxReset_v2(0) for _ in range(20)]; out(p > 1000)"
    assert held.python(script) == [[True]]
    assert given_back(held) == []


@pytest.mark.parametrize(
    "begin",
    [
        "L.cuStreamBeginCapture_v2(V(3), 0)",
        "L.cuStreamBeginRecaptureToGraph(V(3), 0, V(1), None, None)",
        "L.cuStreamBeginCaptureToCig(V(3), None)",
    ],
)
def test_captured_allocations_use_no_pool_memory(held: Agent, begin: str) -> None:
    script = (
        POOLS
        + f"""
g = V()
{begin}; p = new(500 * MiB, 3); drop(p, 3); L.cuStreamEndCapture(V(3), C.byref(g))
out(L.fake_unsafe(), L.fake_asked_capturing() > 0, results([new(100 * MiB, 3)]))"""
    )
    assert held.python(script) == [[0, True, [0]]]
    assert grants(held) == [128 * MIB]


def test_memory_freed_in_a_capture_gives_no_credit(held: Agent) -> None:
    script = (
        POOLS
        + """
g = V(); p = new(600 * MiB, 3)
L.cuStreamBeginCapture_v2(V(3), 0); drop(p, 3); L.cuStreamEndCapture(V(3), C.byref(g))
out(results([new(600 * MiB, 3)]))"""
    )
    assert held.python(script) == [[[OOM]]]


def test_the_shim_s_own_calls_do_not_change_the_capture_mode(held: Agent) -> None:
    assert held.python(POOLS + "new(MiB); out(L.fake_mode(), L.fake_unsafe()); trim(0x1000); out(L.fake_mode())") == [
        [0, 0],
        [0],
    ]


def test_the_shim_makes_no_capture_calls_for_programs_without_captures(held: Agent) -> None:
    assert held.python(
        POOLS + "[drop(new(MiB)) for _ in range(50)]; out(L.fake_asked_capturing(), L.fake_unsafe())"
    ) == [[0, 0]]


@pytest.mark.parametrize("call", ["trim(0x1000)", "new(2 * GiB)", "L.cuCtxSynchronize()"])
def test_the_shim_does_not_change_errno(held: Agent, call: str) -> None:
    script = POOLS + f"p = new(MiB); drop(p); C.set_errno(77); {call}; out(C.get_errno())"
    assert held.python(script) == [[77]]


@pytest.mark.parametrize("answer", ["unmanaged", "magic"])
def test_pools_are_unlimited_if_unmanaged_and_refused_without_an_answer(agent: Agent, answer: str) -> None:
    agent.do("set", answer=answer)
    agent.do("start")
    script = POOLS + "out(results(new(4 * GiB) for _ in range(4)), L.fake_queries())"
    assert agent.python(script) == [[[0 if answer == "unmanaged" else OOM] * 4, 0]]


def test_pools_of_a_process_that_becomes_managed_are_measured(held: Agent) -> None:
    held.do("set", answer="unmanaged", epoch=7)
    script = (
        POOLS
        + """
first = results([new(300 * MiB), new(300 * MiB)])
out(first); sys.stdin.readline(); time.sleep(1.1)
out(results([new(300 * MiB), new(300 * MiB)]))"""
    )
    process = held.start_python(script)
    assert process.stdout.readline() == "[[0, 0]]\n"
    held.do("set", answer="managed", epoch=8)
    held.do("bump", epoch=8)
    assert process.communicate("\n", timeout=10)[0] == f"[[0, {OOM}]]\n"
    assert held.do("look")["used"] == 928 * MIB


def test_a_forked_child_has_no_admitted_bytes_of_its_parent(held: Agent) -> None:
    script = (
        POOLS
        + """
p = new(200 * MiB); out(1)
pid = os.fork()
if pid: os.waitpid(pid, 0); os._exit(0)
new(MiB); drop(p); out(results([new(200 * MiB)]))"""
    )
    assert held.python(script) == [[1], [[0]]]
    asked = held.calls(POOL)
    assert len({c["tgid"] for c in asked}) == 2
    assert sum(c["bytes"] for c in asked if c["tgid"] == asked[-1]["tgid"]) >= 200 * MIB


def test_threads_share_the_admitted_bytes_of_a_pool(held: Agent) -> None:
    script = (
        POOLS
        + """
sizes = []
def work(s):
    for i in range(300):
        p = new(MiB, s); sizes.append(p > 1000)
        if i % 3: drop(p, s)
ts = [threading.Thread(target=work, args=(s,)) for s in range(3, 7)]
[t.start() for t in ts]; [t.join() for t in ts]
out(all(sizes), L.fake_reserved(0))"""
    )
    held.do("limit", limit=64 * GIB)
    ok, reserved = held.python(script)[0]
    assert ok
    used = held.do("look")["used"]
    assert reserved - 32 * MIB <= used <= reserved + 96 * MIB
    assert used == sum(grants(held)) - sum(given_back(held))


def test_an_older_driver_has_no_pools(build: Build, held: Agent) -> None:
    script = """
try: L.cuMemAllocAsync; out(1)
except AttributeError: out(0)
out(alloc(1))"""
    assert held.python(script, driver="old") == [[0], [0]]


def test_pools_and_graphs_are_free_of_undefined_behaviour(build: Build, held: Agent, tmp_path: Path) -> None:
    """The library is built again, so that the first undefined operation aborts the program."""
    trapping = build.make(tmp_path, "CFLAGS=-O2 -g -fsanitize=undefined -fsanitize-undefined-trap-on-error")
    script = (
        POOLS
        + """
sizes = (1, 511, 512, MiB, 33 * MiB, 900 * MiB, 1 << 47, 1 << 48, (1 << 48) + 1, 2**63, 2**64 - 1)
for s in (0, 1, 2, 3, 9):
    for n in sizes:
        p = new(n, s); p > 1000 and drop(p, s)
        g = V(); L.cuStreamBeginCapture_v2(V(12), 0)
        drop(new(n, 12), 12); new(n, 12); L.cuStreamEndCapture(V(12), C.byref(g))
        e = V(); L.cuGraphInstantiate_v2(C.byref(e), g, None, None, 0); L.cuGraphLaunch(e, V(s))
        L.cuCtxSynchronize()
a = create(); new_from(a, MiB); L.cuMemPoolDestroy(V(a)); L.cuDeviceGraphMemTrim(-1); L.cuDeviceGraphMemTrim(0)
L.cuCtxDestroy_v2(None); L.cuDevicePrimaryCtxReset_v2(0)
out(1)"""
    )
    assert held.python(script, libraries=(trapping,)) == [[1]]


UNSEEN = f"""
def timed(n):
    began = time.monotonic(); r = alloc(n)
    return r, time.monotonic() - began
out(alloc(900 * MiB), drop({0xD00000}), alloc(100 * MiB), L.cuStreamSynchronize(None))
"""


def test_a_request_after_an_unprobed_free_waits_for_the_agent_s_comparison(held: Agent) -> None:
    """The request is made when the pages show room, so it is never refused."""
    process = held.start_python(POOLS + UNSEEN + "out(*timed(200 * MiB))")
    assert process.stdout.readline() == "[0, 0, 0, 0]\n"
    time.sleep(0.3)
    held.do("limit", limit=2 * GIB)
    result, seconds = json.loads(process.communicate(timeout=10)[0])
    assert result == 0
    assert seconds < 0.9
    assert [c["result"] for c in held.calls(MEMORY)] == [0, 0, 0]


def test_only_the_first_request_after_an_unprobed_free_waits_before_it_is_refused(held: Agent) -> None:
    first, (result, seconds), again = held.python(POOLS + UNSEEN + "for _ in range(2): out(*timed(200 * MiB))")
    assert first == [0, 0, 0, 0]
    assert result == OOM
    assert 0.8 < seconds < 4
    assert again[0] == OOM
    assert again[1] < 0.5
    assert len(held.calls(MEMORY)) == 4


def test_a_request_waits_for_a_comparison_after_a_later_synchronise(held: Agent) -> None:
    """The first synchronise may be for another stream."""
    script = POOLS + UNSEEN + "time.sleep(1.1); L.cuStreamSynchronize(None); out(*timed(200 * MiB))"
    _, (result, seconds) = held.python(script)
    assert result == OOM
    assert seconds > 0.8
