"""The parker parks and wakes real processes, and leaves no process halfway after any failure."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from tests.parker.parker_kit import HOLDS, SIZE, Connection, Parker, is_intact, named, stopped, waits_in_driver
from tests.sim.checkpoint_kit import ask, serving
from tests.sim.conftest import Machine
from tests.sim.faults_kit import order
from tests.support.memory_group import memory_group
from tests.support.wait import Deadline, remove_cgroup

PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
GIB = 1 << 30


@pytest.fixture
def other(machine: Machine) -> Iterator[Popen[str]]:
    """Return a second program."""
    with serving(machine, HOLDS) as program:
        yield program


def at(replies: list[dict[str, Any]]) -> list[str]:
    return [reply.get("at") or reply["result"] for reply in replies]


def test_processes_are_parked_and_woken_with_their_data(
    machine: Machine, parker: Parker, target: Popen[str], other: Popen[str]
) -> None:
    pids, used = (target.pid, other.pid), machine.used()
    assert at(parker.replies("park", *pids)) == ["locked", "checkpointed", "parked"]
    assert machine.dump()["processes"] == []
    assert parker.states(*pids) == ["checkpointed", "checkpointed"]
    assert parker.result("park", *pids) == {"result": "parked"}  # it is done already
    assert at(parker.replies("wake", *pids)) == ["restored", "running"]
    assert (machine.used(), parker.states(*pids)) == (used, ["running", "running"])
    assert is_intact(target)
    assert is_intact(other)


def test_processes_may_have_another_job_as_soon_as_the_result_is_there(parker: Parker, target: Popen[str]) -> None:
    for _ in range(20):
        for op in ("park", "wake"):
            connection = parker.begin(op, target.pid)
            while "result" not in (reply := json.loads(connection.lines.readline())):
                pass
            assert "error" not in reply, reply
            connection.lines.close()
            connection.sock.close()


def test_the_parker_itself_never_loads_the_driver(parker: Parker, target: Popen[str]) -> None:
    assert parker.states(target.pid) == ["running"]
    assert "libcuda" not in Path(f"/proc/{parker.process.pid}/maps").read_text()


def test_all_processes_run_again_if_one_cannot_be_parked(machine: Machine, parker: Parker, target: Popen[str]) -> None:
    managed = "; need('cuMemAllocManaged', C.byref(C.c_uint64()), C.c_size_t(1 << 20), 1)"
    with serving(machine, HOLDS + managed) as unable:
        assert parker.replies("park", target.pid, unable.pid)[-1] == {
            "result": "running",
            "error": f"cuCheckpointProcessCheckpoint of process {unable.pid} returned CUDA_ERROR_NOT_SUPPORTED",
        }
        assert parker.states(target.pid, unable.pid) == ["running", "running"]
        assert is_intact(target)
        assert is_intact(unable)


def test_a_busy_process_lets_all_others_run_again(machine: Machine, parker: Parker, target: Popen[str]) -> None:
    with serving(machine, "start(); launch(kernel('spin_60000000us')[1])") as busy:
        error = f"process {busy.pid} was not idle within 1.5 s"
        assert parker.replies("park", target.pid, busy.pid, lock_ms=1500) == [{"result": "running", "error": error}]
        assert parker.states(target.pid, busy.pid) == ["running", "running"]


def test_processes_stay_parked_if_one_cannot_be_restored(
    machine: Machine, parker: Parker, target: Popen[str], other: Popen[str]
) -> None:
    pids = (target.pid, other.pid)
    assert parker.result("park", *pids) == {"result": "parked"}
    order(machine, "call-fails:restore:2")
    error = f"cuCheckpointProcessRestore of process {other.pid} returned CUDA_ERROR_OPERATING_SYSTEM"
    assert parker.result("wake", *pids) == {"result": "parked", "error": error}
    assert parker.states(*pids) == ["checkpointed", "checkpointed"]
    assert at(parker.replies("wake", *pids)) == ["restored", "running"]


def test_a_process_that_the_driver_loses_is_reported_as_lost(
    machine: Machine, parker: Parker, target: Popen[str], other: Popen[str]
) -> None:
    order(machine, "call-loses:checkpoint")
    reply = parker.result("park", target.pid, other.pid)
    assert reply["result"] == "lost"
    assert f"the driver has lost process {target.pid}" in reply["error"]


# -- processes that cannot be parked


def test_a_stopped_process_is_refused(parker: Parker, target: Popen[str]) -> None:
    with stopped(target.pid):
        refused = {"result": "running", "error": f"process {target.pid} is stopped"}
        assert parker.replies("park", target.pid) == [{**refused, "changed": False}]
    assert parker.result("park", target.pid) == {"result": "parked"}
    with stopped(target.pid):
        assert parker.replies("wake", target.pid) == [{**refused, "result": "parked"}]
    assert parker.result("wake", target.pid) == {"result": "running"}


def test_a_traced_process_is_refused(parker: Parker, target: Popen[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.ptrace(PTRACE_SEIZE, target.pid, None, None) == 0
    try:
        error = f"process {target.pid} is traced by process {os.getpid()}"
        assert parker.replies("park", target.pid) == [{"result": "running", "error": error, "changed": False}]
    finally:
        os.kill(target.pid, signal.SIGSTOP)
        os.waitpid(target.pid, 0)
        libc.ptrace(PTRACE_DETACH, target.pid, None, None)
        os.kill(target.pid, signal.SIGCONT)


def test_a_process_in_a_frozen_cgroup_is_refused(machine: Machine, parker: Parker) -> None:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    root = next(Path(line.split()[4]) for line in mounts if " - cgroup2 " in line)
    outer = root / f"fgpu-frozen-{os.getpid()}"
    inner = outer / "inner"
    inner.mkdir(parents=True)
    enter = ("sh", "-c", f'echo $$ >{inner}/cgroup.procs; exec "$@"', "-")
    try:
        with serving(machine, HOLDS, enter) as target:
            (outer / "cgroup.freeze").write_text("1")
            assert parker.result("park", target.pid) == {
                "result": "running",
                "error": f"process {target.pid} is in the frozen cgroup /{outer.name}/inner",
                "changed": False,
            }
            (outer / "cgroup.freeze").write_text("0")
            assert parker.result("park", target.pid) == {"result": "parked"}
    finally:
        (outer / "cgroup.freeze").write_text("0")
        remove_cgroup(inner)
        remove_cgroup(outer)


def test_another_process_with_the_same_pid_is_not_touched(parker: Parker, target: Popen[str]) -> None:
    (process,) = named(target.pid)
    process["started"] -= 1
    request = {"op": "park", "processes": [process], "bytes": SIZE}
    reply = {"result": "running", "error": f"process {target.pid} has ended", "changed": False}
    assert Connection(parker.path, request).replies() == [reply]
    assert parker.states(target.pid) == ["running"]


def test_a_process_without_cuda_is_refused(parker: Parker) -> None:
    error = f"the state of process {os.getpid()} is unknown, not running"
    assert parker.replies("park", os.getpid()) == [{"result": "running", "error": error, "changed": False}]


def test_a_copy_that_does_not_fit_in_a_memory_cgroup_is_refused(machine: Machine, parker: Parker) -> None:
    with memory_group("fgpu-parker", GIB) as group, serving(machine, HOLDS, group.entering()) as target:
        reply = parker.result("park", target.pid, bytes=2 * GIB)
        assert reply["result"] == "running"
        what = rf"the cgroup /{group.folder.name} has room for \d\.\d\d GiB \(memory.* is 1\.00 GiB\)"
        assert re.fullmatch(f"{what}, and the copy may need 2.24 GiB", reply["error"])
        assert parker.states(target.pid) == ["running"]
        assert parker.result("park", target.pid) == {"result": "parked"}


def test_a_copy_that_does_not_fit_in_the_host_is_refused(parker: Parker, target: Popen[str]) -> None:
    reply = parker.result("park", target.pid, bytes=1 << 49)
    assert reply["error"].startswith("the host has ")
    assert reply["error"].endswith(" GiB of memory available, and the copy may need 587202.56 GiB")


def test_a_driver_without_the_functions_is_named(machine: Machine, tmp_path: Path, target: Popen[str]) -> None:
    library = tmp_path / "lib" / "libcuda.so.1"
    library.parent.mkdir()
    library.write_bytes((machine.tools / "lib" / "libnvidia-ml.so.1").read_bytes())
    parker = Parker(machine, tmp_path)
    error = f"{library} has no functions to checkpoint a process: parking needs NVIDIA driver 570 or later"
    assert parker.replies("park", target.pid) == [{"result": "running", "error": error, "changed": False}]
    parker.end()


# -- ends and hangs


def begin_hanging(machine: Machine, parker: Parker, call: str, op: str, target: Popen[str], **more: Any) -> Connection:
    """Begin a job that hangs in a call."""
    order(machine, f"call-hangs:{call}")
    connection = parker.begin(op, target.pid, **more)
    waits_in_driver(parker.worker())
    if call == "checkpoint":
        assert connection.lines.readline() == '{"at":"locked"}\n'
    return connection


def test_a_process_with_a_job_gets_no_second_one(
    machine: Machine, parker: Parker, target: Popen[str], other: Popen[str]
) -> None:
    connection = begin_hanging(machine, parker, "checkpoint", "park", target)
    error = f"process {target.pid} has a job already"
    assert parker.replies("park", other.pid, target.pid) == [{"result": "running", "error": error}]
    assert parker.replies("wake", target.pid) == [{"result": "parked", "error": error}]
    order(machine, "reset")
    assert at(connection.replies()) == ["checkpointed", "parked"]
    assert parker.result("park", other.pid) == {"result": "parked"}


def test_a_call_that_hangs_blocks_only_its_job(
    machine: Machine, parker: Parker, target: Popen[str], other: Popen[str]
) -> None:
    assert parker.result("park", target.pid) == {"result": "parked"}
    connection = begin_hanging(machine, parker, "restore", "wake", target)
    assert parker.result("park", other.pid) == {"result": "parked"}
    order(machine, "reset")
    assert at(connection.replies()) == ["restored", "running"]


def test_a_job_that_hangs_is_undone(machine: Machine, parker: Parker, target: Popen[str]) -> None:
    connection = begin_hanging(machine, parker, "checkpoint", "park", target, deadline_ms=4000, bytes=1)
    (reply,) = connection.replies()
    assert reply == {
        "result": "running",
        "error": f"a call of the driver timed out (processes: {target.pid} locked)",
    }
    assert is_intact(target)


@pytest.mark.parametrize(("call", "state"), [("lock", "running"), ("checkpoint", "locked")])
def test_a_job_with_a_killed_process_is_undone(
    machine: Machine, parker: Parker, target: Popen[str], call: str, state: str
) -> None:
    connection = begin_hanging(machine, parker, call, "park", target)
    os.kill(parker.worker(), signal.SIGKILL)
    (reply,) = connection.replies()
    error = f"the process of the job has ended with signal 9 (processes: {target.pid} {state})"
    assert reply == {"result": "running", "error": error}
    assert is_intact(target)


@pytest.mark.parametrize(("call", "state"), [("restore", "checkpointed"), ("unlock", "locked")])
def test_a_wake_up_with_a_killed_process_is_completed(
    machine: Machine, parker: Parker, target: Popen[str], call: str, state: str
) -> None:
    assert parker.result("park", target.pid) == {"result": "parked"}
    connection = begin_hanging(machine, parker, call, "wake", target)
    worker = parker.worker()
    os.kill(worker, signal.SIGSTOP)  # otherwise it could go on and end
    order(machine, "reset")  # the recovery must not hang too
    os.kill(worker, signal.SIGKILL)
    reply = connection.replies()[-1]
    assert reply["result"] == "running"
    assert is_intact(target)


def test_a_job_goes_on_without_its_client(machine: Machine, parker: Parker, target: Popen[str]) -> None:
    connection = begin_hanging(machine, parker, "checkpoint", "park", target)
    connection.lines.close()
    connection.sock.close()
    order(machine, "reset")
    assert states_after_the_job(parker, target.pid) == {str(target.pid): "checkpointed"}
    assert parker.result("wake", target.pid) == {"result": "running"}


def states_after_the_job(parker: Parker, pid: int) -> dict[str, str]:
    """Ask for the state of a process until it has no job, and return the state."""
    deadline = Deadline(10)
    while "states" not in (reply := parker.result("state", pid)):
        assert reply == {"result": "", "error": f"process {pid} has a job already"}
        assert not deadline.is_over()
    return dict(reply["states"])


def leave_job(machine: Machine, parker: Parker, call: str, op: str, target: Popen[str]) -> str:
    """Kill the parker during a job that hangs, start the next one, and return its error for the process."""
    connection = begin_hanging(machine, parker, call, op, target)
    parker.kill()
    assert connection.replies() == []
    parker.restart()
    return f"process {target.pid} has a job already"


def test_the_states_are_not_read_while_a_job_changes_them(machine: Machine, parker: Parker, target: Popen[str]) -> None:
    """A process that is being restored has the state of a parked one, and may run in the next moment."""
    assert parker.result("park", target.pid) == {"result": "parked"}
    error = leave_job(machine, parker, "restore", "wake", target)
    assert parker.result("state", target.pid) == {"result": "", "error": error}
    order(machine, "reset")
    assert states_after_the_job(parker, target.pid) == {str(target.pid): "running"}


def test_a_job_goes_on_without_its_parker(machine: Machine, parker: Parker, target: Popen[str]) -> None:
    """The next parker gives the process no second job meanwhile."""
    error = leave_job(machine, parker, "checkpoint", "park", target)
    assert parker.result("wake", target.pid) == {"result": "parked", "error": error}
    order(machine, "reset")
    deadline = Deadline(10)
    while (reply := parker.result("wake", target.pid)).get("error") == error:
        assert not deadline.is_over()
    assert reply == {"result": "running"}
    assert is_intact(target)


def test_a_parker_that_waits_for_its_jobs_ends_after_them(machine: Machine, target: Popen[str]) -> None:
    parker = Parker(machine, None, "--wait-for-jobs")
    connection = begin_hanging(machine, parker, "checkpoint", "park", target)
    parker.process.send_signal(signal.SIGTERM)
    with pytest.raises(ConnectionError):  # no new job
        Connection(parker.path, {"op": "x"}).replies()
    assert parker.process.poll() is None
    order(machine, "reset")
    assert at(connection.replies()) == ["checkpointed", "parked"]
    assert parker.process.wait(10) == 0


def test_a_process_that_ends_while_parked_is_reported(parker: Parker, target: Popen[str], other: Popen[str]) -> None:
    pids = (target.pid, other.pid)
    processes = named(*pids)
    assert parker.result("park", *pids) == {"result": "parked"}
    target.kill()
    target.wait()
    request = {"op": "state", "processes": processes}
    states = {str(target.pid): "gone", str(other.pid): "checkpointed"}
    assert Connection(parker.path, request).replies() == [{"states": states}]
    assert at(Connection(parker.path, {**request, "op": "wake"}).replies()) == ["restored", "running"]
    assert is_intact(other)
    gone = Connection(parker.path, {"op": "wake", "processes": processes[:1]}).replies()
    assert gone == [{"result": "lost", "error": "all processes have ended"}]


# -- the socket

AS_USER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "


def test_only_root_can_connect(machine: Machine, parker: Parker) -> None:
    words = (*AS_USER, sys.executable, "-c", CONNECT, "/run/fgpu/parker.sock")
    assert "PermissionError" in machine.run(*words, check=False).stderr


def test_only_root_gets_a_reply(machine: Machine, parker: Parker) -> None:
    parker.path.chmod(0o666)
    ask = CONNECT + "s.sendall(b'x\\n'); print(s.recv(100))"
    words = (*AS_USER, sys.executable, "-c", ask, "/run/fgpu/parker.sock")
    done = machine.run(*words, check=False)
    assert done.stdout == "b''\n" or "BrokenPipeError" in done.stderr or "ConnectionResetError" in done.stderr
    assert Connection(parker.path, {"op": "x"}).replies()[0]["error"].startswith("the request has none")


def test_a_client_that_sends_no_request_loses_its_connection(parker: Parker) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(str(parker.path))
        assert sock.recv(10) == b""


def test_a_parker_without_a_socket_file_ends(parker: Parker) -> None:
    """`fgpu detach` removes the file."""
    parker.path.unlink()
    assert parker.process.wait(20) == 0


def test_a_socket_can_be_passed_by_systemd(machine: Machine, target: Popen[str]) -> None:
    """The parker uses it, and makes no other."""
    start = """
import os, socket, sys
os.mkdir("/run/fgpu")
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/fgpu/passed.sock"); listener.listen()
os.dup2(listener.fileno(), 3); os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.executable, [sys.executable, "-m", "fgpu_ebpf.parker", "--driver-root", sys.argv[1]])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    words = machine.command(sys.executable, "-c", start, machine.tools)
    with subprocess.Popen(words, env=environment, cwd="/") as process:
        run_dir = Path(f"/proc/{machine.server.pid}/root/run/fgpu")
        deadline = Deadline(10)
        while not (run_dir / "passed.sock").exists():
            assert not deadline.is_over()
            time.sleep(0.01)
        request = {"op": "state", "processes": named(target.pid)}
        assert Connection(run_dir / "passed.sock", request).replies() == [{"states": {str(target.pid): "running"}}]
        assert not (run_dir / "parker.sock").exists()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_many_cycles_leave_nothing_behind(machine: Machine, parker: Parker, target: Popen[str]) -> None:
    files = len(os.listdir(f"/proc/{parker.process.pid}/fd"))
    used = machine.used()
    for _ in range(20):
        assert parker.result("park", target.pid) == {"result": "parked"}
        assert parker.result("wake", target.pid) == {"result": "running"}
    deadline = Deadline(10)  # the last process of a job may not have ended yet
    while (len(os.listdir(f"/proc/{parker.process.pid}/fd")), machine.used()) != (files, used):
        assert not deadline.is_over()
        time.sleep(0.01)
    children = Path(f"/proc/{parker.process.pid}/task/{parker.process.pid}/children").read_text()
    assert children == ""
    assert ask(target, "alloc(1 << 20).value > 0") == "True"
