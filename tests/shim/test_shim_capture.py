"""The shim's own driver calls break no capture, even in the strictest capture mode.

Recorded results of a real driver show which calls are harmless during a capture (tests/sim/conformance_h200.txt,
sections `capture` and `asides`). The simulated driver returns the same results. All other calls are made in relaxed
mode, and none of them concerns a stream that captures.
"""

import re
from collections.abc import Callable

import pytest

from tests.shim.area_kit import FUNCTIONS
from tests.shim.gate_kit import KIT, driver_behind, end, said, shut, tell, unlock, until
from tests.shim.shim_kit import ROOT, Simulator

GIB = 1 << 30

# Every call that may be made in any mode of the program's thread, and the recorded lines that prove it: how the call
# and the capture ended, or how the capture continued and ended.
HARMLESS = {
    "cuThreadExchangeStreamCaptureMode": [r"capture\.exchanged\.nothing 0 0 1 0 1 0"],
    "cuStreamIsCapturing": [
        r"capture\.blocking\.capturing\.legacy 0 906 1 0 1 0",
        r"capture\.global\.nothing 0 0 1 0 1 0",
    ],
    "cuStreamIsCapturing_ptsz": [r"capture\.blocking\.capturing\.legacy 0 906 1 0 1 0"],
    "cuStreamGetDevice": [r"asides\.(aside|blocking)\.device\.other 0 0", r"asides\.aside\.device\.legacy 0 0"],
    "cuStreamGetDevice_ptsz": [r"asides\.(aside|blocking)\.device\.own 0 0"],
    "cuCtxGetDevice": [r"asides\.(aside|blocking)\.device 0 0"],
    "cuCtxGetCurrent": [r"asides\.(aside|blocking)\.current 0 0"],
    "cuCtxPushCurrent_v2": [r"asides\.(aside|blocking)\.push 0 0"],
    "cuCtxPopCurrent_v2": [r"asides\.(aside|blocking)\.push 0 0"],
    "cuDevicePrimaryCtxGetState": [r"asides\.(aside|blocking)\.primary 0 0"],
}

# No test here makes these calls. Each is in one function with a call that is made, and so in the same mode.
BESIDE = {
    "cuDeviceGetUuid": "cuDeviceGetUuid_v2",  # older drivers lack it
    "cuEventDestroy_v2": "cuEventCreate",  # if idle contexts had too many events
    "cuGraphChildGraphNodeGetGraph": "cuGraphNodeGetType",  # the simulated driver has no child graphs
}

SECOND = """
d = context(1); f1 = kernel(1); s1 = stream(); need("cuCtxSetCurrent", c)
"""
CAPTURE = """
V, own = C.c_void_p, need
f, s, t, g = kernel(1), stream(FLAGS), stream(), V()
def new(n, where=t, name="cuMemAllocAsync"):
    p = C.c_uint64(); r = getattr(L, name)(C.byref(p), C.c_size_t(n), where); return r or p.value
def on(which, call):
    need("cuCtxSetCurrent", which); r = call(); need("cuCtxSetCurrent", c); return r
def captured(*calls):
    n = C.c_size_t(); g.value = None
    need("cuStreamBeginCapture_v2", s, 0)
    rs = [call() for call in calls] + [launch(f, s)]
    r = L.cuStreamEndCapture(s, C.byref(g))
    if not r: own("cuGraphGetNodes", g, None, C.byref(n)); need("cuGraphDestroy", g)
    return rs, r, n.value
"""


def both(simulator: Simulator, verb: Callable[..., None], turn: int) -> None:
    """Set a budget so large that a stream's launches have no event until another thread needs one."""
    for device in (3, 4):
        simulator.agent.do("limit", device=device, limit=GIB)
        verb(simulator.agent, turn, device=device, budget=1_000_000_000)


@pytest.mark.parametrize("flags", [0, 1], ids=["blocking", "aside"])
@pytest.mark.parametrize("gated", [False, True], ids=["free", "gated"])
def test_a_capture_survives_launches_on_every_device(simulator: Simulator, flags: int, gated: bool) -> None:
    """One thread uses two devices. It uses the capturing device's default stream only where the driver allows it."""
    both(simulator, unlock, 1 if gated else 0)
    own = "" if flags == 0 else ", lambda: launch(f)"
    script = f"""
many = [stream() for _ in range(40)]
for _ in range(2):
    out(*captured(lambda: launch(f, t), lambda: on(d, lambda: launch(f1, s1)), lambda: on(d, lambda: launch(f1)),
                  lambda: L.cuLaunchKernel_ptsz(f, 1, 1, 1, 1, 1, 1, 0, None, None, None),
                  lambda: max(launch(f, u) for u in many){own}))
need("cuCtxSynchronize")"""
    results = [0] * (6 + flags)
    text = simulator.python(KIT + SECOND + CAPTURE.replace("FLAGS", str(flags)) + script)
    assert text == f"{[results, 0, 1]}\n".replace("'", '"') * 2


@pytest.mark.parametrize("devices", ["", SECOND], ids=["one device", "two"])
@pytest.mark.parametrize("name", ["cuMemAllocAsync", "cuMemAllocAsync_ptsz"])
def test_a_thread_without_a_context_breaks_no_capture(simulator: Simulator, name: str, devices: str) -> None:
    """The driver refuses the call before it checks captures, so the shim's earlier calls must not break a capture."""
    both(simulator, unlock, 1)
    script = f"""
def other():
    got.append(new(1000, None, "{name}"))
def beside():
    thread = threading.Thread(target=other); thread.start(); thread.join(); return got[-1]
got = []
out(*captured(beside)); out(*captured(beside))"""
    assert simulator.python(KIT + devices + CAPTURE.replace("FLAGS", "1") + script) == "[[201, 0], 0, 1]\n" * 2


def test_calls_that_may_break_a_capture_use_relaxed_mode(simulator: Simulator) -> None:
    """The program captures, waits at gates that close, and uses pools, graphs and contexts."""
    both(simulator, unlock, 1)
    process = simulator.start(
        KIT
        + SECOND
        + CAPTURE.replace("FLAGS", "1")
        + FUNCTIONS
        + """
L.modes_name.restype = C.c_char_p
def own(*call): L.modes_note(0); need(*call); L.modes_note(1)
def report():
    names, at = [], 0
    while name := L.modes_name(at): names.append((name.decode(), L.modes_made(at), L.modes_unrelaxed(at))); at += 1
    return [n for n, made, _ in names if made], [n for n, _, unrelaxed in names if unrelaxed]
def pool_of(device):
    h, props = V(), (C.c_int * 22)(1, 0, 1, device); need("cuMemPoolCreate", C.byref(h), props); return h
def memory():
    "Allocates memory of every kind. One size is refused, after the shim has trimmed the pools."
    p = C.c_uint64(); need("cuMemAllocFromPoolAsync", C.byref(p), C.c_size_t(MiB), kept, t); ps = [p.value]
    ps += [new(64 * MiB), new(64 * MiB, s1), new(64 * MiB, None, "cuMemAllocAsync_ptsz")]
    need("cuMemAllocFromPoolAsync", C.byref(p), C.c_size_t(MiB), pools[0], t); ps.append(p.value)
    for at in ps: L.cuMemFreeAsync(C.c_uint64(at), t)
    need("cuStreamSynchronize", t); info(); alloc(2 * GiB); alloc(MiB)
    need("cuMemAllocManaged", C.byref(p), C.c_size_t(MiB), 1); need("cuMemPoolDestroy", pools[0])
def graphs():
    "Captures and launches a graph that allocates memory."
    p, e = C.c_uint64(), V()
    need("cuStreamBeginCapture_v2", s, 0); need("cuMemAllocAsync", C.byref(p), C.c_size_t(MiB), s); launch(f, s)
    need("cuMemFreeAsync", p, s); need("cuStreamEndCapture", s, C.byref(g))
    need("cuGraphInstantiateWithFlags", C.byref(e), g, C.c_ulonglong(0)); need("cuGraphLaunch", e, t)
    need("cuStreamSynchronize", t); need("cuGraphExecDestroy", e)
def firsts():
    "Launches code with more local memory than before, loads variables, and sets the size of the heap."
    need("cuLaunchKernel", of(2048), *[1] * 6, 0, t, None, None)
    need("cuLaunchKernel", entry(library(local(3000))), *[1] * 6, 0, t, None, None); stack(1024)
    k = entry(library(data(4 * MiB)), "glob"); need("cuKernelGetFunction", C.byref(V()), k); launch(k, t)
    need("cuCtxSetLimit", 2, C.c_size_t(16 * MiB)); launch(of(100), t)
def contexts():
    made, p = V(), C.c_uint64(); need("cuCtxCreate_v2", C.byref(made), 0, 1)
    need("cuMemAllocManaged", C.byref(p), C.c_size_t(MiB), 1); need("cuCtxDestroy_v2", made)
    need("cuCtxSetCurrent", c)
    need("cuDevicePrimaryCtxRetain", C.byref(made), 1); need("cuDevicePrimaryCtxRelease_v2", 1)
    L.cuGreenCtxDestroy(None)
x = V(); need("cuCtxCreate_v2", C.byref(x), 0, 0); fx = kernel(1); crowd = [stream() for _ in range(40)]
need("cuCtxSetCurrent", c); L.modes_note(1); alloc(1)
many, pools = [stream() for _ in range(40)], [pool_of(0)]
kept = V(); own("cuDeviceGetDefaultMemPool", C.byref(kept), 1); graphs(); memory(); firsts(); contexts()
for u in many[:3]: launch(f, u)
on(d, lambda: launch(f1, s1)); out("ready"); line()
def other(): need("cuCtxSetCurrent", c); launch(f, t)
thread = threading.Thread(target=other); thread.start(); line()
out(*captured(lambda: launch(f, s))); line(); thread.join()
out(*captured(*[lambda u=u: launch(f, u) for u in many], lambda: on(x, lambda: max(launch(fx, u) for u in crowd)),
              lambda: on(d, lambda: launch(f1, s1)), lambda: launch(f)))
need("cuStreamDestroy_v2", many[0]); need("cuCtxSynchronize"); out(*report())""",
        driver=driver_behind(simulator, "modes_driver.c"),
    )
    assert said(process) == ["ready"]
    both(simulator, shut, 2)
    tell(process)
    until(simulator.agent, waiting=1, drained=2)
    tell(process)
    assert said(process) == [[0, 0], 0, 2]
    both(simulator, unlock, 3)
    tell(process)
    assert said(process) == [[0] * 44, 0, 1]
    made, unrelaxed = said(process)
    end(process)
    assert set(unrelaxed) <= HARMLESS.keys()
    table = (ROOT / "shim/core/hook_table.h").read_text()
    needed = {name for name in re.findall(r"\bNEED\((\w+)\)", table) if name.startswith("cu")}
    assert needed - set(made) == BESIDE.keys()
    assert set(BESIDE.values()) <= set(made) - set(unrelaxed)


def test_calls_listed_as_harmless_were_recorded_as_harmless() -> None:
    recorded = (ROOT / "tests" / "sim" / "conformance_h200.txt").read_text()
    for name, lines in HARMLESS.items():
        for line in lines:
            assert re.search(rf"^{line}$", recorded, re.M), (name, line)
    assert not re.search(r"^asides\..*\.pool 0 ", recorded, re.M)
    assert not re.search(r"^asides\..*\.device\.capturing 0 ", recorded, re.M)
