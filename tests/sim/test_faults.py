"""Faults of the simulated driver, which tests request."""

from __future__ import annotations

import select
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sim.faults_kit import order

from .conftest import Machine, say

NVML = """
import pynvml as N
N.nvmlInit(); device = N.nvmlDeviceGetHandleByIndex(0)
"""


def test_every_nth_allocation_fails(machine: Machine) -> None:
    script = """
start(); order = lambda: L.cuMemAlloc_v2(C.byref(C.c_uint64()), C.c_size_t(5 << 20)); before = info()[0]
say([order() for _ in range(7)], (before - info()[0]) >> 20)
"""
    order(machine, "alloc-fail:3")
    assert machine.python(script) == ["[0, 0, 2, 0, 0, 2, 0] 30"]
    order(machine, "reset")
    assert machine.python(script) == ["[0, 0, 0, 0, 0, 0, 0] 42"]


def test_faults_apply_from_the_start_of_the_server(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(FGPU_SIM_FAULT="nvml-na,alloc-fail:1")
    script = "start(); say(L.cuMemAlloc_v2(C.byref(C.c_uint64()), C.c_size_t(1)), launch(kernel('f')[1]))"
    assert machine.python(script) == ["2 0"]


def test_the_fault_nvml_na_hides_only_the_memory_of_processes(machine: Machine) -> None:
    pytest.importorskip("pynvml")
    order(machine, "nvml-na")
    script = (
        NVML
        + """
start(); say([p.usedGpuMemory for p in N.nvmlDeviceGetComputeRunningProcesses(device)])
say(N.nvmlDeviceGetMemoryInfo(device).used > 500 << 20, info()[0] > 0)
"""
    )
    assert machine.python(script) == ["[None]", "True True"]
    machine.settles_at(0)
    with machine.spawn("start(); say('up'); wait()") as client:
        assert client.stdout is not None
        client.stdout.readline()
        smi = machine.tools / "nvidia-smi"
        text = machine.run(smi, "--query-compute-apps=pid,used_memory", "--format=csv,noheader").stdout
        assert text == f"{client.pid}, [N/A]\n"
        client.kill()


@pytest.mark.parametrize(("model", "modes"), [("h200", ["[0, 0]", "[1, 1]", "[0, 0]"]), ("t4", [])])
def test_mig_mode_exists_only_on_boards_with_it(
    make_machine: Callable[..., Machine], model: str, modes: list[str]
) -> None:
    pytest.importorskip("pynvml")
    machine, found = make_machine(FGPU_SIM_MODEL=model), []
    for spec in ("reset", "mig", "reset"):
        order(machine, spec)
        ask = "try: say(N.nvmlDeviceGetMigMode(device))\nexcept N.NVMLError_NotSupported: pass"
        found += machine.python(NVML + ask)
    assert found == modes


def test_the_end_of_a_process_can_be_delayed(machine: Machine) -> None:
    """The memory stays in use 3 s longer than usual, even if the fault ends meanwhile."""
    order(machine, "slow-end:3s")
    with machine.spawn("start(); say('up'); wait()") as client:
        assert client.stdout is not None
        client.stdout.readline()
        held = machine.used()
        client.kill()
    killed = time.monotonic()
    order(machine, "reset")
    assert machine.used() == held > 0
    machine.settles_at(0, 4)
    assert time.monotonic() - killed > 2.9


def test_a_stalled_nvml_blocks_no_call_of_cuda(machine: Machine) -> None:
    """A process that is killed while it waits for NVML leaves nothing in the server.

    The stall is much longer than the test, and the end of the faults ends it.
    """
    pytest.importorskip("pynvml")
    before = machine.descriptors()
    order(machine, "nvml-stall:3600s")
    asking = "say('asks'); N.nvmlInit(); say(N.nvmlDeviceGetMemoryInfo(N.nvmlDeviceGetHandleByIndex(0)).total >> 30)"
    with machine.spawn(f"import pynvml as N; {asking}") as waiting:
        with machine.spawn(f"import pynvml as N; {asking}") as gone:
            assert waiting.stdout is not None
            assert gone.stdout is not None
            assert [waiting.stdout.readline(), gone.stdout.readline()] == ["asks\n"] * 2
            time.sleep(0.2)
            gone.kill()
        assert machine.python("start(); say(info()[1] >> 30)") == ["139"]
        assert select.select([waiting.stdout], [], [], 0.2)[0] == []
        order(machine, "reset")
        assert waiting.stdout.readline() == "140\n"
    machine.settles_at(0)
    machine.has_descriptors(before)
    ticks = machine.ticks()
    time.sleep(0.3)
    assert machine.ticks() - ticks < 10


@pytest.mark.parametrize("fault", ["device-reset", "device-lost"])
def test_calls_of_clients_of_a_lost_device_fail(machine: Machine, fault: str) -> None:
    """A program that computes gets an error and keeps nothing. A program that uses NVML must initialize it again."""
    pytest.importorskip("pynvml")
    script = (
        NVML
        + """
import sys
look = lambda: say(type(N.nvmlDeviceGetMemoryInfo(device)).__name__)
def failing():
    try: look()
    except N.NVMLError as error: say(type(error).__name__)
start(); alloc(5 << 20); look(); sys.stdin.readline()
say([L.cuMemAlloc_v2(C.byref(C.c_uint64()), C.c_size_t(1)) > 0 for _ in range(2)])
failing(); sys.stdin.readline(); failing()
N.nvmlShutdown(); N.nvmlInit(); device = N.nvmlDeviceGetHandleByIndex(0); look()
"""
    )
    with machine.spawn(script) as client:
        assert client.stdout
        assert client.stdout.readline() == "c_nvmlMemory_t\n"
        order(machine, fault)
        machine.settles_at(0)
        say(client)
        assert [client.stdout.readline() for _ in range(2)] == ["[True, True]\n", "NVMLError_GpuIsLost\n"]
        order(machine, "reset")
        say(client)
        assert [client.stdout.readline() for _ in range(2)] == ["NVMLError_GpuIsLost\n", "c_nvmlMemory_t\n"]
    assert machine.python("start(); alloc(1); say('fine')") == ["fine"]


def test_nvml_fails_for_one_lost_device_of_two_and_the_other_device_works(make_machine: Callable[..., Machine]) -> None:
    pytest.importorskip("pynvml")
    machine = make_machine(FGPU_SIM_GPUS="2")
    script = (
        NVML
        + """
import sys
def look(index):
    try: return N.nvmlDeviceGetMemoryInfo(N.nvmlDeviceGetHandleByIndex(index)).total >> 30 > 0
    except N.NVMLError as error: return type(error).__name__
def anew():
    N.nvmlShutdown(); N.nvmlInit(); say(N.nvmlDeviceGetCount(), look(0), look(1))
start(); alloc(5 << 20); anew(); sys.stdin.readline()
say(look(0), look(1), L.cuMemAlloc_v2(C.byref(C.c_uint64()), C.c_size_t(1))); anew(); sys.stdin.readline()
say(look(1)); anew()
"""
    )
    with machine.spawn(script) as client:
        assert client.stdout
        assert client.stdout.readline() == "2 True True\n"
        order(machine, "device-lost:1")
        say(client)
        told = [client.stdout.readline() for _ in range(2)]
        assert told == ["True NVMLError_GpuIsLost 0\n", "2 True NVMLError_GpuIsLost\n"]
        order(machine, "reset")
        say(client)
        told = [client.stdout.readline() for _ in range(2)]
        assert told == ["NVMLError_GpuIsLost\n", "2 True True\n"], "NVML must be initialized again to find the device"
    assert order(machine, "device-lost:2", check=False).returncode == 1, "there is no such device"


EVENTS = (
    NVML
    + """
import sys
XID = N.nvmlEventTypeXidCriticalError
def watching(*types):
    found = N.nvmlEventSetCreate()
    for i in range(N.nvmlDeviceGetCount()):
        N.nvmlDeviceRegisterEvents(N.nvmlDeviceGetHandleByIndex(i), sum(types), found)
    return found
def come(found, ms=0):
    try: event = N.nvmlEventSetWait_v2(found, ms)
    except N.NVMLError as error: return type(error).__name__
    assert (event.eventType, event.gpuInstanceId, event.computeInstanceId) == (XID, 2**32 - 1, 2**32 - 1)
    return N.nvmlDeviceGetIndex(event.device), event.eventData
"""
)


def test_xids_reach_the_clients_that_registered_for_them(make_machine: Callable[..., Machine]) -> None:
    """Each set of events gets each device's XIDs in order, once, and none from before its registration."""
    pytest.importorskip("pynvml")
    machine = make_machine(FGPU_SIM_GPUS="2")
    script = """
first, other = watching(XID), watching(N.nvmlEventTypePState)
say(come(first)); sys.stdin.readline()
second = watching(XID)
say([come(first) for _ in range(4)], come(second), come(other)); sys.stdin.readline()
say(come(first), come(second), come(other))
"""
    order(machine, "xid=48")
    with machine.spawn(EVENTS + script) as client:
        assert client.stdout
        for specs, said in (
            (["xid=79:1,xid=13", "xid=31"], "NVMLError_Timeout"),
            (["xid=94:1"], "[(0, 13), (0, 31), (1, 79), 'NVMLError_Timeout'] NVMLError_Timeout NVMLError_Timeout"),
            ([], "(1, 94) (1, 94) NVMLError_Timeout"),
        ):
            assert client.stdout.readline() == f"{said}\n"
            for spec in specs:
                order(machine, spec)
            say(client)


def test_a_client_that_waits_for_an_xid_receives_it(machine: Machine) -> None:
    """Other calls for the device are served during the wait. Only the last 64 XIDs that no call has read are kept."""
    pytest.importorskip("pynvml")
    script = """
import threading
found, heard = watching(XID), []
waiting = threading.Thread(target=lambda: heard.append(come(found, 60000))); waiting.start()
say(N.nvmlDeviceGetMemoryInfo(device).total > 0, heard); waiting.join(); say(heard); sys.stdin.readline()
many = [come(found) for _ in range(66)]
say(many[0], many[63], many[64:])
"""
    with machine.spawn(EVENTS + script) as client:
        assert client.stdout
        assert client.stdout.readline() == "True []\n"
        order(machine, "xid=63")
        assert client.stdout.readline() == "[(0, 63)]\n"
        for first in range(1, 71, 7):
            order(machine, ",".join(f"xid={number}" for number in range(first, first + 7)))
        say(client)
        assert client.stdout.readline() == "(0, 7) (0, 70) ['NVMLError_Timeout', 'NVMLError_Timeout']\n"


def test_waits_and_registrations_for_events_of_a_lost_device_fail(machine: Machine) -> None:
    pytest.importorskip("pynvml")
    script = """
found = watching(XID); say("there"); sys.stdin.readline()
say(come(found))
try: N.nvmlDeviceRegisterEvents(device, XID, found)
except N.NVMLError as error: say(type(error).__name__)
"""
    with machine.spawn(EVENTS + script) as client:
        assert client.stdout
        assert client.stdout.readline() == "there\n"
        order(machine, "xid=79,device-lost")
        say(client)
        assert [client.stdout.readline() for _ in range(2)] == ["NVMLError_GpuIsLost\n"] * 2


def test_a_board_reports_the_events_that_it_supports(machine: Machine) -> None:
    pytest.importorskip("pynvml")
    ask = "say(N.nvmlDeviceGetSupportedEventTypes(device), watching(XID) is not None)"
    assert machine.python(EVENTS + ask) == [f"{0xFF9F} True"]
    ask = "\ntry: watching(1 << 60)\nexcept N.NVMLError_NotSupported: say('none')"
    assert machine.python(EVENTS + ask) == ["none"]


def test_an_xid_of_an_absent_device_is_refused(machine: Machine) -> None:
    done = order(machine, "xid=79:1", check=False)
    assert (done.returncode, done.stderr) == (1, "fgpu-simd: /run/fgpu-sim: there is no such device\n")


def test_a_client_with_an_ecc_error_keeps_its_memory_and_gets_no_more(machine: Machine) -> None:
    """The client's next allocation returns CUDA_ERROR_ECC_UNCORRECTABLE (214). A later client gets memory."""
    ask = "L.cuMemAlloc_v2(C.byref(C.c_uint64()), C.c_size_t(5 << 20))"
    script = f"import sys; start(); alloc(5 << 20); say(); sys.stdin.readline(); say({ask}); wait()"
    with machine.spawn(script) as client:
        assert client.stdout
        client.stdout.readline()
        held = machine.used()
        order(machine, "ecc")
        say(client)
        assert client.stdout.readline() == "214\n"
        assert machine.used() == held > 0
        assert machine.python(f"start(); say({ask})") == ["0"]
        client.kill()
    machine.settles_at(0)


def test_a_missing_nvml_does_not_affect_cuda(machine: Machine) -> None:
    """A client of NVML must initialize NVML again after the end of the fault."""
    pytest.importorskip("pynvml")
    script = (
        NVML
        + """
import sys
def look():
    try: say(type(N.nvmlDeviceGetMemoryInfo(device)).__name__)
    except N.NVMLError as error: say(type(error).__name__)
look(); sys.stdin.readline(); look(); sys.stdin.readline(); look()
N.nvmlShutdown(); N.nvmlInit(); device = N.nvmlDeviceGetHandleByIndex(0); look()
"""
    )
    with machine.spawn(script) as client:
        assert client.stdout
        assert client.stdout.readline() == "c_nvmlMemory_t\n"
        order(machine, "nvml-gone")
        say(client)
        assert client.stdout.readline() == "NVMLError_GpuIsLost\n"
        assert machine.python("start(); alloc(1); say('fine')") == ["fine"]
        begin = "\ntry: N.nvmlInit()\nexcept N.NVMLError as error: say(type(error).__name__)"
        assert machine.python("import pynvml as N" + begin) == ["NVMLError_DriverNotLoaded"]
        order(machine, "reset")
        say(client)
        assert [client.stdout.readline() for _ in range(2)] == ["NVMLError_GpuIsLost\n", "c_nvmlMemory_t\n"]


def test_nvml_that_is_cut_off_says_unknown_error_until_it_is_initialised_again(machine: Machine) -> None:
    pytest.importorskip("pynvml")
    script = (
        NVML
        + """
import sys
say('ready'); sys.stdin.readline()
for _ in range(3):
    try: N.nvmlDeviceGetMemoryInfo(device)
    except N.NVMLError as error: say(type(error).__name__)
N.nvmlShutdown(); N.nvmlInit(); device = N.nvmlDeviceGetHandleByIndex(0)
say(type(N.nvmlDeviceGetMemoryInfo(device)).__name__)
"""
    )
    with machine.spawn(script) as client:
        assert client.stdout
        assert client.stdout.readline() == "ready\n"
        order(machine, "nvml-cut")
        say(client)
        assert [client.stdout.readline() for _ in range(4)] == ["NVMLError_Unknown\n"] * 3 + ["c_nvmlMemory_t\n"]


def test_a_reset_ends_a_stall(machine: Machine) -> None:
    pytest.importorskip("pynvml")
    order(machine, "nvml-stall:60s")
    with machine.spawn(NVML + "say('answered')") as waiting:
        time.sleep(0.3)
        assert waiting.poll() is None
        order(machine, "reset")
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "answered\n"


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "bogus",
        "nvml-stall",
        "nvml-stall:60",
        "nvml-stall:2h",
        "alloc-fail:0",
        "alloc-fail:x",
        "slow-end:3",
        "nvml-na,",
        "xid",
        "xid=",
        "xid=0",
        "xid=1024",
        "xid=79:",
        "xid=79:16",
        "xid=79:1x",
        "xid=-1",
        "device-lost:",
        "device-lost:16",
        "device-lost:-1",
        "device-lost:1x",
        "call-fails",
        "call-fails:",
        "call-fails:park",
        "call-fails:lock:0",
        "call-hangs:loc",
        "x" * 300,
    ],
)
def test_invalid_faults_are_refused(tools: Path, tmp_path: Path, machine: Machine, spec: str) -> None:
    known = "nvml-stall:60s, nvml-na, nvml-gone, nvml-cut, mig, alloc-fail:N, "
    known += "slow-end:3s, device-reset, device-lost[:DEVICE], ecc, xid=79[:DEVICE], call-fails:lock[:N], "
    known += "call-hangs:lock, call-loses:lock (or state, thread, checkpoint, restore, unlock), reset"
    line = f"fgpu-simd: fault is none of {known}: {spec}\n"
    asked = order(machine, spec, check=False)
    assert (asked.returncode, asked.stdout, asked.stderr) == (2, "", line)
    words = ["env", f"FGPU_SIM_FAULT={spec}", tools / "fgpu-simd", "--dir", tmp_path]
    started = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert (started.returncode, started.stdout, started.stderr) == (1, "", line)


def test_only_root_can_set_faults(machine: Machine) -> None:
    """Neither another user nor root in its own pid namespace can set them."""
    simd = machine.tools / "fgpu-simd"
    for prefix in (["setpriv", "--reuid=65534", "--clear-groups"], ["unshare", "--pid", "--fork"]):
        done = machine.run(*prefix, simd, "--fault", "alloc-fail:1", check=False)
        assert done.returncode == 1
        assert "faults are for root" in done.stderr
    assert machine.python("start(); alloc(1); say('fine')") == ["fine"]
    alone = subprocess.run(
        [simd, "--fault", "reset", "--dir", "/nonexistent"], capture_output=True, text=True, timeout=60
    )
    assert (alone.returncode, alone.stderr) == (1, "fgpu-simd: /nonexistent: no server is running here\n")
