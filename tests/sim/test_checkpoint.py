"""One process checkpoints another to host memory by the simulated driver, and restores it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import Popen

import pytest

from tests.sim.checkpoint_kit import (
    CALLER,
    CHECKPOINTED,
    DATA,
    FAILED,
    ILLEGAL_STATE,
    LOCKED,
    NOT_INITIALIZED,
    NOT_READY,
    NOT_SUPPORTED,
    OPERATING_SYSTEM,
    OUT_OF_MEMORY,
    RUNNING,
    ask,
    calling,
    serving,
)
from tests.sim.faults_kit import order
from tests.sim.lifetime_kit import compute_rows
from tests.sim.sharing_kit import SHARING, hear
from tests.support.memory_group import memory_group
from tests.support.wait import Deadline

from .conftest import MIB, Machine, say

HOLDS = DATA + "start(); p = alloc(100 << 20); write(p, 1 << 20)"


@pytest.fixture
def caller(machine: Machine) -> Iterator[Popen[str]]:
    with calling(machine) as program:
        yield program


@pytest.fixture
def target(machine: Machine) -> Iterator[Popen[str]]:
    with serving(machine, HOLDS) as program:
        yield program


def sleeps(program: Popen[str], where: str) -> None:
    """Wait until a program sleeps in a function of the kernel with this part in its name."""
    deadline = Deadline(10)
    while where not in Path(f"/proc/{program.pid}/wchan").read_text():
        assert not deadline.is_over()
        time.sleep(0.005)


def test_a_parked_process_gives_its_memory_back_and_wakes_with_its_data(
    machine: Machine, caller: Popen[str], target: Popen[str]
) -> None:
    held = machine.process(target.pid)
    used = machine.used()
    assert ask(caller, f"park({target.pid})") == "(0, 0)"
    assert machine.used() < used - held["bytes"] + MIB
    assert target.pid not in compute_rows(machine)
    assert ask(caller, f"state({target.pid}), wake({target.pid})") == f"({CHECKPOINTED}, (0, 0))"
    assert machine.used() == used
    assert machine.process(target.pid) == held
    assert compute_rows(machine)[target.pid] == held["bytes"] // MIB
    assert ask(target, "is_intact(p, 1 << 20), alloc(1 << 20).value > 0") == "(True, True)"


def test_a_host_without_other_programs_has_its_whole_device_while_all_are_parked(machine: Machine) -> None:
    """The calling process has memory of the driver too, while it lives."""
    before = machine.used()
    with serving(machine, HOLDS) as target:
        with calling(machine) as caller:
            assert ask(caller, f"park({target.pid})") == "(0, 0)"
        machine.settles_at(before)


@pytest.mark.parametrize(
    "line",
    [
        "alloc(1 << 20).value > 0",
        "need('cuMemFree_v2', p)",
        "need('cuMemsetD8_v2', p, 1, C.c_size_t(1))",
        "need('cuStreamCreate', C.byref(C.c_void_p()), 0)",
        "need('cuEventCreate', C.byref(C.c_void_p()), 0)",
        "launch(f)",
    ],
)
def test_calls_wait_while_the_process_is_locked_or_parked(machine: Machine, caller: Popen[str], line: str) -> None:
    with serving(machine, HOLDS + "; f = kernel('f')[1]") as target:
        for before, after in (("lock({})", "unlock({})"), ("park({})", "wake({})")):
            assert ask(caller, before.format(target.pid)).strip("(), 0") == ""
            say(target, line if before.startswith("lock") or "Free" not in line else "alloc(1 << 20)")
            sleeps(target, "futex")
            assert ask(caller, after.format(target.pid)).strip("(), 0") == ""
            assert hear(target)


@pytest.mark.parametrize(
    "line",
    [
        "L.cuCtxSynchronize()",
        "L.cuStreamSynchronize(s)",
        "L.cuStreamQuery(s)",
        "L.cuEventSynchronize(e)",
        "L.cuEventQuery(e)",
        "L.cuEventElapsedTime(C.byref(C.c_float()), e, e)",
        "L.cuModuleUnload(m)",
    ],
)
def test_a_wait_or_query_of_work_ends_a_parked_process(machine: Machine, caller: Popen[str], line: str) -> None:
    """These calls read memory that is not mapped while the process is parked, on a real device too."""
    made = (
        "; s, e = C.c_void_p(), C.c_void_p()"
        "; need('cuStreamCreate', C.byref(s), 1); need('cuEventCreate', C.byref(e), 0); need('cuEventRecord', e, s)"
        "; m = kernel('f')[0]"
    )
    with serving(machine, HOLDS + made) as target:
        assert ask(caller, f"park({target.pid}), wake({target.pid})") == "((0, 0), (0, 0))"
        assert ask(target, line) == "0"
        assert ask(caller, f"park({target.pid})") == "(0, 0)"
        say(target, line)
        assert target.wait(10) == -signal.SIGSEGV


def test_queries_of_devices_do_not_wait(caller: Popen[str], target: Popen[str]) -> None:
    assert ask(caller, f"park({target.pid})") == "(0, 0)"
    assert ask(target, "L.cuDeviceGetCount(C.byref(C.c_int())), L.cuDriverGetVersion(C.byref(C.c_int()))") == "(0, 0)"


def test_each_call_needs_its_state(caller: Popen[str], target: Popen[str]) -> None:
    pid = target.pid
    calls = f"[f({pid}) for f in (lock, checkpoint, restore, unlock)]"
    assert ask(caller, f"state({pid}), {calls.replace('lock, check', 'check')}") == (
        f"({RUNNING}, {[ILLEGAL_STATE] * 3})"
    )
    assert ask(caller, f"lock({pid}), lock({pid}), restore({pid}), state({pid})") == (
        f"(0, {ILLEGAL_STATE}, {ILLEGAL_STATE}, {LOCKED})"
    )
    assert ask(caller, f"checkpoint({pid}), lock({pid}), checkpoint({pid}), unlock({pid}), state({pid})") == (
        f"(0, {ILLEGAL_STATE}, {ILLEGAL_STATE}, {ILLEGAL_STATE}, {CHECKPOINTED})"
    )
    assert ask(caller, f"restore({pid}), state({pid}), unlock({pid}), state({pid})") == f"(0, {LOCKED}, 0, {RUNNING})"


def test_a_lock_waits_for_work_at_most_for_its_timeout(machine: Machine, caller: Popen[str]) -> None:
    with serving(machine, "start(); f = kernel('spin_2000000us')[1]; launch(f)") as target:
        assert ask(caller, f"lock({target.pid}, 50), state({target.pid})") == f"({NOT_READY}, {RUNNING})"
        assert ask(target, "alloc(1 << 20).value > 0") == "True"  # it goes on
        assert ask(caller, f"lock({target.pid}, 20000), state({target.pid})") == f"(0, {LOCKED})"


def test_a_lock_waits_for_a_thread_inside_a_call(machine: Machine, caller: Popen[str]) -> None:
    with serving(machine, "start(); f = kernel('spin_6000000us')[1]; launch(f)") as target:
        say(target, "need('cuCtxSynchronize')")
        sleeps(target, "nanosleep")  # as cuCtxSynchronize waits; a call that waits for the lock sleeps at a futex
        assert ask(caller, f"lock({target.pid}, 50)") == str(NOT_READY)
        assert ask(caller, f"lock({target.pid}, 30000)") == "0"
        assert hear(target) == "None"


def stop(program: Popen[str]) -> None:
    os.kill(program.pid, signal.SIGSTOP)
    assert os.waitpid(program.pid, os.WUNTRACED) == (program.pid, signal.SIGSTOP << 8 | 0x7F)


def test_a_stopped_process_cannot_be_locked(caller: Popen[str], target: Popen[str]) -> None:
    stop(target)
    assert ask(caller, f"lock({target.pid}, 50), state({target.pid})") == f"({NOT_READY}, {RUNNING})"
    os.kill(target.pid, signal.SIGCONT)
    assert ask(caller, f"park({target.pid})") == "(0, 0)"


def test_only_processes_with_the_driver_can_be_locked_and_only_by_root(machine: Machine, target: Popen[str]) -> None:
    with calling(machine) as caller:
        results = f"({NOT_INITIALIZED}, {-NOT_INITIALIZED}, {OPERATING_SYSTEM}, {OPERATING_SYSTEM})"
        assert ask(caller, f"lock({os.getpid()}), state({os.getpid()}), lock(0), lock(-1)") == results
    user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    with serving(machine, CALLER.partition("\nfor line")[0], user) as caller:
        assert ask(caller, f"lock({target.pid})") == str(OPERATING_SYSTEM)


def test_a_restore_without_room_leaves_the_process_parked(machine: Machine, caller: Popen[str]) -> None:
    with serving(machine, "start(); p = alloc(4 << 30)") as target:
        assert ask(caller, f"park({target.pid})") == "(0, 0)"
        with serving(machine, "start(); q = alloc(info()[0] - (1 << 30))") as other:
            used = machine.used()
            assert ask(caller, f"wake({target.pid})") == f"({OUT_OF_MEMORY}, {ILLEGAL_STATE})"
            assert (ask(caller, f"state({target.pid})"), machine.used()) == (str(CHECKPOINTED), used)
            assert ask(other, "need('cuMemFree_v2', q)") == "None"
            assert ask(caller, f"wake({target.pid})") == "(0, 0)"


def test_a_process_that_dies_while_parked_leaves_nothing(
    machine: Machine, caller: Popen[str], target: Popen[str]
) -> None:
    assert ask(caller, f"park({target.pid})") == "(0, 0)"
    used = machine.used()
    target.kill()
    target.wait()
    deadline = Deadline(10)
    while ask(caller, f"state({target.pid})") != str(-OPERATING_SYSTEM):
        assert not deadline.is_over()
    assert machine.used() == used
    assert [p for p in machine.dump()["processes"] if p["pid"] == target.pid] == []


@pytest.mark.parametrize(
    "holds",
    [
        "need('cuMemAllocManaged', C.byref(C.c_uint64()), C.c_size_t(1 << 20), 1)",
        "export(p)",
        "share_handle()",
    ],
    ids=["managed", "ipc", "exported"],
)
def test_memory_that_the_driver_cannot_checkpoint(machine: Machine, caller: Popen[str], holds: str) -> None:
    shares = """
def share_handle():
    handle, fd = create(2 << 20), C.c_int()
    need("cuMemExportToShareableHandle", C.byref(fd), handle, 1, C.c_uint64(0))
"""
    with serving(machine, SHARING + shares + HOLDS + "; " + holds) as target:
        result = f"((0, {NOT_SUPPORTED}), {LOCKED}, 0)"
        assert ask(caller, f"park({target.pid}), state({target.pid}), unlock({target.pid})") == result
        assert ask(target, "is_intact(p, 1 << 20)") == "True"


def anonymous_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_the_copy_is_memory_of_the_target(machine: Machine, caller: Popen[str]) -> None:
    """The first 64 MiB of what the process holds are taken in full, and a 64th of the rest."""
    with serving(machine, "start(); p = alloc(8 << 30)") as target:
        expected = 64 * 1024 + (machine.process(target.pid)["bytes"] - (64 << 20)) // 64 // 1024
        before = anonymous_kib(target.pid)
        assert ask(caller, f"park({target.pid})") == "(0, 0)"
        assert abs(anonymous_kib(target.pid) - before - expected) < 2048
        assert ask(caller, f"wake({target.pid})") == "(0, 0)"
        assert abs(anonymous_kib(target.pid) - before) < 2048


def test_a_process_without_room_in_its_memory_cgroup_is_killed(machine: Machine, caller: Popen[str]) -> None:
    with (
        memory_group("fgpu-sim", 64 * MIB) as group,
        serving(machine, "start(); p = alloc(1 << 30)", group.entering()) as target,
    ):
        assert ask(caller, f"park({target.pid})") == f"(0, {OPERATING_SYSTEM})"
        assert target.wait(10) == -signal.SIGKILL


def test_the_restore_thread_opens_the_node(caller: Popen[str], target: Popen[str]) -> None:
    def nodes() -> int:
        folder = f"/proc/{target.pid}/fd"
        return sum(os.readlink(f"{folder}/{fd}").endswith("/nvidiactl") for fd in os.listdir(folder))

    thread = int(ask(caller, f"thread({target.pid})"))
    assert thread != target.pid
    assert str(thread) in os.listdir(f"/proc/{target.pid}/task")
    assert nodes() == 1
    assert ask(caller, f"park({target.pid})") == "(0, 0)"
    assert nodes() == 0
    assert ask(caller, f"wake({target.pid})") == "(0, 0)"
    assert nodes() == 1


def test_the_restore_thread_of_a_process_in_a_pid_namespace_has_its_number_outside(
    machine: Machine, caller: Popen[str]
) -> None:
    with serving(machine, HOLDS, ("unshare", "--pid", "--fork", "--kill-child")) as outer:
        pid = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())
        assert ask(caller, f"thread({pid})") in os.listdir(f"/proc/{pid}/task")
        assert ask(caller, f"park({pid}), wake({pid})") == "((0, 0), (0, 0))"
        assert ask(outer, "is_intact(p, 1 << 20)") == "True"


def test_a_call_goes_on_without_its_caller(machine: Machine, target: Popen[str]) -> None:
    with calling(machine) as caller:
        stop(target)
        say(caller, f"lock({target.pid}, 60000)")
        deadline = Deadline(10)
        while Path(f"/proc/{caller.pid}/wchan").read_text() != "__skb_wait_for_more_packets":
            assert not deadline.is_over()
            time.sleep(0.005)
    with calling(machine) as caller:
        assert ask(caller, f"state({target.pid}), lock({target.pid}, 50)") == f"({RUNNING}, {ILLEGAL_STATE})"
        os.kill(target.pid, signal.SIGCONT)
        deadline = Deadline(10)
        while ask(caller, f"state({target.pid})") != str(LOCKED):
            assert not deadline.is_over()
        assert ask(caller, f"unlock({target.pid})") == "0"


@pytest.mark.parametrize(
    ("call", "before", "state"),
    [
        ("lock", "0", RUNNING),
        ("checkpoint", "lock({})", LOCKED),
        ("restore", "park({})", CHECKPOINTED),
        ("unlock", "lock({})", LOCKED),
    ],
)
def test_faults_of_each_call(make_machine: Callable[..., Machine], call: str, before: str, state: int) -> None:
    machine = make_machine()
    with calling(machine) as caller, serving(machine, HOLDS) as target:
        pid = target.pid
        ask(caller, before.format(pid))
        results = f"[{call}({pid}), state({pid})]"
        order(machine, f"call-fails:{call}")
        assert ask(caller, results) == f"[{OPERATING_SYSTEM}, {state}]"
        order(machine, f"reset,call-hangs:{call}")
        say(caller, results)
        with calling(machine) as other:
            assert ask(other, f"state({pid})") == str(state)
        order(machine, "reset")
        assert hear(caller).startswith("[0, ")
        ask(caller, f"wake({pid}), unlock({pid})")
        ask(caller, before.format(pid))
        order(machine, f"call-loses:{call}")
        assert ask(caller, results) == f"[{OPERATING_SYSTEM}, {FAILED}]"
        order(machine, "reset")
        assert ask(caller, f"[f({pid}) for f in (lock, checkpoint, restore, unlock)]") == str([ILLEGAL_STATE] * 4)


def test_one_call_can_fail(machine: Machine, caller: Popen[str], target: Popen[str]) -> None:
    order(machine, "call-fails:lock:2")
    pid = target.pid
    results = f"(0, 0, {OPERATING_SYSTEM}, 0)"
    assert ask(caller, f"lock({pid}), unlock({pid}), lock({pid}), lock({pid})") == results


def test_a_restored_process_outlives_many_cycles(machine: Machine, caller: Popen[str], target: Popen[str]) -> None:
    used, files = machine.used(), machine.descriptors()
    for _ in range(50):
        assert ask(caller, f"park({target.pid}) + wake({target.pid})") == "(0, 0, 0, 0)"
    assert (machine.used(), machine.descriptors()) == (used, files)
    assert ask(target, "is_intact(p, 1 << 20)") == "True"
