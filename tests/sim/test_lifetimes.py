"""Memory exists as long as any process or socket queue has a descriptor of its client's connection."""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import pytest

from .conftest import CLIENT, MIB, Machine, say
from .faults_kit import order
from .lifetime_kit import FILES, KEEPERS, compute_rows
from .server_kit import BLOCK, TAKE, request
from .sharing_kit import hear

CONTEXT = 518
OVERHEAD = 3407872 + 5832704  # in no process's row: the first part once, the second for each context
HOLD = f"{FILES}\nstart(); alloc(100 << 20); say('holding'); serve()"


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("seed", range(12))
def test_memory_stays_until_the_last_close(machine: Machine, seed: int) -> None:
    """The client is killed, and up to four other holders of its connection end, in a random order."""
    chance = random.Random(seed)
    with machine.spawn(HOLD) as client:
        assert hear(client) == "holding"
        held = machine.used()
        ends = [KEEPERS[way](client) for way in chance.choices(list(KEEPERS), k=seed % 5)]
        ends.insert(chance.randrange(len(ends) + 1), client.kill)
        for number, end in enumerate(ends):
            end()
            if number == len(ends) - 1:
                break
            if end == client.kill:
                client.wait()
            time.sleep(0.15)
            row = machine.process(client.pid)
            assert (row["bytes"], row["ended"]) == ((CONTEXT + 100) * MIB, client.poll() is not None)
            assert compute_rows(machine) == {client.pid: CONTEXT + 100}
            assert machine.used() == held
    machine.settles_at(0)
    assert compute_rows(machine) == {}


def test_memory_is_freed_80_to_200_ms_after_the_last_close(machine: Machine) -> None:
    """The first process is freed at that time. The second one is freed a minute later, so that its plan can be read."""
    for delay_s in (0, 60):
        if delay_s:
            order(machine, f"slow-end:{delay_s}s")
        with machine.spawn(HOLD) as client:
            hear(client)
            held = machine.used()
            end = KEEPERS["other"](client)
            client.kill()
            client.wait()
            time.sleep(0.2)
            assert machine.process(client.pid)["freed_after_us"] == 0
            assert machine.used() == held
            closed = time.monotonic()
            end()
        if not delay_s:
            machine.settles_at(0)
            assert time.monotonic() - closed >= 0.08
    assert 80_000 <= machine.freed_after_us(client.pid) - 60_000_000 < 200_000
    assert machine.used() == held


def test_each_client_has_the_driver_s_node_open(machine: Machine) -> None:
    """Each process has it open from cuInit, under a name that host tools recognize.

    Executed programs do not inherit it.
    """
    script = (
        FILES
        + """
say(driver_files()); start(); say(len(driver_files()), [os.get_inheritable(fd) for fd in driver_files()])
say(sorted(os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in driver_files()), flush=True)
if not os.fork():
    say(len(driver_files())); os._exit(0)
os.wait(); need("cuDevicePrimaryCtxRelease_v2", 0); say(len(driver_files()))
"""
    ).replace(", flush=True", "")
    expected = ["[]", "2 [False, False]", "['/run/fgpu-sim/nvidiactl', 'socket']", "2", "2"]
    assert machine.python(script) == expected


def executing(script: str) -> str:
    """Return a script that executes another program, which inherits the driver's descriptors."""
    return f"""
for fd in driver_files(): os.set_inheritable(fd, True)
os.execv(sys.executable, [sys.executable, "-c", {CLIENT + FILES + script!r}])
"""


def test_an_executed_program_keeps_the_memory_of_inherited_descriptors(machine: Machine) -> None:
    """The process continues under its pid. It has the memory until it closes the descriptors or exits."""
    executed = executing("say('there'); serve()")
    with machine.spawn(f"{FILES}\nstart(); alloc(100 << 20); {executed}") as client:
        assert hear(client) == "there"
        time.sleep(0.15)
        assert compute_rows(machine) == {client.pid: CONTEXT + 100}
        assert machine.process(client.pid)["ended"] is False
        client.kill()
    machine.settles_at(0)


def test_one_row_shows_the_memory_of_both_connections_of_a_process(machine: Machine) -> None:
    """One connection is inherited, and the executed program opens the other."""
    executed = executing("start(); alloc(20 << 20); say('again'); wait()")
    with machine.spawn(f"{FILES}\nstart(); alloc(100 << 20); {executed}") as client:
        assert hear(client) == "again"
        assert compute_rows(machine) == {client.pid: 2 * CONTEXT + 120}
        assert [p["pid"] for p in machine.dump()["processes"]] == [client.pid] * 2
        say(client)
    machine.settles_at(0)


def test_requests_on_the_connection_of_an_ended_process_are_not_read(machine: Machine) -> None:
    """The requests come from a child that has inherited the connection."""
    message = request(TAKE, kind=BLOCK, context=1, size=50 * MIB).hex()
    child = f"""
import select
(fd,) = [fd for fd in driver_files() if os.readlink(f"/proc/self/fd/{{fd}}").startswith("socket:")]
ask = lambda: (os.write(fd, bytes.fromhex({message!r})), len(select.select([fd], [], [], 0.3)[0]))[1]
if not os.fork():
    say(ask()); os.read(fd, 4096); wait(); say(ask()); wait(); os._exit(0)
time.sleep(60)
"""
    with machine.spawn(f"{FILES}\nstart(); alloc(100 << 20); {child}") as client:
        assert hear(client) == "1"  # its parent lives, and the driver cannot distinguish the two
        held = machine.used()
        kill(client.pid)
        time.sleep(0.15)
        say(client)
        assert hear(client) == "0"
        assert machine.used() == held
        assert machine.python("start(); say('served')") == ["served"]
        say(client)
    machine.settles_at(0)


def test_kernels_of_an_ended_process_do_not_run(machine: Machine) -> None:
    pytest.importorskip("pynvml")
    busy = """
import pynvml as N
N.nvmlInit(); device = N.nvmlDeviceGetHandleByIndex(0)
try: say([p.pid for p in N.nvmlDeviceGetProcessUtilization(device, 0)])
except N.NVMLError as error: say(error)
"""
    with machine.spawn(f"{FILES}\nstart(); launch(kernel('spin_9000000us')[1]); say('busy'); serve()") as client:
        assert hear(client) == "busy"
        end = KEEPERS["other"](client)
        time.sleep(0.3)
        assert machine.python(busy) == [str([client.pid])]
        client.kill()
        client.wait()
        time.sleep(0.05)
        assert machine.python(busy) == ["Not Found"]
        assert compute_rows(machine) == {client.pid: CONTEXT}
        end()
    machine.settles_at(0)


NAMESPACE = """
import pynvml as N
N.nvmlInit(); device = N.nvmlDeviceGetHandleByIndex(0)
rows = lambda: sorted((p.pid, p.usedGpuMemory >> 20) for p in N.nvmlDeviceGetComputeRunningProcesses(device))
"""


def test_an_ended_process_keeps_its_pid_in_every_namespace(machine: Machine) -> None:
    pytest.importorskip("pynvml")
    script = f"""
{NAMESPACE}
holder = os.fork()
if not holder:
    start(); alloc(100 << 20); say("holding")
    if os.fork(): time.sleep(60)
    time.sleep(60)
sys.stdin.readline(); os.kill(holder, 9); os.wait(); time.sleep(0.15); say(rows(), holder)
sys.stdin.readline()
"""
    prefix = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with machine.spawn(script, prefix=prefix) as client:
        assert hear(client) == "holding"
        (outside,) = compute_rows(machine)
        say(client)
        assert hear(client) == "[(2, 618)] 2"
        assert compute_rows(machine) == {outside: CONTEXT + 100}
        say(client)
    machine.settles_at(0)


def test_a_new_namespace_lists_no_process_of_a_removed_one(machine: Machine) -> None:
    """The kernel reuses inodes of pid namespaces, except those of processes that the driver still lists."""
    pytest.importorskip("pynvml")
    prefix = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    machine.run(machine.tools / "fgpu-simd", "--fault", "slow-end:14s")
    with machine.spawn("start(); say('holding'); wait()", prefix=prefix) as client:
        assert hear(client) == "holding"
        (pid,) = compute_rows(machine)
        kill(pid)
    time.sleep(0.15)
    for _ in range(3):
        words = [*prefix, sys.executable, "-c", CLIENT + NAMESPACE + "say(rows())"]
        assert machine.run(*words).stdout == "[]\n"
    assert compute_rows(machine) == {pid: CONTEXT}
    machine.settles_at(0, 15)
