"""Shares of a device's time, with programs that count their own kernels. The bounds allow for two busy processors."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.held_file import HeldFile
from tests.e2e.spin_kit import KERNEL_US, SECONDS, Spin, together
from tests.support.commands import ask, events, fgpu, metrics
from tests.support.host import BUILD, ENVIRONMENT, FGPU, GIB, ROOT, SIM, cgroup_root
from tests.support.service import Service
from tests.support.wait import eventually, remove_cgroup

pytestmark = pytest.mark.timed


def share_of_device(kernels: float, seconds: float) -> float:
    """Return the share of the device's time that kernels of spin's default length took.

    A run without a limit is no measure of the whole device: beside other programs, spin then waits for a processor.
    """
    return kernels * KERNEL_US / 1_000_000 / seconds


def test_weights_divide_the_device(start) -> None:
    heavy, light = start("heavy", "--weight", "300"), start("light", "--weight", "100")
    done = together(heavy, light)
    assert heavy.compute()["waits"] > 10  # the tenants take turns
    assert done[0] / sum(done) == pytest.approx(0.75, abs=0.05)


def test_a_ceiling_that_is_set_on_a_running_program_holds_on_an_idle_device(start) -> None:
    one = start("one")
    (free,) = together(one)
    fgpu("set", "one", "--compute", "25%")
    time.sleep(0.2)
    (limited,) = together(one)
    assert one.compute()["throttled"] > 10
    assert limited < free
    assert share_of_device(limited, SECONDS) == pytest.approx(0.25, abs=0.06)


def test_a_tenant_runs_after_another_is_killed_and_status_ps_and_explain_show_shares(start) -> None:
    first, second = start("first", "--priority", "high"), start("second", "--compute", "50%", "--weight", "200")
    first.begin(60)
    second.begin()
    eventually(lambda: first.compute()["waits"] or second.compute()["waits"], 5, "turns")
    eventually(lambda: ("fgpu_slice_switches_total", frozenset({("gpu", "0")})) in metrics(), 5, "metrics")
    for table, beside in (("status", "ENTITLED"), ("ps", "USER")):  # `top` uses the same word
        assert re.search(rf"^TENANT .* SHARE +{beside} ", fgpu(table).stdout, re.MULTILINE)
    said = fgpu("explain", "second").stdout
    assert "time up to 50%, weight 200" in said
    first.close()
    assert second.kernels() > 0


def driver_offset(name: str) -> str:
    """Return the offset of a function in the simulated driver's library, in hexadecimal."""
    listed = subprocess.run(["nm", "-D", SIM / "lib/libcuda.so.1"], capture_output=True, text=True, check=True).stdout
    (found,) = [line.split()[0] for line in listed.splitlines() if line.split()[1:] == ["T", name]]
    return found


def test_a_tenant_that_runs_outside_its_turns_is_named(start, programs: None) -> None:
    honest = start("honest", "--weight", "100")
    liar = [*FGPU, "run", "--memory", f"{GIB}B", "--name", "liar", "--weight", "100", "--"]
    command = [*liar, BUILD / "e2e/liar", driver_offset("cuLaunchKernel")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            honest.begin(60)
            eventually(lambda: honest.compute().get("waits") is not None, 5, "a share")
            metric = ("fgpu_bypassing_processes", frozenset({("tenant", "liar"), ("how", "outside_turns")}))
            eventually(lambda: metrics().get(metric) == 1, 40, "the program outside its turns in the metrics")
            (view,) = [t for t in ask(verb="snapshot")["tenants"] if t["tenant"] == "liar"]
            assert view["devices"][0]["compute"]["beyond_ratio"] > 0.1
            assert "liar" in fgpu("doctor", check=False).stdout
            named = [labels for name, labels in metrics() if name == metric[0] and ("how", "outside_turns") in labels]
            assert named == [metric[1]]
        finally:
            process.kill()


@pytest.fixture(scope="session")
def restless(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the start of a command line for a program that always reports that it is in a rest."""
    source, out = Path(__file__).parent / "preloads/restless.c", tmp_path_factory.mktemp("restless") / "restless.so"
    flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{ROOT}/bpf"]
    subprocess.run(["gcc", *flags, "-o", out, source, "-lpthread"], check=True, timeout=60)
    return ["env", f"LD_PRELOAD={out}"]


def test_a_ceiling_holds_for_a_program_that_always_reports_a_rest(start, restless: list[str]) -> None:
    """The ceiling holds within a tenth of a device, the error that NVML's figures may have.

    Time that the program uses before NVML's report of this time is charged afterwards. Therefore the test measures over
    many reports.
    """
    liar, seconds = start("restless", before=restless), 32
    fgpu("set", "restless", "--compute", "25%")
    liar.begin(4)  # run until the agent has read NVML's figures
    liar.said()
    liar.begin(seconds)
    assert share_of_device(liar.kernels(), seconds) <= 0.25 + 0.1 + 0.03
    assert liar.compute()["throttled"] > 0
    assert liar.compute()["owned_seconds"] > 1


# -- faults


def keep_waiting(owner: Spin, other: Spin) -> None:
    """Launch until the owner (kernels of 50 ms, nearly all of the device) delays the next step of the other tenant."""
    owner.begin(60)
    eventually(lambda: owner.compute().get("is_owner"), 5, "a turn")
    for _ in range(
        40
    ):  # each step leaves the other tenant in debt; the owner yields until its kernels are known to be long
        other.begin(0.001)
        if not select.select([other.process.stdout], [], [], 0.5)[0]:
            break
        other.said()
        time.sleep(0.2)
    else:
        pytest.fail("the owner never delayed the other tenant")


def test_a_killed_owner_delays_no_other_tenant(start) -> None:
    """The weights would let the other program wait for minutes. On a quiet machine it continues within 5 ms."""
    owner, other = start("owner", "--weight", "10000", kernel_us=50_000), start("other", "--weight", "1")
    keep_waiting(owner, other)
    owner.process.kill()
    began = time.monotonic()
    other.said()
    assert time.monotonic() - began < 0.3


def test_the_turn_of_a_killed_process_ends_before_the_driver_has_cleaned_up(start, tmp_path: Path) -> None:
    """The turn ends at the kill. It does not end as an overrun, as the turn of a silent program does."""
    with HeldFile(tmp_path / "held") as held:
        with held.path.open("rb") as file:
            owner = start("dies", "--weight", "10000", kernel_us=50_000, stderr=file)
        other = start("beside", "--weight", "1")
        keep_waiting(owner, other)
        pidfd = os.pidfd_open(owner.process.pid)
        held.hold()
        before = owner.compute()["overruns"]
        owner.process.kill()
        assert held.has_waiter(60)
        other.said()
        eventually(lambda: other.compute()["free"], 5, "the device to itself")
        assert owner.compute()["overruns"] == before
        assert not select.select([pidfd], [], [], 0)[0], "the killed process is not in its last close"
        os.close(pidfd)


@contextlib.contextmanager
def signalled(owner: Spin) -> Iterator[None]:
    owner.process.send_signal(signal.SIGSTOP)
    yield
    owner.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def traced(owner: Spin) -> Iterator[None]:
    """Stop all threads of the owner, as a debugger does."""
    pid, libc = owner.process.pid, ctypes.CDLL(None, use_errno=True)
    threads = [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
    for thread in threads:
        for request in (0x4206, 0x4207):  # PTRACE_SEIZE, PTRACE_INTERRUPT
            assert libc.ptrace(request, thread, None, None) == 0, os.strerror(ctypes.get_errno())
        os.waitpid(thread, 0x40000000)  # __WALL
    yield
    for thread in threads:
        libc.ptrace(17, thread, None, None)  # PTRACE_DETACH


@contextlib.contextmanager
def frozen(owner: Spin) -> Iterator[None]:
    """Freeze the owner, as `docker pause` does."""
    freezer = cgroup_root() / "fgpu" / owner.name / "cgroup.freeze"
    freezer.write_text("1")
    yield
    freezer.write_text("0")


def test_a_stopped_owner_delays_the_other_tenant_by_one_deadline_once(start, scale) -> None:
    """A signal, a debugger and a freezer stop the owner in turn. Each stop delays the other tenant by one deadline."""
    owner, other = start("owner", "--weight", "100"), start("other", "--weight", "100")
    other.begin(1)
    alone, times = other.kernels(), scale(3, 10, 200)
    owner.begin(600)
    beside = 0.0
    for way in itertools.islice(itertools.cycle((signalled, traced, frozen)), times):
        waits = owner.compute().get("waits", 0)
        other.begin(0.1)
        other.said()
        eventually(lambda waits=waits: owner.compute().get("waits", 0) > waits, 15, "turns")
        before = owner.compute()["overruns"]
        with way(owner):
            other.begin(0.2)
            assert select.select([other.process.stdout], [], [], 10)[0], "the other tenant waits for the stopped owner"
            beside += other.kernels()
            assert owner.compute()["overruns"] - before <= 2
    assert beside > 0.4 * alone * 0.2 * times  # it would be 0.15 with a delay in each turn


def test_turns_continue_while_nvml_is_blind(start, fault) -> None:
    heavy, light = start("heavy", "--weight", "300"), start("light", "--weight", "100")
    for kind in ("nvml-na", "nvml-stall:60s", "nvml-gone"):
        fault(kind)
        before = heavy.compute().get("waits", 0)
        done = together(heavy, light)
        assert heavy.compute()["waits"] > before, kind
        assert done[0] / sum(done) == pytest.approx(0.75, abs=0.05), kind
        fault("reset")


def hold_silently(cgroup: Path, ready: int, end: int) -> None:
    """Hold sixteen silent connections of a cgroup. Replace each connection that is closed."""
    (cgroup / "cgroup.procs").write_text("0")
    kept: list[socket.socket] = []
    while True:
        while len(kept) < 16:
            kept.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            kept[-1].settimeout(2)
            with contextlib.suppress(OSError):
                kept[-1].connect("/run/fgpu/shim/shim.sock")
        os.write(ready, b".")
        gone = select.select([end, *kept], [], [])[0]
        if end in gone:
            return
        kept = [sock for sock in kept if sock not in gone]


@contextlib.contextmanager
def silent_clients(number: int) -> Iterator[None]:
    """Hold this many connections, sixteen in each cgroup, and always replace closed ones."""
    parent, (look, ready), (end, stop), pids = cgroup_root() / "fgpu-silent", os.pipe(), os.pipe(), []
    parent.mkdir()
    try:
        for place in range(-(-number // 16)):
            (parent / str(place)).mkdir()
            pids.append(os.fork())
            if not pids[-1]:
                os.close(stop)
                try:
                    hold_silently(parent / str(place), ready, end)
                finally:
                    os._exit(0)
        for _ in pids:
            os.read(look, 1)
        yield
    finally:
        os.close(stop)
        for pid in pids:
            os.waitpid(pid, 0)
        for folder in (*parent.iterdir(), parent):
            if folder.is_dir():
                remove_cgroup(folder)
        for fd in (look, ready, end):
            os.close(fd)


def test_silent_connections_are_closed_and_do_not_halve_the_number_of_turns(start, scale) -> None:
    """Silent connections are closed and counted. Beside them there are more than half as many turns a second."""

    def switches() -> float:
        return metrics().get(("fgpu_slice_switches_total", frozenset({("gpu", "0")})), 0)

    def in_a_second() -> float:
        before, begun = switches(), time.monotonic()
        time.sleep(4)
        return (switches() - before) / (time.monotonic() - begun)

    one, two = start("one", "--weight", "100"), start("two", "--weight", "100")
    one.begin(60)
    two.begin(60)
    eventually(lambda: one.compute().get("waits") and switches(), 5, "turns")
    alone, before = in_a_second(), ask(verb="snapshot")["gatekeeper"]
    with silent_clients(scale(200, 1000, 5000)):
        beside = in_a_second()
        eventually(
            lambda: ask(verb="snapshot")["gatekeeper"]["silent"] > before["silent"], 5, "closed connections counted"
        )
    assert beside > 0.5 * alone


def test_an_overrun_is_reported_with_its_tenant(start) -> None:
    owner, other = start("stopped", "--weight", "100"), start("beside", "--weight", "100")
    owner.begin(60)
    other.begin(60)
    eventually(lambda: owner.compute().get("waits"), 2, "turns")
    before = owner.compute()["overruns"]

    def overran() -> bool:
        """Stop the owner for 0.1 s, perhaps with work in flight. Return whether it has had an overrun."""
        owner.process.send_signal(signal.SIGSTOP)
        time.sleep(0.1)
        owner.process.send_signal(signal.SIGCONT)
        return owner.compute()["overruns"] > before

    eventually(overran, 20, "an overrun")

    def told() -> list[dict[str, object]]:
        return [event for event in events("overrun") if event["tenant"] == "stopped"]

    event = eventually(told, 15, "the event of the overrun")[0]
    assert event["gpu"] == 0
    assert "ended with work in flight" in str(event["text"])


def test_gates_open_without_a_gatekeeper_and_shares_hold_with_the_next_gatekeeper(start, service: Service) -> None:
    heavy, light = start("heavy", "--weight", "300"), start("light", "--weight", "100")
    heavy.begin(6)
    light.begin(6)
    eventually(lambda: light.compute().get("waits"), 5, "turns")
    time.sleep(1)
    service.kill_gatekeeper()
    longest = [program.said()[2] for program in (heavy, light)]
    assert max(longest) < 3_000_000, "a step waited for longer than the lease"
    eventually(service.gatekeepers, 5, "another gatekeeper")
    done = together(heavy, light)
    assert done[0] / sum(done) == pytest.approx(0.75, abs=0.05)
