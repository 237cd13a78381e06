"""Every end of a process frees its memory within a second, and leaves no entry in the ledger."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.commands import ask, events, fgpu, output
from tests.support.host import BUILD, CONTEXT, ENVIRONMENT, FGPU, GIB, MIB, REFUSED
from tests.support.sim_driver import driver_books, unnamed_bytes
from tests.support.tenant import Client, Program, Tenant
from tests.support.wait import Deadline, eventually, quiet_seconds, steadily

HELD = 4 * MIB


def ledger_pids() -> set[int]:
    """Return the pids that `fgpu ps` shows."""
    return {row["pid"] for row in output("ps")}


def bystander(one: Tenant) -> Client:
    """Start a client with a context. The free memory that it reads changes at once with that of the tenant."""
    client = one.client()
    client.ok("context")
    return client


def assert_released(bystander: Client, free: int) -> None:
    """Check that this many bytes are free again within a second."""
    eventually(lambda: bystander.ok("info")[0] == free, 1, f"{free} bytes free")


def breed(one: Tenant, count: int) -> tuple[Client, list[int]]:
    """Start children that hold memory, half of them without their first thread. Return their parent and their pids."""
    parent = one.client()
    before = set(one.pids())
    parent.send(f"brood {count} {HELD}")
    assert parent.numbers(parent.receive(60), "brood") == [count]
    return parent, [pid for pid in one.pids() if pid not in before]


def anomalies() -> dict[str, int]:
    """Return the kernel's counts of anomalies that should not happen."""
    found = ask(verb="snapshot")["anomalies"]
    return {kind: found[kind] for kind in ("release", "full", "device", "lost")}


def kill_all(pids: list[int]) -> None:
    """Kill these processes with SIGKILL, all at once."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.places("host", "runc")
def test_memory_of_killed_processes_is_free_within_a_second(tenant, scale) -> None:
    each, limit = 8, 16 * GIB
    tenants = [tenant(limit) for _ in range(3)]
    watchers = [bystander(one) for one in tenants]
    free = watchers[0].ok("info")[0]
    killed: set[int] = set()
    while len(killed) < scale(24, 100, 1000):
        broods = [breed(one, each) for one in tenants]
        pids = [pid for _, brood in broods for pid in brood]
        assert len(pids) == 3 * each
        for one in tenants:
            assert one.assert_exact() == CONTEXT + each * (CONTEXT + HELD)
        kill_all(pids)
        for watcher in watchers:
            assert_released(watcher, free)
        for parent, _ in broods:
            assert parent.ok("reap") == [each]
        killed |= set(pids)
    assert not killed & ledger_pids()
    for one in tenants:
        assert one.assert_exact() == CONTEXT
        assert {p["pid"] for p in one.view()["processes"]} & killed == set()


@pytest.mark.places("runc")
def test_a_process_killed_in_a_call_or_an_admission_leaves_no_memory_charged(tenant, scale) -> None:
    """F2: each process allocates and frees without a pause, so that few of them are killed between two calls."""
    one = tenant(16 * GIB)
    watcher = bystander(one)
    free, before = watcher.ok("info")[0], anomalies()
    for _ in range(scale(1, 4, 120)):
        parent = one.client()
        others = set(one.pids())
        assert parent.ok(f"bustle 8 {HELD}") == [8]
        pids = [pid for pid in one.pids() if pid not in others]
        assert len(pids) == 8
        seen = one.memory()["witnessed_bytes"]
        eventually(lambda seen=seen: one.memory()["witnessed_bytes"] > seen + 800 * MIB, 10, "allocations")  # type: ignore[misc]
        kill_all(pids)
        assert_released(watcher, free)
        assert parent.ok("reap") == [8]
        parent.close()
        eventually(lambda parent=parent: parent.pid not in one.pids(), 5, "the exit of the parent")  # type: ignore[misc]
    assert one.assert_exact() == CONTEXT
    assert anomalies() == before


@pytest.mark.slow
@pytest.mark.places("host", "runc")
def test_zombies_hold_no_memory(tenant) -> None:
    one = tenant(8 * GIB)
    watcher = bystander(one)
    free = watcher.ok("info")[0]
    parent, pids = breed(one, 8)
    kill_all(pids)
    assert_released(watcher, free)  # their parent has not reaped them yet
    assert not set(pids) & ledger_pids()
    assert parent.ok("reap") == [8]
    assert one.assert_exact() == CONTEXT


@contextlib.contextmanager
def held_up(pid: int) -> Iterator[None]:
    """Kill a process and stop its exit half-way, as a driver with much memory to free does.

    Its threads have exited, and wait unreported for their tracer. This does not work for a process with only its first
    thread.
    """
    seize, every_thread = 0x4206, 0x40000000  # PTRACE_SEIZE, __WALL
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    libc, pidfd = ctypes.CDLL(None), os.pidfd_open(pid)
    traced = [thread for thread in threads if not libc.ptrace(seize, thread, None, None)]  # the first may have exited
    os.kill(pid, signal.SIGKILL)
    stats = [Path(f"/proc/{pid}/task/{thread}/stat") for thread in threads]
    try:
        eventually(lambda: all(") Z " in stat.read_text() for stat in stats), 5, "the exit of the threads")
        assert not select.select([pidfd], [], [], 0)[0], "the exit is complete: nothing delays it"
        yield
    finally:
        for thread in traced:
            os.waitpid(thread, every_thread)
        eventually(lambda: select.select([pidfd], [], [], 0)[0], 5, "the exit of the process")
        os.close(pidfd)


@pytest.mark.places("host", "runc")
def test_a_process_that_takes_long_to_end_is_not_adopted(tenant, fault) -> None:
    """Memory of the process stays charged as orphaned until the driver has freed it. The process is in no list."""
    one = tenant(4 * GIB)
    one.assert_enforced()
    client = one.client()
    client.ok("context")
    client.ok("thread")  # another thread continues without the first one
    assert one.assert_exact() == CONTEXT
    fault("slow-end:8s")  # more than the checks in the block take
    with held_up(client.pid):
        eventually(lambda: one.memory()["orphaned_bytes"] == CONTEXT, 1, "orphaned memory")
        steadily(lambda: one.memory()["used_bytes"] == CONTEXT, 1.6, 1.7, "the charge over three readings of NVML")
        assert client.pid in {entry["pid"] for entry in driver_books()}
        assert one.view()["processes"] == []
    eventually(lambda: client.pid not in {entry["pid"] for entry in driver_books()}, 20, "memory freed by the driver")
    eventually(lambda: one.memory()["used_bytes"] == 0, 1, "the release of the memory")
    assert [event for event in events("adopted") if event["pid"] == client.pid] == []


@pytest.mark.places("host", "runc")
def test_a_request_waits_while_the_end_of_a_process_is_under_way(tenant, fault) -> None:
    one = tenant(2 * CONTEXT)
    other, client = bystander(one), one.client()
    client.ok("context")
    client.ok("thread")
    assert one.assert_exact() == 2 * CONTEXT
    fault("slow-end:2s")
    with held_up(client.pid):
        eventually(lambda: one.memory()["orphaned_bytes"] == CONTEXT, 1, "orphaned memory")
        other.ok(f"alloc {CONTEXT}")
        holders = {entry["pid"] for entry in driver_books()}
        assert client.pid not in holders, "the request was admitted before the driver had freed the memory"


@pytest.mark.timed
@pytest.mark.slow
@pytest.mark.places("runc")
def test_memory_of_a_killed_container_is_released_within_a_second(tenant) -> None:
    one, other = tenant(8 * GIB), tenant(2 * GIB)
    watcher = bystander(other)
    breed(one, 8)
    one.client().ok(f"alloc {100 * MIB}")
    one.assert_exact()
    everything = one.pids()
    init = one.host_pid(1)
    assert init
    os.kill(init, signal.SIGKILL)

    def is_empty() -> bool:
        return not set(everything) & {p["pid"] for p in driver_books()} and one.memory()["used_bytes"] == 0

    eventually(is_empty, 1, "an empty driver and an empty ledger")
    assert not set(everything) & ledger_pids()
    watcher.ok(f"alloc {100 * MIB}")


@pytest.mark.places("host", "runc")
def test_exec_releases_the_memory_of_the_previous_program(tenant) -> None:
    one = tenant(CONTEXT + 80 * MIB)
    client = one.client()
    for _ in range(5):
        eventually(lambda: client.do("context") == "ok", 1, "a context")
        # The driver takes a moment to free the memory of the previous process. NVML's earlier figures are used until
        # the next query of NVML, at most 500 ms later.
        steadily(lambda: one.memory()["used_bytes"] == one.driver() == CONTEXT, 0.6, what="one context")
        with one.growing(80 * MIB):
            client.ok(f"fill {2 * MIB} 0")
        pid = client.pid
        client.execute_again()
        memory = one.memory()
        assert memory["used_bytes"] == memory["orphaned_bytes"], "the new program is charged"
        assert client.pid == pid
        eventually(lambda: one.memory()["used_bytes"] == 0, 1, "the release of the previous program's memory")


@pytest.mark.places("host", "runc")
def test_a_fork_does_not_change_the_parent_s_charges(tenant) -> None:
    one = tenant(CONTEXT + 80 * MIB)
    client = one.client()
    client.ok("context")
    with one.growing(40 * MIB):
        client.ok(f"alloc {40 * MIB}")
    for _ in range(20):
        client.ok("fork")
    assert one.assert_exact() == CONTEXT + 40 * MIB
    with one.growing(40 * MIB):
        client.ok(f"alloc {40 * MIB}")
    assert client.do(f"alloc {2 * MIB}") == REFUSED


@pytest.mark.timeout(900)
@pytest.mark.places("runc")
def test_each_process_of_a_tree_is_charged_for_its_own_memory(tenant, scale) -> None:
    """F4: fork, vfork, posix_spawn, exec, a double fork, daemons that close every descriptor."""
    count = scale(60, 250, 10_000)
    # Room for one process that holds memory, and for one more. A process that is charged for another's memory is
    # refused.
    one = tenant(2 * CONTEXT + 3 * HELD)
    program = Program(one, "trees", f"{BUILD}/e2e/trees {count} {HELD}")
    good, before, after = Client.numbers(program.receive(count))
    assert good == count, "a process was refused, or was charged for another's memory"
    assert before == after == CONTEXT + 2 * HELD, "the charge of the parent has changed"
    assert one.assert_exact() == CONTEXT + HELD
    taken = count - count // 2 - len(range(3, count - count // 2, 4))  # without processes that only forked
    taken += count // 2 + len(range(3, count // 2, 6)) + 1  # some processes count twice: before an exec and after it
    assert one.memory()["witnessed_bytes"] == taken * HELD
    assert len(one.view()["processes"]) == 1
    program.close()


@pytest.mark.places("host", "runc")
def test_a_process_stays_charged_after_its_first_thread_has_exited(tenant) -> None:
    one = tenant(CONTEXT + 80 * MIB)
    client = one.client()
    client.ok("context")
    with one.growing(20 * MIB):
        client.ok(f"alloc {20 * MIB}")
    client.ok("thread")  # another thread replies, because the first has exited
    assert one.assert_exact() == CONTEXT + 20 * MIB
    with one.growing(60 * MIB):
        client.ok(f"fill {2 * MIB} 0")
    client.kill()
    eventually(lambda: one.memory()["used_bytes"] == 0, 1, "the release of the memory")


def test_fgpu_run_returns_the_exit_code_of_its_program(unharmed) -> None:
    for options in ([], ["--pidns"]):
        for script, code in (("exit 0", 0), ("exit 7", 7), ("exit 255", 255)):
            assert fgpu("run", *options, "--memory", "1GiB", "--", "sh", "-c", script, check=False).returncode == code


def test_fgpu_run_forwards_sigterm_and_returns_the_program_s_exit_code(unharmed, tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = f"trap 'echo term >{told}; exit 3' TERM; echo up >{told}; while :; do sleep 0.05; done"
    with contextlib.ExitStack() as stack:
        run = subprocess.Popen(
            [*FGPU, "run", "--pidns", "--memory", "1GiB", "--", "sh", "-c", command], env=ENVIRONMENT
        )
        stack.callback(run.kill)
        eventually(lambda: told.exists() and "up" in told.read_text(), 10, "the program")
        run.terminate()
        assert run.wait(30) == 3
    assert told.read_text() == "term\n"


def test_fgpu_run_ends_a_program_with_the_default_action_of_sigterm(unharmed) -> None:
    """The kernel drops such a signal for the first process of a pid namespace, so the program is not that process."""
    command = [*FGPU, "run", "--pidns", "--memory", "1GiB", "--", "sh", "-c", "echo up; exec sleep 77"]
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True))
        stack.callback(run.kill)
        assert run.stdout
        assert run.stdout.readline() == "up\n"
        run.terminate()
        assert run.wait(30) == 128 + signal.SIGTERM


TELLS = """
import signal, sys, time
for name in ("INT", "TERM", "HUP"):
    signal.signal(signal.Signals["SIG" + name], lambda n, _: print(n, flush=True, file=told) or n == 1 and sys.exit(5))
with open(sys.argv[1], "w") as told:
    print("up", flush=True, file=told)
    while True:
        time.sleep(60)
"""


def test_a_program_of_fgpu_run_gets_each_signal_of_its_terminal_once(unharmed, tmp_path: Path) -> None:
    """The terminal signals Ctrl-C to every process, and its hangup only to `fgpu run`, the leader of the session.

    The kernel delivers the signal with the lowest number first, so a second SIGINT would arrive before SIGTERM.
    """
    told = tmp_path / "told"
    words = ["setsid", "--ctty", *FGPU, "run", "--pidns", "--memory", "1GiB", "--", sys.executable, "-c", TELLS, told]
    with contextlib.ExitStack() as stack:
        ours, its = os.openpty()
        terminal, slave = stack.enter_context(open(ours, "wb", buffering=0)), stack.enter_context(open(its, "rb"))
        run = subprocess.Popen(words, env=ENVIRONMENT, stdin=slave, stdout=slave, stderr=slave)
        stack.callback(run.wait, 30)
        stack.callback(run.kill)
        slave.close()

        def says(*lines: str) -> None:
            eventually(lambda: told.exists() and lines[-1] in told.read_text().splitlines(), 10, lines[-1])
            assert told.read_text().splitlines() == list(lines)

        says("up")
        terminal.write(b"\x03")
        says("up", "2")
        run.terminate()
        says("up", "2", "15")
        terminal.close()
        assert run.wait(30) == 5
    assert told.read_text() == "up\n2\n15\n1\n"


STOPS = """
import os, signal
os.setpgid(0, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
os.tcsetpgrp(0, os.getpgrp())
os.kill(os.getpid(), signal.SIGSTOP)
os._exit(7)
"""


def test_fgpu_run_stops_with_a_program_that_has_the_terminal_and_stops_itself(unharmed) -> None:
    """An example is `suspend` in a shell. The user's shell takes its terminal back only from a job that is stopped."""
    command = [*FGPU, "run", "--pidns", "--memory", "1GiB", "--", sys.executable, "-c", STOPS]
    with contextlib.ExitStack() as stack:
        ours, its = os.openpty()
        stack.callback(os.close, ours)
        slave = stack.enter_context(open(its, "rb"))
        leader = [sys.executable, "-c", LEADER, *map(str, command)]
        shell = subprocess.Popen(["setsid", "--ctty", *leader], env=ENVIRONMENT, stdin=slave)
        stack.callback(shell.wait, 30)
        stack.callback(shell.kill)
        assert shell.wait(60) == 7


LEADER = """
import os, signal, sys
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
job = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, setpgroup=0, setsigdef=[signal.SIGTTOU])
os.tcsetpgrp(0, job)
_, status = os.waitpid(job, os.WUNTRACED)
assert os.WIFSTOPPED(status), status
os.tcsetpgrp(0, job)
os.killpg(job, signal.SIGCONT)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]))
"""


def test_a_program_of_fgpu_run_that_another_process_stops_and_continues_goes_on(unharmed) -> None:
    command = [*FGPU, "run", "--pidns", "--memory", "1GiB", "--", "sh", "-c", "kill -STOP $$; exit 7"]
    with contextlib.ExitStack() as stack:
        run = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True)
        stack.callback(run.wait, 30)
        stack.callback(run.kill)

        def stopped() -> list[int]:
            programs = [program for init in _children(run.pid) for program in _children(init)]
            return [pid for pid in programs if "State:\tT" in Path(f"/proc/{pid}/status").read_text()]

        eventually(stopped, 30, "a stopped program")
        os.kill(stopped()[0], signal.SIGCONT)
        assert run.wait(30) == 7


REAPED = """
import os, subprocess, time
orphan = subprocess.check_output(["sh", "-c", "sleep 0.01 >/dev/null & echo $!"], text=True).strip()
while os.path.exists("/proc/" + orphan):
    time.sleep(0.01)
"""


def test_exited_orphans_of_a_program_of_fgpu_run_are_reaped(unharmed) -> None:
    words = [*FGPU, "run", "--pidns", "--memory", "1GiB", "--", sys.executable, "-c", REAPED]
    assert subprocess.run(words, env=ENVIRONMENT, timeout=30, check=False).returncode == 0


@pytest.mark.parametrize("uid", ["0", "65534"])
def test_a_program_ends_when_its_fgpu_run_is_killed(unharmed, uid: str) -> None:
    """The program ends even under sudo, where it runs as another user. The killed command cannot forward a signal."""
    environment = {**ENVIRONMENT, "SUDO_UID": uid, "SUDO_GID": uid}
    command = [*FGPU, "run", "--pidns", "--memory", "1GiB", "--", "sh", "-c", "echo up; exec sleep 77"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout
            assert run.stdout.readline() == "up\n"
            (init,) = _children(run.pid)
            (child,) = _children(init)
            assert Path(f"/proc/{child}").stat().st_uid == int(uid)
        finally:
            run.kill()
    try:
        eventually(lambda: not _lives(child), 5, "the program's end")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.places("runc")
def test_explain_names_the_process_that_keeps_orphaned_memory_and_its_parent(tenant) -> None:
    """A child has the descriptors of the driver, and the container's init has adopted it."""
    one = tenant(GIB)
    one.assert_enforced()
    client = one.client()
    client.ok(f"alloc {HELD}")
    (inner,) = client.ok("linger")
    child = eventually(lambda: one.host_pid(inner), 5, "the child's pid")
    client.kill()
    eventually(lambda: one.view()["orphans"], 5, "an orphan")

    def adopter() -> str | None:
        (found,) = re.findall(r"^PPid:\s+(\d+)$", Path(f"/proc/{child}/status").read_text(), re.MULTILINE)
        return found if found != str(client.pid) else None

    parent = eventually(adopter, 5, "the child's adoption")
    assert parent != "1"
    said = f"process {client.pid}, which has ended: kept by pid {child}; end pid {child}, a child of {parent}, or"
    eventually(lambda: said in fgpu("explain", one.path).stdout, 15, said)
    assert any(tenant["orphans"] for tenant in output("status")["tenants"])
    (row,) = [row for row in output("ps") if row["how"] == "orphaned"]
    assert (row["pid"], row["name"], row["why"]) == (client.pid, "(ended)", f"kept by pid {child}")
    os.kill(child, signal.SIGKILL)
    eventually(lambda: not one.view()["orphans"], 5, "the release of the orphaned memory")


KEPT = 64 * MIB
LetGo = Callable[[], None]


def keep_a_descriptor(client: Client) -> LetGo:
    """Keep the descriptor of an export in this process. Return a function that closes it."""
    pidfd_getfd = 438
    _, descriptor = client.ok(f"export {KEPT}")
    pidfd = os.pidfd_open(client.pid)
    copy = ctypes.CDLL(None).syscall(pidfd_getfd, pidfd, descriptor, 0)
    os.close(pidfd)
    assert copy >= 0
    return lambda: os.close(copy)


def keep_a_child(client: Client) -> LetGo:
    """Keep a child that has the driver's descriptors. Return a function that kills it."""
    client.ok(f"alloc {KEPT}")
    (inner,) = client.ok("linger")
    child = eventually(lambda: client.tenant.host_pid(inner), 5, "the child's pid")
    return lambda: os.kill(child, signal.SIGKILL)


@pytest.mark.timed
@pytest.mark.places("host", "runc")
@pytest.mark.parametrize("keep", [keep_a_descriptor, keep_a_child])
def test_no_request_waits_for_memory_that_a_living_process_keeps(tenant, keep: Callable[[Client], LetGo]) -> None:
    """A request is refused once the killed process has ended completely, and admitted once its memory is free."""
    one = tenant(2 * CONTEXT + KEPT)
    other, client = bystander(one), one.client()
    request, took = f"alloc {CONTEXT + KEPT // 2}", []
    with contextlib.ExitStack() as stack:
        stack.callback(keep(client))
        assert one.assert_exact() == 2 * CONTEXT + KEPT
        client.kill()
        eventually(lambda: one.memory()["orphaned_bytes"], 5, "orphaned memory")
        for _ in range(6):
            begun = quiet_seconds()
            assert other.do(request) == REFUSED
            took.append(quiet_seconds() - begun)
        print(f"refused after {', '.join(f'{seconds:.3f}' for seconds in took)} s")
        assert took[0] < 1.5, "a refusal during the exit took longer than the exit and 0.5 s"
        assert max(took[1:]) < 0.3, "a refusal after the exit was delayed"
        assert one.memory()["orphaned_bytes"] > KEPT // 2, "memory of a living process was released"
    eventually(lambda: not unnamed_bytes(), 5, "memory freed by the driver")
    deadline = Deadline(1)
    other.ok(request)
    assert not deadline.is_over()
