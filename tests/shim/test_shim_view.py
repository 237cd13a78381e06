"""What a tenant sees: its share of a device, its own processes, and the driver's own errors."""

from typing import Any

import pytest
from shim_kit import SYSTEM_PYTHON, Agent

GIB, NO_LIMIT = 1 << 30, 2**64 - 1

NVML = """
N = C.CDLL("libnvidia-ml.so.1")
class Memory(C.Structure): _fields_ = [(n, C.c_uint64) for n in ("total", "free", "used")]
class Memory2(C.Structure):
    _fields_ = [("version", C.c_uint)] + [(n, C.c_uint64) for n in ("total", "reserved", "free", "used")]
class Info1(C.Structure): _fields_ = [("pid", C.c_uint), ("used", C.c_uint64)]
class Info(C.Structure): _fields_ = Info1._fields_ + [("gi", C.c_uint), ("ci", C.c_uint)]
class Detail(C.Structure): _fields_ = Info._fields_ + [("cc", C.c_uint64)]
class Details(C.Structure):
    _fields_ = [("version", C.c_uint), ("mode", C.c_uint), ("count", C.c_uint), ("array", C.POINTER(Detail))]
class Sample(C.Structure):
    _fields_ = [("pid", C.c_uint), ("stamp", C.c_uint64)] + [(n, C.c_uint) for n in ("sm", "mem", "enc", "dec")]
def device(i):
    d = C.c_void_p(); N.nvmlDeviceGetHandleByIndex_v2(i, C.byref(d)); return d
def memory(i):
    m = Memory(); return [N.nvmlDeviceGetMemoryInfo(device(i), C.byref(m)), m.total, m.free, m.used]
def memory2(i, version=Memory2):
    m = Memory2(C.sizeof(Memory2) | 2 << 24)
    return [N.nvmlDeviceGetMemoryInfo_v2(device(i), C.byref(m)), m.total, m.reserved, m.free, m.used]
def processes(name, kind, room, d=0):
    n, a = C.c_uint(room), (kind * 8)()
    r = getattr(N, name)(device(d) if d is not None else C.c_void_p(99), C.byref(n), a if room else None)
    return [r, n.value, [[getattr(x, f[0]) for f in kind._fields_] for x in a[: n.value if r == 0 else 0]]]
N.nvmlInit_v2()
"""


@pytest.mark.parametrize(
    ("limit", "used", "free", "total"),
    [
        (8 * GIB, 0, 8 * GIB, 8 * GIB),
        (8 * GIB, 3 * GIB, 5 * GIB, 8 * GIB),
        (12 * GIB, 0, 10 * GIB, 12 * GIB),  # the driver has less
        (64 * GIB, 0, 10 * GIB, 16 * GIB),
        (NO_LIMIT, 0, 10 * GIB, 16 * GIB),
        (2 * GIB, 3 * GIB, 0, 3 * GIB),  # lowered below what is used
        (2 * GIB, 99 * GIB, 0, 16 * GIB),
        (0, 0, 0, 0),
    ],
)
def test_cuda_shows_the_share(held: Agent, limit: int, used: int, free: int, total: int) -> None:
    held.do("limit", limit=limit, used=used)
    script = "t = C.c_size_t(); out(info(), L.cuDeviceTotalMem_v2(C.byref(t), 0), t.value)"
    assert held.python(script) == [[[0, free, total], 0, total]]


def test_the_narrowest_level_is_shown(held: Agent) -> None:
    held.do("set", levels=2)
    held.do("limit", limit=8 * GIB, used=GIB)
    held.do("limit", level=1, limit=4 * GIB, used=3 * GIB)
    assert held.python(NVML + "out(info(), memory(0))") == [[[0, GIB, 4 * GIB], [0, 4 * GIB, GIB, GIB]]]


def test_an_observed_level_changes_no_view(held: Agent) -> None:
    held.do("limit", limit=GIB, flags=1)
    assert held.python("out(info())") == [[[0, 10 * GIB, 16 * GIB]]]


def test_a_device_that_is_not_the_tenants_is_shown_as_it_is(held: Agent) -> None:
    script = NVML + "L.fake_context(3); out(info(), memory(2), memory2(2))"
    expected = [[0, 10 * GIB, 16 * GIB], [0, 17 * GIB, 10 * GIB, 7 * GIB], [0, 17 * GIB, GIB, 10 * GIB, 6 * GIB]]
    assert held.python(script) == [expected]


def test_nvml_shows_the_share(held: Agent) -> None:
    held.do("limit", limit=8 * GIB, used=3 * GIB)
    expected = [[0, 8 * GIB, 5 * GIB, 3 * GIB], [0, 8 * GIB, 0, 5 * GIB, 3 * GIB]]
    assert held.python(NVML + "out(memory(0), memory2(0))") == [expected]


def test_more_used_than_there_is_shows_as_all(held: Agent) -> None:
    held.do("limit", limit=2 * GIB, used=99 * GIB)
    assert held.python(NVML + "out(memory(0))") == [[[0, 17 * GIB, 0, 17 * GIB]]]


def test_nvml_has_a_limit_for_each_device(held: Agent) -> None:
    held.do("limit", device=4, limit=2 * GIB)
    assert held.python(NVML + "out(memory(1)[1], memory(0)[1])") == [[2 * GIB, GIB]]


@pytest.mark.parametrize("answer", ["unmanaged", "closed"])
def test_unmanaged_sees_all_and_closed_nothing_to_have(agent: Agent, answer: str) -> None:
    agent.do("set", answer="magic" if answer == "closed" else answer)
    agent.do("start")
    script = NVML + 'out(info()[1:], memory(0)[1:3], processes("nvmlDeviceGetComputeRunningProcesses_v3", Info, 8)[1])'
    free, listed = (0, 0) if answer == "closed" else (10 * GIB, 1)
    assert agent.python(script) == [[[free, 16 * GIB], [17 * GIB, free], listed]]


def test_the_drivers_errors_stay(held: Agent) -> None:
    script = (
        NVML.replace("N.nvmlInit_v2()", "")
        + """
t, u = C.c_size_t(), 0
L.fake_context(0)
out(info()[0], L.cuDeviceTotalMem_v2(C.byref(t), 9), memory(0)[0],
    processes("nvmlDeviceGetComputeRunningProcesses_v3", Info, 8)[0])
N.nvmlInit_v2()
m = Memory2(1)
out(N.nvmlDeviceGetMemoryInfo_v2(device(0), C.byref(m)),
    processes("nvmlDeviceGetComputeRunningProcesses_v3", Info, 8, None)[0])
"""
    )
    assert held.python(script) == [[201, 101, 1, 1], [25, 2]]


ROWS = [[41, 3, 5 << 20], [42, 4, 6 << 20], [43, 3, 7 << 20]]


def listed(held: Agent, call: str) -> Any:
    held.do("set", rows=ROWS)
    return held.python(NVML + f"out({call})")[0][0]


def test_own_processes_alone(held: Agent) -> None:
    v3 = 'processes("nvmlDeviceGetComputeRunningProcesses_v3", Info, 8{})'
    none = 0xFFFFFFFF
    assert listed(held, v3.format("")) == [0, 2, [[41, 5 << 20, none, none], [43, 7 << 20, none, none]]]
    assert listed(held, v3.format(", 1")) == [0, 1, [[42, 6 << 20, none, none]]]


def test_own_processes_in_the_old_shape(held: Agent) -> None:
    v1 = listed(held, 'processes("nvmlDeviceGetComputeRunningProcesses", Info1, 8)')
    assert v1 == [0, 2, [[41, 5 << 20], [43, 7 << 20]]]


@pytest.mark.parametrize(("room", "result"), [(0, [7, 2, []]), (1, [7, 2, []])])
def test_too_little_room_says_how_much(held: Agent, room: int, result: list[Any]) -> None:
    assert listed(held, f'processes("nvmlDeviceGetComputeRunningProcesses_v3", Info, {room})') == result


@pytest.mark.parametrize("kind", ["Graphics", "MPSCompute"])
def test_other_lists_are_empty(held: Agent, kind: str) -> None:
    name = f"nvmlDeviceGet{kind}RunningProcesses_v3"
    assert listed(held, f'processes("{name}", Info, 8)') == [0, 0, []]
    assert listed(held, f'processes("{name}", Info, 0)') == [0, 0, []]


def test_details_are_of_own_processes(held: Agent) -> None:
    script = """(lambda a: (lambda d: [N.nvmlDeviceGetRunningProcessDetailList(device(0), C.byref(d)),
        d.count, a[0].pid, a[1].pid])(Details(0, 0, 8, a)))((Detail * 8)())"""
    assert listed(held, script) == [0, 2, 41, 43]


def test_utilisation_is_of_own_processes_and_the_rest_is_wiped(held: Agent) -> None:
    script = """(lambda a, n: [N.nvmlDeviceGetProcessUtilization(device(0), a, C.byref(n), C.c_uint64(0)), n.value,
        [(x.pid, x.sm) for x in a]])((Sample * 4)(), C.c_uint(4))"""
    assert listed(held, script) == [0, 1, [[41, 11], [0, 0], [0, 0], [0, 0]]]


def test_a_table_in_the_middle_of_a_change_is_not_read(held: Agent) -> None:
    held.do("set", rows=ROWS)
    script = (
        NVML
        + """
p = lambda: processes("nvmlDeviceGetComputeRunningProcesses_v3", Info, 8)[1]
out(p()); sys.stdin.readline(); out(p()); sys.stdin.readline(); out(p())"""
    )
    process = held.start_python(script)
    seen = [process.stdout.readline()]
    for sequence in (3, 4):
        held.do("bump", sequence=sequence)
        process.stdin.write("\n")
        process.stdin.flush()
        seen.append(process.stdout.readline())
    process.communicate(timeout=10)
    assert seen == ["[2]\n", "[0]\n", "[2]\n"]


def test_errno_is_the_programs(held: Agent) -> None:
    script = """
C.set_errno(77); V = C.CDLL("libnvidia-ml.so.1", use_errno=True); m = Memory()
out(V.nvmlDeviceGetMemoryInfo(device(0), C.byref(m)), m.total, C.get_errno())
"""
    assert held.python(NVML + script) == [[0, GIB, 77]]


def test_nvml_alone_says_hello(held: Agent) -> None:
    script = "import ctypes as C; N = C.CDLL('libnvidia-ml.so.1'); N.nvmlInit_v2()"
    held.run(SYSTEM_PYTHON, "-c", script)
    assert held.do("look")["hellos"] == 1
