"""Memory that graphs allocate: requested at a graph's first launch, and tracked afterwards."""

import pytest

from tests.shim.pool_kit import GIB, MIB, OOM, POOL, POOLS, RELEASED
from tests.shim.shim_kit import Agent

GRAPHS = (
    POOLS
    + """
def capture(body, stream=3):
    g = V(); L.cuStreamBeginCapture_v2(V(stream), 0); body(); L.cuStreamEndCapture(V(stream), C.byref(g)); return g
def make(graph, flags=0):
    e = V(); r = L.cuGraphInstantiateWithFlags(C.byref(e), graph, C.c_ulonglong(flags)); assert r == 0, r; return e
def launch(e, stream=3, name="cuGraphLaunch"): return getattr(L, name)(e, V(stream))
def holding(n): return make(capture(lambda: new(n, 3)))
def passing(n): return make(capture(lambda: drop(new(n, 3), 3)))
def reserved(): return L.fake_graph_reserved(0) >> 20
L.cuGraphInstantiateWithFlags.argtypes = [V, V, C.c_ulonglong]
"""
)


def test_graph_memory_is_requested_only_at_the_first_launch(held: Agent) -> None:
    script = (
        GRAPHS
        + "e = holding(300 * MiB); out(reserved()); [launch(e) for _ in range(50)]; out(reserved(), L.fake_unsafe())"
    )
    assert held.python(script) == [[0], [300, 0]]
    assert [c["bytes"] for c in held.calls(POOL)] == [300 * MIB]
    assert held.calls(RELEASED) == []


@pytest.mark.parametrize("name", ["cuGraphLaunch", "cuGraphLaunch_ptsz", "cuGraphUpload"])
def test_graph_memory_beyond_the_limit_is_refused_before_the_driver_allocates(held: Agent, name: str) -> None:
    script = GRAPHS + f"e = holding(2 << 30); out(launch(e, 3, '{name}'), reserved())"
    assert held.python(script) == [[OOM, 0]]


def test_memory_of_several_graphs_adds_up_to_the_limit(held: Agent) -> None:
    script = GRAPHS + "es = [holding(300 * MiB) for _ in range(5)]; out([launch(e) for e in es], reserved())"
    assert held.python(script) == [[[0, 0, 0, OOM, OOM], 900]]


def test_graphs_that_share_memory_are_not_charged_for_their_sum(held: Agent) -> None:
    script = (
        GRAPHS
        + """
L.fake_sharing(1); L.fake_busy(1)
es = [passing(600 * MiB) for _ in range(5)]
out([launch(e) for e in es], reserved(), [launch(e, 4) for e in es])"""
    )
    assert held.python(script) == [[[0] * 5, 600, [0] * 5]]
    assert held.do("look")["used"] == 600 * MIB


def test_memory_freed_in_a_graph_is_not_added_up(held: Agent) -> None:
    script = (
        GRAPHS
        + """
def body():
    for _ in range(20): drop(new(400 * MiB, 3), 3)
out(launch(make(capture(body))), reserved())"""
    )
    assert held.python(script) == [[0, 400]]


def test_the_peak_of_a_graph_s_memory_is_requested(held: Agent) -> None:
    script = (
        GRAPHS
        + """
def body():
    a, b = new(200 * MiB, 3), new(300 * MiB, 3); drop(a, 3); c = new(100 * MiB, 3); drop(b, 3); drop(c, 3)
out(launch(make(capture(body))), reserved())"""
    )
    assert held.python(script) == [[0, 500]]
    assert [c["bytes"] for c in held.calls(POOL)] == [500 * MIB]


def test_the_shim_reads_long_graphs_and_child_graphs(held: Agent) -> None:
    script = (
        GRAPHS
        + """
inner = capture(lambda: [new(3 * MiB, 3) for _ in range(200)])
outer = capture(lambda: new(100 * MiB, 3)); L.fake_child(outer, inner)
out(launch(make(outer)))"""
    )
    assert held.python(script) == [[0]]
    assert held.calls(POOL)[0]["bytes"] == (100 + 800) * MIB


@pytest.mark.parametrize("size", ["300 * MiB", "2 << 30"])
def test_memory_of_a_graph_uploaded_at_instantiation_is_requested_at_instantiation(held: Agent, size: str) -> None:
    script = (
        GRAPHS
        + f"""
g = capture(lambda: new({size}, 3)); e = V()
out(L.cuGraphInstantiateWithFlags(C.byref(e), g, 2), reserved())"""
    )
    fits = size.startswith("300")
    assert held.python(script) == [[0, 300] if fits else [OOM, 0]]
    assert held.do("look")["used"] == (300 * MIB if fits else 0)


def test_the_shim_reads_graphs_of_cu_graph_instantiate_v2_and_with_params(held: Agent) -> None:
    script = (
        GRAPHS
        + """
g, e = capture(lambda: new(2 << 30, 3)), V()
a = (L.cuGraphInstantiate_v2(C.byref(e), g, None, None, 0), launch(e))
g, e = capture(lambda: new(2 << 30, 3)), V()
out(a, (L.cuGraphInstantiateWithParams(C.byref(e), g, (C.c_uint64 * 8)()), launch(e)))"""
    )
    assert held.python(script) == [[[0, OOM], [0, OOM]]]


def test_a_trim_releases_graph_memory_and_the_next_launch_requests_it(held: Agent) -> None:
    script = (
        GRAPHS
        + "e = passing(300 * MiB); launch(e); L.cuDeviceGraphMemTrim(0); out(reserved()); launch(e); out(reserved())"
    )
    assert held.python(script) == [[0], [300]]
    assert [c["bytes"] for c in held.calls(POOL)] == [300 * MIB] * 2
    assert [c["bytes"] for c in held.calls(RELEASED)] == [300 * MIB]


def test_idle_graph_memory_is_trimmed_before_another_call_is_refused(held: Agent) -> None:
    assert held.python(GRAPHS + "e = passing(600 * MiB); out(launch(e), alloc(600 * MiB), reserved())") == [[0, 0, 0]]
    assert held.do("look")["used"] == 600 * MIB


def test_memory_beyond_the_estimate_is_requested_after_the_launch(held: Agent) -> None:
    held.python(GRAPHS + "e = holding(100 * MiB); L.fake_graph_take(0, C.c_uint64(200 * MiB)); out(launch(e))")
    assert held.do("look")["used"] == 300 * MIB


def test_a_failed_launch_releases_its_admission(held: Agent) -> None:
    held.python(GRAPHS + "e = holding(100 * MiB); L.fake_pool_result(719); out(launch(e))")
    assert held.do("look")["used"] == 0


def test_a_launch_into_a_capture_requests_nothing(held: Agent) -> None:
    script = GRAPHS + "e = holding(2 << 30); L.cuStreamBeginCapture_v2(V(4), 0); out(launch(e, 4))"
    held.python(script)
    assert held.calls(POOL) == []


def test_graphs_without_allocations_request_nothing(held: Agent) -> None:
    script = (
        GRAPHS
        + """
e = make(capture(lambda: None)); n = L.fake_asked_capturing()
[launch(e) for _ in range(9)]
out(L.fake_asked_capturing() - n)"""
    )
    assert held.python(script) == [[0]]
    assert held.calls(POOL) == []


def test_graphs_beyond_the_size_of_the_table_are_charged(held: Agent) -> None:
    script = GRAPHS + "es = [holding(20 * MiB) for _ in range(90)]; out([launch(e) for e in es].count(0), reserved())"
    launched, reserved = held.python(script)[0]
    assert launched == 52  # the shim detects the last allocation too late
    assert (reserved - 20) * MIB <= held.do("look")["used"] <= GIB


def test_a_destroyed_graph_frees_its_slot(held: Agent) -> None:
    script = (
        GRAPHS
        + """
g = capture(lambda: new(2 << 30, 3))
for i in range(200):
    e = V(); L.cuGraphInstantiateWithFlags(C.byref(e), V(g.value), 0); L.cuGraphExecDestroy(e)
for _ in range(70): L.cuGraphExecDestroy(holding(MiB))
out(launch(holding(2 << 30)))"""
    )
    assert held.python(script) == [[OOM]]


def test_a_reset_of_the_primary_context_releases_graph_memory(held: Agent) -> None:
    held.python(GRAPHS + "e = holding(300 * MiB); launch(e); L.cuDevicePrimaryCtxReset_v2(0); out(1)")
    assert held.do("look")["used"] == 0


@pytest.mark.parametrize(("active", "asked"), [(0, 1), (1, 0)])
def test_a_green_context_is_requested_only_if_the_primary_context_is_inactive(
    held: Agent, active: int, asked: int
) -> None:
    script = f"L.fake_active({active}); c = C.c_void_p(); out(L.cuGreenCtxCreate(C.byref(c), None, 0, 1))"
    assert held.python(script) == [[0]]
    assert len(held.calls(2)) == asked


def test_a_refused_green_context_returns_out_of_memory(held: Agent) -> None:
    held.do("knobs", fixed=1)
    assert held.python("c = C.c_void_p(); out(L.cuGreenCtxCreate(C.byref(c), None, 0, 1))") == [[OOM]]
