"""Tests of the gate with the simulated driver: which threads wait, for how long, and that only launches wait."""

import select
import time

import pytest

from tests.shim.gate_kit import KIT, end, page, said, shut, tell, unlock, until
from tests.shim.orphans_kit import GIB, MIB
from tests.shim.shim_kit import Simulator
from tests.support.wait import Deadline, eventually


@pytest.mark.parametrize("word", [0, 1, 5 << 2])
def test_launches_of_an_ungated_process_are_not_counted(simulator: Simulator, word: int) -> None:
    simulator.agent.do("gate", word=word)
    script = KIT + "f = kernel(1); out([launch(f) for _ in range(101)].count(0)); need('cuCtxSynchronize')"
    assert simulator.python(script) == "[101]\n"
    assert not any(page(simulator.agent).values())


def test_a_closed_gate_of_another_device_blocks_no_launch(simulator: Simulator) -> None:
    shut(simulator.agent, 5, device=4)
    assert simulator.python(KIT + "f = kernel(1); out([launch(f) for _ in range(11)].count(0))") == "[11]\n"
    assert not any(page(simulator.agent, 3).values())


GRAPH = """
def holding(mib):
    g, e, p = C.c_void_p(), C.c_void_p(), C.c_uint64(); need("cuStreamBeginCapture_v2", s, 0)
    need("cuMemAllocAsync", C.byref(p), C.c_size_t(mib << 20), s); need("cuStreamEndCapture", s, C.byref(g))
    need("cuGraphInstantiateWithFlags", C.byref(e), g, C.c_ulonglong(0)); return e, p
def run_at_the_gate(e):
    results = []
    def other(): need("cuCtxSetCurrent", c); results.append(L.cuGraphLaunch(e, s))
    thread = threading.Thread(target=other); thread.start(); line()
    need("cuMemAlloc_v2", C.byref(C.c_uint64()), C.c_size_t(700 << 20)); out("used"); thread.join(20); return results
s = stream()
"""  # a graph that allocates memory


@pytest.mark.parametrize("name", ["cuGraphLaunch", "cuGraphLaunch_ptsz"])
def test_a_graph_requests_its_memory_before_it_waits_at_the_gate(simulator: Simulator, name: str) -> None:
    """A launch that waits for memory must not count as in flight. So this graph is refused while the gate is closed."""
    agent = simulator.agent
    shut(agent, 4)
    process = simulator.start(KIT + GRAPH + f"e, p = holding(2048); out('ready'); line(); out(L.{name}(e, s))")
    assert said(process) == ["ready"]
    tell(process)
    assert select.select([process.stdout], [], [], 20)[0], page(agent)
    assert said(process) == [2]
    assert page(agent) == {**page(agent), "waiting": 0, "in_flight": 0}
    end(process)


@pytest.mark.parametrize("before", [0, 1])
def test_a_graph_at_a_gate_does_not_keep_memory_that_another_call_has_used_meanwhile(
    simulator: Simulator, before: int
) -> None:
    """A graph's memory is admitted, now or at an earlier launch. While the graph waits, a thread uses that memory."""
    agent = simulator.agent
    unlock(agent, 4)
    process = simulator.start(
        KIT
        + GRAPH
        + f"""
e, p = holding(600)
for _ in range({before}):
    need("cuGraphLaunch", e, s); need("cuStreamSynchronize", s)
    need("cuMemFreeAsync", p, s); need("cuStreamSynchronize", s)
out("ready"); line(); out(run_at_the_gate(e))"""
    )
    assert said(process) == ["ready"]
    shut(agent, 4)
    tell(process)
    until(agent, waiting=1)
    tell(process)
    assert said(process) == ["used"]
    unlock(agent, 5)
    assert said(process) == [[2]]
    assert page(agent) == {**page(agent), "waiting": 0, "launches": before, "in_flight": 0}
    end(process)


def test_a_graph_that_has_left_the_gate_for_memory_is_not_counted_if_the_gate_is_gone(simulator: Simulator) -> None:
    """The graph waits for orphaned memory. Meanwhile the other tenants of the device end, so there are no turns."""
    agent = simulator.agent
    shut(agent, 4)
    process = simulator.start(
        KIT
        + GRAPH
        + "e, p = holding(600); out('ready'); r = run_at_the_gate(e); need('cuCtxSynchronize'); out(r); line()"
    )
    assert said(process) == ["ready"]
    until(agent, waiting=1)
    tell(process)
    assert said(process) == ["used"]
    agent.do("limit", limit=GIB, used=700 * MIB, orphaned=650 * MIB, age_ms=0)
    unlock(agent, 5)
    until(agent, waiting=0, in_flight=0)
    agent.do("gate", word=6 << 2 | 1)  # open, not GATED
    agent.do("limit", limit=GIB, used=50 * MIB)
    assert said(process) == [[0]]
    assert page(agent) == {**page(agent), "launches": 0, "in_flight": 0}
    tell(process)
    end(process)


CALLS = {
    "cuLaunchKernel": "launch(f)",
    "cuLaunchKernel_ptsz": "L.cuLaunchKernel_ptsz(f, 1, 1, 1, 1, 1, 1, 0, None, None, None)",
    "cuLaunchKernelEx": "L.cuLaunchKernelEx(C.byref(config), f, None, None)",
    "cuLaunchKernelEx_ptsz": "L.cuLaunchKernelEx_ptsz(C.byref(config), f, None, None)",
    "cuLaunchCooperativeKernel": "L.cuLaunchCooperativeKernel(f, 1, 1, 1, 1, 1, 1, 0, s, None)",
    "cuLaunchCooperativeKernel_ptsz": "L.cuLaunchCooperativeKernel_ptsz(f, 1, 1, 1, 1, 1, 1, 0, None, None)",
    "cuGraphLaunch": "L.cuGraphLaunch(e, s)",
    "cuGraphLaunch_ptsz": "L.cuGraphLaunch_ptsz(e, None)",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_closed_gate_blocks_every_kind_of_launch(simulator: Simulator, call: str) -> None:
    agent = simulator.agent
    unlock(agent, 4)
    process = simulator.start(
        KIT
        + f"""
f, s = kernel(1), stream(); e = exec_of(f, 3, s); config = Config((1, 1, 1, 1, 1, 1, 0), s, None, 0); config.c = 0
out("ready"); line(); r = {CALLS[call]}; out(r, C.get_errno()); line(); need("cuCtxSynchronize"); out("done")"""
    )
    assert said(process) == ["ready"]
    assert page(agent)["launches"] == 0  # the shim does not count captured kernels
    shut(agent, 4)
    tell(process)
    assert until(agent, waiting=1, drained=4)["in_flight"] == 0
    bell = page(agent)["bell"]
    time.sleep(0.1)
    assert page(agent) == {**page(agent), "waiting": 1, "launches": 0, "bell": bell}
    unlock(agent, 5)
    assert said(process) == [0, 0]
    until(agent, waiting=0, launches=1, idle=0)
    tell(process)
    assert said(process) == ["done"]
    assert page(agent)["in_flight"] == 0
    end(process)


OLD = {
    "cuLaunch": "L.cuLaunch(f)",
    "cuLaunchGrid": "L.cuLaunchGrid(f, 1, 1)",
    "cuLaunchGridAsync": "L.cuLaunchGridAsync(f, 1, 1, s)",
}


@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize("call", OLD)
def test_a_closed_gate_blocks_uncaptured_launches_during_a_relaxed_capture(
    simulator: Simulator, call: str, flags: int
) -> None:
    agent = simulator.agent
    shut(agent, 4)
    process = simulator.start(
        KIT
        + f"""
f, s, g, n = kernel(1), stream({flags}), C.c_void_p(), C.c_size_t(); need("cuFuncSetBlockShape", f, 1, 1, 1)
out("ready"); line(); relaxed = C.c_int(2); need("cuThreadExchangeStreamCaptureMode", C.byref(relaxed))
need("cuStreamBeginCapture_v2", s, 2); need("cuLaunchKernel", f, 1, 1, 1, 1, 1, 1, 0, s, None, None)
r = {OLD[call]}; need("cuStreamEndCapture", s, C.byref(g)); need("cuGraphGetNodes", g, None, C.byref(n))
out(r, n.value); line(); need("cuCtxSynchronize"); out("done")"""
    )
    assert said(process) == ["ready"]
    tell(process)
    until(agent, waiting=1, drained=4)
    unlock(agent, 5)
    assert said(process) == [0, 1]
    until(agent, waiting=0, launches=1)
    tell(process)
    assert said(process) == ["done"]
    until(agent, in_flight=0)
    end(process)


def test_a_capture_continues_at_a_closed_gate(simulator: Simulator) -> None:
    """Captured launches in the strictest mode neither wait nor break, while other threads launch, drain and wait."""
    agent = simulator.agent
    unlock(agent, 1)
    process = simulator.start(
        KIT
        + """
f, s, t, legacy, stop = kernel(50), stream(), stream(), kernel(1), []
def busy():
    need("cuCtxSetCurrent", c)
    relaxed = C.c_int(2); L.cuThreadExchangeStreamCaptureMode(C.byref(relaxed))
    while not stop: launch(f, t)
threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads: thread.start()
out("ready")
n = 0
while not select.select([0], [], [], 0)[0]: e = exec_of(f, 5, s); need("cuGraphExecDestroy", e); n += 1
line(); e = exec_of(f, 5, s); out(n > 10); line(); out("launching")
need("cuGraphLaunch", e, s); stop.append(1)
for thread in threads: thread.join()
need("cuCtxSynchronize"); out("done")""".replace("f, s, t", "import select\nf, s, t", 1)
    )
    assert said(process) == ["ready"]
    for turn in range(2, 25):
        unlock(agent, turn)
        time.sleep(0.01)
        shut(agent, turn)
        time.sleep(0.01)
    tell(process)
    assert said(process) == [True]
    until(agent, waiting=2, drained=24, in_flight=0)
    tell(process)
    assert said(process) == ["launching"]
    until(agent, waiting=3)
    unlock(agent, 25)
    assert said(process) == ["done"]
    end(process)


def test_a_thread_that_a_gate_without_turns_lets_through_is_not_reported_as_waiting(simulator: Simulator) -> None:
    """The other tenants of the device end while the thread waits at the closed gate, so there are no turns."""
    agent = simulator.agent
    shut(agent, 4)
    process = simulator.start(KIT + "f = kernel(1); out('ready'); out(launch(f)); line()")
    assert said(process) == ["ready"]
    until(agent, waiting=1)
    agent.do("gate", word=1)  # open, not GATED
    assert said(process) == [0]
    assert page(agent) == {**page(agent), "waiting": 0, "launches": 0, "in_flight": 0}
    tell(process)
    end(process)


def test_gates_open_without_a_heartbeat(simulator: Simulator) -> None:
    agent = simulator.agent
    shut(agent, 3)
    process = simulator.start(KIT + "f = kernel(1); out('ready'); out(launch(f))")
    assert said(process) == ["ready"]
    until(agent, waiting=1)
    began, deadline = time.monotonic(), Deadline(4)
    agent.do("stop")
    agent.do("set", beats=False)
    assert said(process) == [0]
    assert time.monotonic() - began > 1
    assert not deadline.is_over()
    end(process)


def test_launches_alone_make_the_shim_register_with_another_gatekeeper(simulator: Simulator) -> None:
    agent = simulator.agent
    process = simulator.start(KIT + "f = kernel(1); out('ready')\nwhile launch(f) == 0: time.sleep(0.001)")
    assert said(process) == ["ready"]
    agent.do("set", epoch=8)
    agent.do("bump", epoch=8)
    shut(agent, 7)
    eventually(lambda: len(agent.do("status")["pages"]) > 1)
    until(agent, waiting=1, drained=7)
    process.kill()
    process.communicate()


def test_signals_do_not_end_the_wait_at_a_closed_gate(simulator: Simulator) -> None:
    agent = simulator.agent
    shut(agent, 3)
    script = """
import signal
f, n = kernel(1), []
signal.signal(signal.SIGALRM, lambda *_: n.append(1)); signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
out("ready"); r = launch(f); signal.setitimer(signal.ITIMER_REAL, 0); out(r, C.get_errno())"""
    process = simulator.start(KIT + script)
    assert said(process) == ["ready"]
    until(agent, waiting=1)
    time.sleep(0.3)
    assert page(agent)["waiting"] == 1
    unlock(agent, 4)
    assert said(process) == [0, 0]
    end(process)


def test_a_thread_that_waits_at_a_gate_reports_the_drain_of_another_device(simulator: Simulator) -> None:
    """The thread waits at one closed gate. Its work on another device is reported as soon as that work is done."""
    agent = simulator.agent
    unlock(agent, 1)
    unlock(agent, 1, device=4)
    process = simulator.start(
        KIT
        + """
f, d = kernel(20), context(1); g = kernel(100000); launch(g); need("cuCtxSetCurrent", c)
out("given"); line(); launch(f); need("cuCtxSynchronize"); out("done")"""
    )
    assert said(process) == ["given"]
    assert page(agent, 4)["in_flight"] == 1
    shut(agent, 1)
    shut(agent, 1, device=4)
    tell(process)
    until(agent, waiting=1, drained=1)
    eventually(lambda: page(agent, 4)["drained"] == 1, 2)
    assert page(agent, 4)["in_flight"] == 0
    unlock(agent, 2)
    assert said(process) == ["done"]
    end(process)


def test_a_closed_gate_passes_the_allowed_launches_and_reports_the_drain_again(simulator: Simulator) -> None:
    agent = simulator.agent
    unlock(agent, 1)
    process = simulator.start(KIT + "f = kernel(20); out('ready'); line(); out([launch(f) for _ in range(6)])")
    assert said(process) == ["ready"]
    shut(agent, 1)
    tell(process)
    bell = until(agent, waiting=1, drained=1)["bell"]
    shut(agent, 1, passes=2)
    now = until(agent, launches=2, waiting=1, drained=1)
    assert now["in_flight"] == 0
    assert now["bell"] > bell
    shut(agent, 1, passes=5)
    now = until(agent, launches=5, waiting=1, drained=1)
    time.sleep(0.1)
    assert page(agent) == now
    unlock(agent, 2)
    assert said(process) == [[0] * 6]
    end(process)
