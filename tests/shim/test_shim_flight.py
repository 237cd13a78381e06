"""Work in flight on a gated device of the simulated driver: bounded, drained, reported, and without side effects."""

import time

import pytest

from tests.shim.gate_kit import KIT, driver_behind, end, page, said, shut, tell, unlock, until
from tests.shim.shim_kit import Simulator
from tests.support.wait import quiet_seconds

# Ways of a program to wait for its work.
WAITS = [
    "need('cuStreamSynchronize', s)",
    "need('cuCtxSynchronize')",
    "need('cuEventSynchronize', e)",
    "while L.cuStreamQuery(s) == 600: time.sleep(0.001)",
    "while L.cuEventQuery(e) == 600: time.sleep(0.001)",
]


def test_work_in_flight_is_bounded(simulator: Simulator) -> None:
    """A program launches 2,003 kernels of 0.2 ms without waiting.

    At most a budget and a batch of them are in flight.
    """
    agent = simulator.agent
    unlock(agent, 1, budget=4_000_000)
    process = simulator.start(
        KIT
        + """
f, s = kernel(200), stream()
for _ in range(101): launch(f, s)
out("warm"); line()
for _ in range(2003): launch(f, s)
out("given"); line(); need("cuStreamSynchronize", s); out("done"); line()"""
    )
    assert said(process) == ["warm"]
    tell(process)
    seen = []
    while (now := page(agent))["launches"] < 2104:
        seen.append(now["in_flight"])
    assert len(seen) > 10
    assert max(seen) <= 40, max(seen)  # 4 ms are 20 kernels; an estimate may be half of it on a busy machine
    assert said(process) == ["given"]
    tell(process)
    assert said(process) == ["done"]
    assert page(agent)["in_flight"] == 0
    tell(process)
    end(process)


@pytest.mark.timed
@pytest.mark.parametrize("streams", [1, 7])
def test_a_drain_is_short_and_reported(simulator: Simulator, streams: int) -> None:
    """A program launches at full speed. Each time its gate closes, the program soon reports a correct drain."""
    agent = simulator.agent
    unlock(agent, 1)
    process = simulator.start(
        KIT
        + f"""
f, ss, n, stop = kernel(200), [stream() for _ in range({streams})], 0, []
out("ready")
threading.Thread(target=lambda: stop.append(line())).start()
while not stop:
    for s in ss: n += launch(f, s) == 0
need("cuCtxSynchronize"); out(n)"""
    )
    assert said(process) == ["ready"]
    time.sleep(0.3)
    drains = []
    for turn in range(2, 13):
        unlock(agent, turn)
        time.sleep(0.02)
        shut(agent, turn)
        began = quiet_seconds()
        now = until(agent, drained=turn)
        drains.append(quiet_seconds() - began)
        assert (now["waiting"], now["in_flight"]) == (1, 0)
        before = now["launches"]
        time.sleep(0.005)
        assert page(agent)["launches"] == before
    assert sorted(drains)[5] < 0.02, drains  # the budget is 2 ms; without a bound a drain would take seconds
    tell(process)
    unlock(agent, 13)
    assert said(process) == [page(agent)["launches"]]
    end(process)


@pytest.mark.parametrize("wait", WAITS)
def test_a_program_that_waits_reports_the_end_of_its_work(simulator: Simulator, wait: str) -> None:
    agent = simulator.agent
    unlock(agent, 1)
    process = simulator.start(
        KIT
        + f"""
f, s, e = kernel(1000000), stream(), C.c_void_p(); need("cuEventCreate", C.byref(e), 2)
launch(f, s); need("cuEventRecord", e, s); out("given")
{wait}
out("done"); line()"""
    )
    assert said(process) == ["given"]
    shut(agent, 1)
    assert page(agent)["in_flight"] == 1
    assert said(process) == ["done"]
    assert page(agent) == {**page(agent), "in_flight": 0, "drained": 1, "waiting": 0}
    assert page(agent)["bell"] > 0
    tell(process)
    end(process)


def test_a_new_event_with_the_handle_of_a_destroyed_one_shows_no_end_of_work(simulator: Simulator) -> None:
    agent = simulator.agent
    unlock(agent, 1)
    process = simulator.start(
        KIT
        + """
f, s = kernel(100000000), stream()
def event(): e = C.c_void_p(); need("cuEventCreate", C.byref(e), 2); return e
old = [event() for _ in range(32)]; launch(f, s)
for e in old: need("cuEventRecord", e, s)
for e in old: need("cuEventDestroy_v2", e)
handles = {e.value for e in old}; again = [e for e in (event() for _ in range(1000)) if e.value in handles]
out(len(again) > 0, max(map(L.cuEventQuery, again))); line()"""
    )
    assert said(process) == [True, 0]
    assert page(agent) == {**page(agent), "launches": 1, "in_flight": 1}
    process.kill()
    process.communicate()


@pytest.mark.parametrize("name", ["cuStreamSynchronize_ptsz(None)", "cuStreamQuery(C.c_void_p(2))"])
def test_a_default_stream_of_a_thread_ends_no_work_in_another_context(simulator: Simulator, name: str) -> None:
    agent = simulator.agent
    unlock(agent, 1)
    process = simulator.start(
        KIT
        + f"""
f, other = kernel(100000000), C.c_void_p()
need("cuLaunchKernel_ptsz", f, 1, 1, 1, 1, 1, 1, 0, None, None, None)
need("cuCtxCreate_v2", C.byref(other), 0, 0); out(L.{name}); line()"""
    )
    assert said(process) == [0]
    assert page(agent) == {**page(agent), "launches": 1, "in_flight": 1}
    process.kill()
    process.communicate()


def test_a_turn_begins_with_its_first_launch_and_ends_with_its_last_kernel(simulator: Simulator) -> None:
    """The page shows the first launch and the last kernel, not when the gate opened or when the drain was read."""
    agent = simulator.agent
    shut(agent, 1)
    process = simulator.start(
        KIT
        + """
f, s = kernel(1000000), stream(); out("ready")
launch(f, s); at = time.monotonic_ns(); out(at)
need("cuStreamSynchronize", s); done = time.monotonic_ns(); line(); out(at, done); line()"""
    )
    assert said(process) == ["ready"]
    until(agent, waiting=1)
    assert page(agent)["begun"] == 0
    opened = time.monotonic_ns()
    unlock(agent, 2)
    (launched,) = said(process)
    shut(agent, 2)
    until(agent, drained=2, in_flight=0)
    time.sleep(0.1)
    now = page(agent)
    tell(process)
    launched, done = said(process)
    assert opened < now["begun"] <= launched
    assert launched + 900e6 < now["ended"] <= done
    tell(process)
    end(process)


def test_the_shim_reports_the_rest_between_an_end_and_the_next_launch(simulator: Simulator) -> None:
    agent = simulator.agent
    unlock(agent, 1)
    process = simulator.start(
        KIT
        + """
f, s = kernel(200), stream(); rests, between = [], []
ended = time.monotonic_ns()
for _ in range(4):
    launch(f, s); between.append(time.monotonic_ns() - ended)
    for _ in range(4): launch(f, s)
    need("cuStreamSynchronize", s); ended = time.monotonic_ns(); time.sleep(0.05)
    begins = time.monotonic_ns(); launch(f, s); rests.append((begins - ended, time.monotonic_ns() - ended))
    need("cuStreamSynchronize", s); ended = time.monotonic_ns()
out(rests, sum(between[1:])); line()"""
    )
    rests, between = said(process)
    now = until(agent, launches=24, in_flight=0)
    assert sum(least for least, _ in rests) <= now["idle"] <= sum(most for _, most in rests) + between
    tell(process)
    end(process)


def test_the_shim_reports_almost_no_rest_of_a_program_that_waits_for_each_step(simulator: Simulator) -> None:
    """The time from the end of a wait to the next launch is no rest but the program's own time, unless it is long."""
    agent = simulator.agent
    unlock(agent, 1)
    process = simulator.start(
        KIT
        + """
f, s, gaps = kernel(500), stream(), []
launch(f, s); need("cuStreamSynchronize", s)
for _ in range(400):
    ended = time.monotonic_ns(); own = time.monotonic_ns() - ended
    launch(f, s); gaps.append((own, time.monotonic_ns() - ended))
    need("cuStreamSynchronize", s)
out(*gaps); line()"""
    )
    gaps = said(process)
    now = until(agent, launches=401, in_flight=0)
    own, whole = sorted(own for own, _ in gaps)[200], sorted(whole for _, whole in gaps)[200]
    assert own < 50_000  # otherwise this machine is too slow for this test
    late = [most for least, most in gaps if least > 50_000 or most > whole + 50_000]
    assert now["idle"] <= 3_000_000 + 2 * sum(late)
    tell(process)
    end(process)


def test_a_slow_driver_call_does_not_disturb_the_counts_of_other_threads(simulator: Simulator) -> None:
    """One thread is in a driver call for longer than its turn, and other threads continue. Their counts stay right."""
    agent = simulator.agent
    unlock(agent, 1)
    program = agent.build.compile("threads.c", "threads", "-ldl", "-lpthread")
    process = agent.popen(program, 4, "spin_20us", driver=driver_behind(simulator, "slow_driver.c"))
    simulator.started.append(process)
    assert said(process) == ["ready"]
    time.sleep(8)
    tell(process)
    (launches,) = said(process)
    assert page(agent) == {**page(agent), "launches": launches, "in_flight": 0}
    tell(process)
    end(process)


TWINS = """
def enter(d): need("cuCtxSetCurrent", cs[d])
def kernel_on(d, name):
    m, f = C.c_void_p(), C.c_void_p(); enter(d); need("cuModuleLoadData", C.byref(m), b"any")
    need("cuModuleGetFunction", C.byref(f), m, name); return f
cs = [c, context(1)]
twins = [kernel_on(d, b"meet_%d_2_100us" % os.getpid()) for d in (0, 1)]
ss = []
for d in (0, 1): enter(d); ss.append(stream())
def go(d, f): enter(d); launch(f, ss[d])
enter(0); f = kernel(100)
def both():
    for d in (0, 1): enter(d); need("cuStreamSynchronize", ss[d])
"""  # one kernel on each of two devices, each of which runs until the other kernel runs


@pytest.mark.timeout(60)  # a failure would never end
def test_a_launch_beyond_the_budget_does_not_wait_for_work_that_waits_for_it(simulator: Simulator) -> None:
    """The first kernel takes longer than the budget and waits for its twin.

    Another kernel is launched before the twin.
    """
    agent = simulator.agent
    unlock(agent, 1)
    process = simulator.start(
        KIT
        + TWINS
        + """
for _ in range(20): go(0, twins[0]); time.sleep(0.02); go(1, twins[1]); both()
out("warm"); go(0, twins[0]); go(0, f); go(1, twins[1]); both(); out("done"); line()"""
    )
    assert said(process) == ["warm"]
    assert said(process) == ["done"]
    assert page(agent) == {**page(agent), "launches": 22, "in_flight": 0}
    tell(process)
    end(process)


def test_a_launch_at_a_reopened_gate_does_not_wait_for_work_that_waits_for_it(simulator: Simulator) -> None:
    """Earlier work waits for a later launch of this thread, so it does not end.

    The thread still reports that it waits, and continues when the gate opens.
    """
    agent = simulator.agent
    unlock(agent, 1)
    process = simulator.start(
        KIT
        + TWINS
        + """
go(0, twins[0]); out("given"); line(); go(0, f); go(1, twins[1]); both(); out("done"); line()"""
    )
    assert said(process) == ["given"]
    shut(agent, 1)
    time.sleep(0.1)
    before = page(agent)["bell"]
    tell(process)
    now = until(agent, waiting=1, bell=before + 1)
    assert (now["in_flight"], now["drained"]) == (1, 0)
    unlock(agent, 2)
    assert said(process) == ["done"]
    tell(process)
    end(process)


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("work", ["launch(f, s)", "need('cuGraphLaunch', g, s)"])
def test_a_wait_for_short_work_shows_its_end_without_an_event_of_the_shim(
    simulator: Simulator, work: str, wait: str
) -> None:
    """A step takes less than a quarter of the budget. The program's own waits show that nothing is in flight."""
    agent = simulator.agent
    unlock(agent, 1, budget=8_000_000_000)
    process = simulator.start(
        KIT
        + f"""
f, s, e = kernel(200), stream(), C.c_void_p(); need("cuEventCreate", C.byref(e), 2)
g, recorded, n = exec_of(f, 3, s), C.c_int.in_dll(L, "recorded"), 0
def step():
    global n
    {work}; need("cuEventRecord", e, s); n += 1
    {wait}
step(); out("waited"); line()
for _ in range(40): step()
out(recorded.value - n); line()""",
        driver=driver_behind(simulator, "counting_driver.c"),
    )
    assert said(process) == ["waited"]
    assert page(agent) == {**page(agent), "launches": 1, "in_flight": 0}
    tell(process)
    assert said(process) == [0]
    assert page(agent) == {**page(agent), "launches": 41, "in_flight": 0}
    tell(process)
    end(process)


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize(("steps", "most"), [(2, 1e9), (31, 60e6)])
def test_work_in_flight_has_an_estimated_end_however_the_program_waited_before(
    simulator: Simulator, wait: str, steps: int, most: float
) -> None:
    """No call shows yet that the work has ended. The page has the time at which it should end, within a factor of 2."""
    agent = simulator.agent
    unlock(agent, 1)
    process = simulator.start(
        KIT
        + f"""
f, s, e = kernel(20000), stream(), C.c_void_p(); need("cuEventCreate", C.byref(e), 2)
for _ in range({steps}):
    launch(f, s); need("cuEventRecord", e, s)
    {wait}
before = time.monotonic_ns(); launch(f, s); at = time.monotonic_ns(); out(before, at); line()"""
    )
    before, given = said(process)
    now = until(agent, launches=steps + 1)
    assert now["in_flight"] == 1
    assert before + 10e6 < now["busy_until"] < given + most
    assert now["wanted"] <= given
    tell(process)
    end(process)


def test_no_event_is_recorded_on_a_stream_that_joined_a_capture(simulator: Simulator) -> None:
    """The stream has launches without an event. They are reported after the end of the capture."""
    agent = simulator.agent
    unlock(agent, 1)
    process = simulator.start(
        KIT
        + """
f, s, t, u, d, e, g = kernel(1), stream(), stream(), stream(), C.c_void_p(), C.c_void_p(), C.c_void_p()
need("cuEventCreate", C.byref(d), 2); need("cuEventCreate", C.byref(e), 2)
for _ in range(40): launch(f, s); need("cuStreamSynchronize", s)
launch(f, s)
need("cuStreamBeginCapture_v2", t, 2); need("cuEventRecord", d, t); need("cuStreamWaitEvent", s, d, 0)
def other(): need("cuCtxSetCurrent", c); launch(f, u)
thread = threading.Thread(target=other); out("ready"); line(); thread.start(); line()
need("cuEventRecord", e, s); need("cuStreamWaitEvent", t, e, 0); out(L.cuStreamEndCapture(t, C.byref(g)))
thread.join(); out("done")"""
    )
    assert said(process) == ["ready"]
    assert page(agent)["in_flight"] == 1
    shut(agent, 1)
    tell(process)
    until(agent, waiting=1)
    time.sleep(0.1)
    assert page(agent) == {**page(agent), "in_flight": 1, "drained": 0}
    tell(process)
    assert said(process) == [0]
    until(agent, in_flight=0, drained=1)
    unlock(agent, 2)
    assert said(process) == ["done"]
    end(process)


def test_a_forked_child_has_no_work_in_flight(simulator: Simulator) -> None:
    """The child has no page of its parent either."""
    agent = simulator.agent
    unlock(agent, 3)
    script = """
f = kernel(50000); launch(f); out("given")
if not os.fork(): out(launch(f), L.cuCtxSynchronize()); os._exit(0)
os.wait(); out(os.getpid() and 1); line(); need("cuCtxSynchronize"); out("done"); line()"""
    process = simulator.start(KIT + script)
    assert [said(process) for _ in range(3)] == [["given"], [3, 3], [1]]
    assert [p["in_flight"] for p in agent.do("status")["pages"] if p["launches"]] == [1]
    tell(process)
    assert said(process) == ["done"]
    assert [p["in_flight"] for p in agent.do("status")["pages"] if p["launches"]] == [0]
    tell(process)
    end(process)


def test_the_shim_keeps_context_capture_mode_errno_and_events_of_the_program(simulator: Simulator) -> None:
    """Current context, capture mode and events stay the program's, whichever events the shim has recorded."""
    agent = simulator.agent
    unlock(agent, 1)
    script = """
f, e, now, mode, a = kernel(100), C.c_void_p(), C.c_void_p(), C.c_int(1), stream()
need("cuEventCreate", C.byref(e), 0); need("cuThreadExchangeStreamCaptureMode", C.byref(mode))
d = C.c_void_p(); need("cuCtxCreate_v2", C.byref(d), 0, 0); g = kernel(100); b = stream()
for i in range(23):
    need("cuCtxSetCurrent", c); launch(f, a); launch(f); need("cuCtxSetCurrent", d); launch(g, b); launch(g)
C.set_errno(77)
need("cuCtxGetCurrent", C.byref(now)); mode.value = 0; need("cuThreadExchangeStreamCaptureMode", C.byref(mode))
need("cuStreamDestroy_v2", b)
out(now.value == d.value, mode.value, L.cuEventQuery(e)); out("given"); line()
launch(g); need("cuCtxGetCurrent", C.byref(now)); out(now.value == d.value, C.get_errno())
need("cuCtxDestroy_v2", d); need("cuCtxSetCurrent", c); need("cuCtxSynchronize"); out("done"); line()"""
    process = simulator.start(KIT + script)
    assert said(process) == [True, 1, 0]
    assert said(process) == ["given"]
    shut(agent, 1)
    tell(process)
    until(agent, drained=1, in_flight=0, waiting=1)
    unlock(agent, 2)
    assert said(process) == [True, 77]
    assert said(process) == ["done"]
    assert page(agent)["in_flight"] == 0
    tell(process)
    end(process)


def test_work_of_another_context_stays_in_flight_after_the_end_of_the_primary_context(simulator: Simulator) -> None:
    agent = simulator.agent
    unlock(agent, 1)
    script = """
d = C.c_void_p(); need("cuCtxCreate_v2", C.byref(d), 0, 0); f, s = kernel(600000), stream(); launch(f, s)
need("cuDevicePrimaryCtxRelease_v2", 0); out(L.cuStreamQuery(s)); line()
need("cuCtxSynchronize"); out("done"); line()
need("cuCtxDestroy_v2", d); out("ended"); line()"""
    process = simulator.start(KIT + script)
    assert said(process) == [600], "not at work"
    assert page(agent)["in_flight"] == 1
    tell(process)
    assert said(process) == ["done"]
    assert page(agent)["in_flight"] == 0
    tell(process)
    assert said(process) == ["ended"]
    tell(process)
    end(process)


@pytest.mark.parametrize("budget", [pytest.param(4_000_000, id="marked"), pytest.param(400_000_000, id="unmarked")])
def test_work_of_a_destroyed_green_context_drains_without_calls_in_that_context(
    simulator: Simulator, budget: int
) -> None:
    """The context's work drains like all other work, and the shim makes no call in a context that has ended."""
    agent = simulator.agent
    unlock(agent, 1, budget=budget)
    script = """
f, g, x = kernel(100), C.c_void_p(), C.c_void_p()
need("cuGreenCtxCreate", C.byref(g), None, 0, 1); need("cuCtxFromGreenCtx", C.byref(x), g); need("cuCtxSetCurrent", x)
h, s = kernel(300000), stream(); launch(h, s); launch(h)
need("cuCtxSetCurrent", c); need("cuGreenCtxDestroy", g); out("given"); line()
launch(f); out(C.c_int.in_dll(L, "misused").value); need("cuCtxSynchronize"); line()"""
    process = simulator.start(KIT + script, driver=driver_behind(simulator, "green_driver.c"))
    assert said(process) == ["given"]
    assert page(agent)["in_flight"] == 2
    shut(agent, 1)
    tell(process)
    until(agent, drained=1, in_flight=0, waiting=1)
    unlock(agent, 2)
    assert said(process) == [0]
    tell(process)
    end(process)


def test_a_failed_launch_is_not_counted(simulator: Simulator) -> None:
    unlock(simulator.agent, 1)
    script = "f = kernel(1); out(L.cuLaunchKernel(f, 0, 1, 1, 1, 1, 1, 0, None, None, None)); line()"
    process = simulator.start(KIT + script)
    assert said(process) == [1]
    assert page(simulator.agent) == {**page(simulator.agent), "launches": 0, "in_flight": 0}
    tell(process)
    end(process)
