"""The view of a tenant: its share of a device, only its own processes, and the driver's own errors."""

from typing import Any

import pytest

from tests.shim.shim_kit import SYSTEM_PYTHON, Agent
from tests.shim.view_kit import NVML

GIB, NO_LIMIT = 1 << 30, 2**64 - 1


@pytest.mark.parametrize(
    ("limit", "used", "free", "total"),
    [
        (8 * GIB, 0, 8 * GIB, 8 * GIB),
        (8 * GIB, 3 * GIB, 5 * GIB, 8 * GIB),
        (12 * GIB, 0, 10 * GIB, 12 * GIB),  # the driver has less free
        (64 * GIB, 0, 10 * GIB, 16 * GIB),
        (NO_LIMIT, 0, 10 * GIB, 16 * GIB),
        (2 * GIB, 3 * GIB, 0, 2 * GIB),  # lowered below the bytes in use
        (2 * GIB, 99 * GIB, 0, 2 * GIB),
        (0, 0, 0, 0),
    ],
)
def test_cuda_shows_the_share(held: Agent, limit: int, used: int, free: int, total: int) -> None:
    held.do("limit", limit=limit, used=used)
    script = "t = C.c_size_t(); out(info(), L.cuDeviceTotalMem_v2(C.byref(t), 0), t.value)"
    assert held.python(script) == [[[0, free, total], 0, total]]


VIEWS = "out(info()[1:], memory(0)[1:], memory2(0)[1:])"


def test_the_narrowest_level_is_shown(held: Agent) -> None:
    """Memory of the group's other tenants is neither used nor free.

    It is reserved, if the function has such a field.
    """
    held.do("set", levels=2)
    held.do("limit", limit=8 * GIB, used=GIB)
    held.do("limit", level=1, limit=4 * GIB, used=3 * GIB)
    expected = [[GIB, 4 * GIB], [4 * GIB, GIB, GIB], [4 * GIB, 2 * GIB, GIB, GIB]]
    assert held.python(NVML + VIEWS) == [expected]


@pytest.mark.parametrize(
    ("limit", "used", "shown"),
    [
        (8 * GIB, 3 * GIB, [8 * GIB, 0, 5 * GIB, 3 * GIB]),
        (12 * GIB, GIB, [12 * GIB, GIB, 10 * GIB, GIB]),  # within the limit, and not available on the device
        (2 * GIB, 3 * GIB, [2 * GIB, 0, 0, 2 * GIB]),  # lowered below the bytes in use
        (64 * GIB, 2 * GIB, [17 * GIB, 5 * GIB, 10 * GIB, 2 * GIB]),
        (NO_LIMIT, 2 * GIB, [17 * GIB, GIB, 10 * GIB, 6 * GIB]),  # the driver's own answer
        (0, 0, [0, 0, 0, 0]),
    ],
)
def test_the_fields_of_nvml_s_second_memory_info_show_the_share_and_add_up(
    held: Agent, limit: int, used: int, shown: list[int]
) -> None:
    """Total, reserved, free and used add up as the driver's own."""
    held.do("limit", limit=limit, used=used)
    assert held.python(NVML + "out(memory2(0))") == [[[0, *shown]]]
    assert shown[0] == sum(shown[1:])


OBSERVES = 1
AS_IT_IS = [[10 * GIB, 16 * GIB], [17 * GIB, 10 * GIB, 7 * GIB], [17 * GIB, GIB, 10 * GIB, 6 * GIB]]


@pytest.mark.parametrize("levels", [1, 2])
def test_an_observed_tenant_gets_the_driver_s_own_figures(held: Agent, levels: int) -> None:
    """The tenant's programs read their neighbours' processes, and a limit below the bytes in use has no effect."""
    held.do("set", levels=levels, rows=ROWS)
    for level in range(levels):
        held.do("limit", level=level, limit=GIB, used=2 * GIB, flags=OBSERVES)
    script = """
out(processes("nvmlDeviceGetComputeRunningProcesses_v3", Info, 8)[:2], utilisation(), accounted())
t = C.c_size_t(); out(L.cuDeviceTotalMem_v2(C.byref(t), 0), t.value)"""
    expected = [AS_IT_IS, [[0, 1], [0, 3, [666, 41, 666, 0]], [0, 3, [666, 43, 667, 0]]], [0, 16 * GIB]]
    assert held.python(NVML + FILTERED + VIEWS + script) == expected


def test_an_observed_level_beside_an_enforcing_one_counts_as_unlimited(held: Agent) -> None:
    """The enforcing level is shown, and hides the neighbours."""
    held.do("set", levels=2, rows=ROWS)
    for observed, other in ((0, 1), (1, 0)):
        held.do("limit", level=observed, limit=GIB, used=GIB, flags=OBSERVES)
        held.do("limit", level=other, limit=4 * GIB, used=GIB)
        script = VIEWS + '\nout(processes("nvmlDeviceGetComputeRunningProcesses_v3", Info, 8)[:2])'
        expected = [[3 * GIB, 4 * GIB], [4 * GIB, 3 * GIB, GIB], [4 * GIB, 0, 3 * GIB, GIB]]
        assert held.python(NVML + script) == [expected, [[0, 2]]]


def test_the_limit_of_a_level_that_changes_to_enforce_is_shown_at_once(held: Agent) -> None:
    held.do("limit", limit=GIB, flags=OBSERVES)
    process = held.start_python(NVML + VIEWS + "\nsys.stdin.readline()\n" + VIEWS)
    assert process.stdout.readline() == f"{AS_IT_IS}\n"
    held.do("limit", limit=GIB)
    assert process.communicate("\n", timeout=10)[0].startswith(f"[[{GIB}, {GIB}], [{GIB}, {GIB}, 0]")


def test_a_device_outside_the_policy_is_shown_with_the_driver_s_figures(held: Agent) -> None:
    script = NVML + "L.fake_context(3); out(info(), memory(2), memory2(2))"
    expected = [[0, 10 * GIB, 16 * GIB], [0, 17 * GIB, 10 * GIB, 7 * GIB], [0, 17 * GIB, GIB, 10 * GIB, 6 * GIB]]
    assert held.python(script) == [expected]


def test_nvml_shows_the_share(held: Agent) -> None:
    held.do("limit", limit=8 * GIB, used=3 * GIB)
    expected = [[0, 8 * GIB, 5 * GIB, 3 * GIB], [0, 8 * GIB, 0, 5 * GIB, 3 * GIB]]
    assert held.python(NVML + "out(memory(0), memory2(0))") == [expected]


def test_use_above_the_limit_is_shown_as_the_limit(held: Agent) -> None:
    """Only the driver's other libraries can take more, such as a video decoder."""
    held.do("limit", limit=2 * GIB, used=99 * GIB)
    assert held.python(NVML + "out(memory(0))") == [[[0, 2 * GIB, 0, 2 * GIB]]]


def test_nvml_shows_the_limit_of_each_device(held: Agent) -> None:
    held.do("limit", device=4, limit=2 * GIB)
    assert held.python(NVML + "out(memory(1)[1], memory(0)[1])") == [[2 * GIB, GIB]]


@pytest.mark.parametrize("answer", ["unmanaged", "closed"])
def test_an_unmanaged_process_reads_all_memory_and_one_without_an_answer_none(agent: Agent, answer: str) -> None:
    agent.do("set", answer="magic" if answer == "closed" else answer)
    agent.do("start")
    script = NVML + 'out(info()[1:], memory(0)[1:3], processes("nvmlDeviceGetComputeRunningProcesses_v3", Info, 8)[1])'
    free, listed = (0, 0) if answer == "closed" else (10 * GIB, 1)
    assert agent.python(script) == [[[free, 16 * GIB], [17 * GIB, free], listed]]


def test_the_driver_s_errors_are_returned_unchanged(held: Agent) -> None:
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


def test_process_lists_contain_only_own_processes(held: Agent) -> None:
    v3 = 'processes("nvmlDeviceGetComputeRunningProcesses_v3", Info, 8{})'
    none = 0xFFFFFFFF
    assert listed(held, v3.format("")) == [0, 2, [[41, 5 << 20, none, none], [43, 7 << 20, none, none]]]
    assert listed(held, v3.format(", 1")) == [0, 1, [[42, 6 << 20, none, none]]]


def test_the_old_process_lists_contain_only_own_processes(held: Agent) -> None:
    v1 = listed(held, 'processes("nvmlDeviceGetComputeRunningProcesses", Info1, 8)')
    assert v1 == [0, 2, [[41, 5 << 20], [43, 7 << 20]]]


@pytest.mark.parametrize(("room", "result"), [(0, [7, 2, []]), (1, [7, 2, []])])
def test_a_too_small_array_returns_the_needed_size(held: Agent, room: int, result: list[Any]) -> None:
    assert listed(held, f'processes("nvmlDeviceGetComputeRunningProcesses_v3", Info, {room})') == result


@pytest.mark.parametrize("version", ["", "_v2", "_v3"])
@pytest.mark.parametrize("kind", ["Compute", "Graphics", "MPSCompute"])
def test_every_version_of_every_process_list_is_filtered(held: Agent, kind: str, version: str) -> None:
    """Processes with memory are in the list of compute processes. The other lists are empty."""
    name, shape = f"nvmlDeviceGet{kind}RunningProcesses{version}", "Info" if version else "Info1"
    pids = [41, 43] if kind == "Compute" else []
    count, *rows = listed(held, f'(lambda l: [l[1], *l[2]])(processes("{name}", {shape}, 8))')
    assert (count, [row[0] for row in rows]) == (len(pids), pids)
    assert listed(held, f'processes("{name}", {shape}, 0)') == [7 if pids else 0, len(pids), []]


def test_process_details_are_of_own_processes(held: Agent) -> None:
    script = """(lambda a: (lambda d: [N.nvmlDeviceGetRunningProcessDetailList(device(0), C.byref(d)),
        d.count, a[0].pid, a[1].pid])(Details(0, 0, 8, a)))((Detail * 8)())"""
    assert listed(held, script) == [0, 2, 41, 43]


FILTERED = """
def utilisation():
    a, n = (Sample * 4)(), C.c_uint(4)
    return [N.nvmlDeviceGetProcessUtilization(device(0), a, C.byref(n), C.c_uint64(0)), n.value, [x.pid for x in a]]
def utilisation2(room=4):
    a = (Info2 * 4)(); u = Infos(0, room, 0, a if room else None)
    return [N.nvmlDeviceGetProcessesUtilizationInfo(device(0), C.byref(u)), u.count, [x.pid for x in a]]
def sessions(name, kind):
    a, n = (kind * 3)(), C.c_uint(3)
    return [getattr(N, name)(device(0), C.byref(n), a), n.value, [(x.id, x.pid) for x in a]]
def accounted(room=4):
    a, n = (C.c_uint * 4)(), C.c_uint(room)
    return [N.nvmlDeviceGetAccountingPids(device(0), C.byref(n), a if room else None), n.value, list(a)]
def account(pid):
    one, two = Stats(), Stats2(pid)
    results = [N.nvmlDeviceGetAccountingStats(device(0), pid, C.byref(one)), one.most]
    return results + [N.nvmlDeviceGetAccountingStats_v2(device(0), C.byref(two)), two.most]
"""


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("utilisation()", [0, 1, [41, 0, 0, 0]]),
        ("utilisation2()", [0, 1, [41, 0, 0, 0]]),
        ("utilisation2(0)", [7, 3, [0, 0, 0, 0]]),
        ('sessions("nvmlDeviceGetEncoderSessions", Encoder)', [0, 1, [[2, 41], [0, 0], [0, 0]]]),
        ('sessions("nvmlDeviceGetFBCSessions", Capture)', [0, 1, [[2, 41], [0, 0], [0, 0]]]),
        ("accounted()", [0, 1, [43, 0, 0, 0]]),
        ("accounted(0)", [7, 3, [0, 0, 0, 0]]),
        ("account(43)", [0, 43, 0, 43]),
        ("account(666)", [6, 0, 6, 0]),
        ("account(1)", [6, 0, 6, 0]),
    ],
)
def test_utilisation_sessions_and_accounting_contain_only_own_processes(
    held: Agent, call: str, result: list[Any]
) -> None:
    """Other processes are removed from the caller's array. The result is "not found" if no process is left."""
    held.do("set", rows=ROWS)
    assert held.python(NVML + FILTERED + f"out({call})") == [[result]]
    held.do("set", rows=[])
    if call == "utilisation()":
        assert held.python(NVML + FILTERED + f"out({call})") == [[[6, 0, [0, 0, 0, 0]]]]


def test_the_process_table_is_not_read_during_a_change(held: Agent) -> None:
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


def test_the_shim_does_not_change_errno(held: Agent) -> None:
    script = """
C.set_errno(77); V = C.CDLL("libnvidia-ml.so.1", use_errno=True); m = Memory()
out(V.nvmlDeviceGetMemoryInfo(device(0), C.byref(m)), m.total, C.get_errno())
"""
    assert held.python(NVML + script) == [[0, GIB, 77]]


def test_a_program_that_uses_only_nvml_sends_a_hello(held: Agent) -> None:
    script = "import ctypes as C; N = C.CDLL('libnvidia-ml.so.1'); N.nvmlInit_v2()"
    held.run(SYSTEM_PYTHON, "-c", script)
    assert held.do("look")["hellos"] == 1
