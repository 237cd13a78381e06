"""Attacks of a tenant on the gatekeeper: T1, T3, T7, T8, T9, T10, T11, and a log without a reader."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import mmap
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fgpu_ebpf import abi
from fgpu_ebpf.linux import bpf
from tests.gatekeeper.conftest import GIB, PATIENT, Keeper
from tests.gatekeeper.hello_client import Child, connect, hello, in_cgroup, receive, request, until
from tests.gatekeeper.waits_kit import prompt, waits
from tests.support.wait import Deadline, quiet_seconds, waiting_of

Make = Callable[..., Path]
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
NOBODY = 65534


# -- T1: pages ------------------------------------------------------------------------------------------------------


def try_write(fd: int) -> None:
    os.write(fd, b"\xff" * 64)


def try_pwrite(fd: int) -> None:
    os.pwrite(fd, b"\xff" * 64, 0)


def try_map(fd: int) -> None:
    mmap.mmap(fd, abi.PAGE_BYTES)[:64] = b"\xff" * 64


def try_protect(fd: int) -> None:
    address = LIBC.mmap(None, abi.PAGE_BYTES, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if LIBC.mprotect(ctypes.c_void_p(address), abi.PAGE_BYTES, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    ctypes.memset(address, 0xFF, 64)


def try_reopen(fd: int) -> None:
    os.write(os.open(f"/proc/self/fd/{fd}", os.O_RDWR), b"\xff" * 64)


def try_reopen_and_map(fd: int) -> None:
    try_map(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))


def try_truncate(fd: int) -> None:
    os.ftruncate(fd, 0)


def try_reopen_and_resize(fd: int) -> None:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    for size in (0, 2 * abi.PAGE_BYTES):
        os.ftruncate(again, size)


def try_punch(fd: int) -> None:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    if LIBC.fallocate(again, 3, ctypes.c_long(0), ctypes.c_long(abi.PAGE_BYTES)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def try_seal(fd: int) -> None:
    fcntl.fcntl(os.open(f"/proc/self/fd/{fd}", os.O_RDWR), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def try_chmod(fd: int) -> None:
    os.fchmod(fd, 0o666)
    try_reopen(fd)


def try_map_update(fd: int) -> None:
    bpf.update(fd, bytes(4), b"\xff" * abi.PAGE_BYTES)


def try_map_delete(fd: int) -> None:
    bpf.delete(fd, bytes(4))


CONTROL = [
    *(try_write, try_pwrite, try_map, try_protect, try_reopen, try_reopen_and_map),
    *(try_truncate, try_reopen_and_resize, try_punch, try_seal, try_chmod),
]
USAGE = [try_write, try_pwrite, try_map, try_protect, try_reopen, try_truncate, try_map_update, try_map_delete]


def as_root() -> None:
    pass


def as_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def as_root_of_a_user_namespace() -> None:
    as_nobody()
    assert LIBC.prctl(4, 1, 0, 0, 0) == 0  # PR_SET_DUMPABLE: /proc/self belongs to this user, as after an exec
    assert LIBC.unshare(0x10000000) == 0  # CLONE_NEWUSER
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {NOBODY} 1")
    Path("/proc/self/gid_map").write_text(f"0 {NOBODY} 1")
    assert os.geteuid() == 0


def attack(run: Path, become: Callable[[], None], times: int) -> list[str]:
    """Try every form of writing on every page, this many times. Return the forms that succeeded."""
    reply = hello(run)
    assert reply
    control, usage = reply.page(0), reply.page(2, abi.UsagePage)
    before = control.version, control.flags, bytes(control.boot), usage.version, usage.cgroup, usage.devices[0].limit
    become()
    through = []
    for place, form in [*((0, form) for form in CONTROL), *((2, form) for form in USAGE)] * times:
        before_it = set(os.listdir("/proc/self/fd"))
        try:
            form(reply.fds[place])
        except (OSError, ValueError):
            for fd in set(os.listdir("/proc/self/fd")) - before_it:  # descriptors that the attack opened
                with contextlib.suppress(OSError):
                    os.close(int(fd))
            continue
        through.append(f"{form.__name__} of page {place}")
    now = control.version, control.flags, bytes(control.boot), usage.version, usage.cgroup, usage.devices[0].limit
    assert now == before
    return through


@pytest.mark.parametrize("become", [as_nobody, as_root_of_a_user_namespace, as_root])
def test_no_form_of_writing_changes_a_page(
    keeper: Keeper, tenant: Make, become: Callable[[], None], scale: Callable[..., int]
) -> None:
    """The pages of a neighbour do not change, and their heartbeat continues."""

    def neighbour() -> tuple[int, int, int]:
        reply = hello(keeper.run)
        assert reply
        control, usage = reply.page(0), reply.page(2, abi.UsagePage)
        os.write(ready, b".")
        os.read(done, 1)
        last = control.heartbeat_ns
        until(lambda: control.heartbeat_ns != last)
        return usage.cgroup, usage.devices[0].limit, control.flags

    (look, ready), (done, end), other = os.pipe(), os.pipe(), tenant()
    beside = Child(other, neighbour)
    os.read(look, 1)
    assert in_cgroup(tenant(), attack, keeper.run, become, scale(5, 100, 1000)) == []
    os.write(end, b".")
    assert beside.result() == (other.stat().st_ino, GIB, 1)


def test_the_forms_of_attack_work_on_a_page_without_seals() -> None:
    """This proves that the test above can fail."""
    for form in CONTROL:
        fd = os.memfd_create("open", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, abi.PAGE_BYTES)
        form(fd)
        os.close(fd)


def test_a_tenant_can_write_its_status_page_and_cannot_resize_it(keeper: Keeper, tenant: Make) -> None:
    def use() -> list[str]:
        reply = hello(keeper.run)
        assert reply
        memory = mmap.mmap(reply.fds[1], abi.PAGE_BYTES)
        page = abi.StatusPage.from_buffer(memory)
        page.devices[0].waiting = 1
        through = []
        for form in (try_truncate, try_reopen_and_resize, try_seal):
            try:
                form(reply.fds[1])
            except OSError:
                continue
            through.append(form.__name__)
        return through

    assert in_cgroup(tenant(), use) == []


# -- T3, T7: messages -----------------------------------------------------------------------------------------------


def forged(dice: random.Random, words: list[int]) -> bytes:
    """Return a hello with pids, cgroups and random values wherever possible."""
    spare = (ctypes.c_uint32 * 9)(*(dice.choice(words) for _ in range(9)))
    return request(spare=spare, flags=dice.getrandbits(32))


def send_as(sock: socket.socket, payload: bytes, pid: int, uid: int) -> None:
    """Send a payload with the credentials of another process, if the kernel allows it."""
    credentials = struct.pack("3i", pid, uid, uid)
    try:
        sock.sendmsg([payload], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)])
    except PermissionError:
        sock.send(payload)


def test_claims_of_a_hello_are_ignored(keeper: Keeper, tenant: Make, scale: Callable[..., int]) -> None:
    """T3. A hello that was not answered is sent again, as a shim does: its tenant has used its time up."""
    other, each = tenant(), scale(20, 834, 8334)
    victim = Child(other, lambda: bool(hello(keeper.run)) and signal.pause())

    def forge(mine: int, uid: int) -> tuple[int, int]:
        dice, answers, wrong = random.Random(mine), 0, 0
        while answers < each:
            with connect(keeper.run, 10) as sock:
                payload = forged(dice, [victim.pid, other.stat().st_ino, mine, 0, 1])
                with contextlib.suppress(BrokenPipeError):
                    send_as(sock, payload, victim.pid, uid)
                reply = receive(sock)
            if reply is None:
                time.sleep(0.02)
                continue
            answers += 1
            wrong += reply.page(2, abi.UsagePage).cgroup != mine
            reply.maps.pop().close()
            reply.close()
        return answers, wrong

    try:
        places = [(tenant(), uid) for uid in (0, 1, NOBODY) for _ in range(4)]
        crowd = [Child(place, forge, place.stat().st_ino, uid, uid=uid) for place, uid in places]
        assert [child.result() for child in crowd] == [(each, 0)] * len(crowd)
    finally:
        victim.kill()


def malformed(dice: random.Random) -> bytes:
    good = bytearray(request())
    match dice.randrange(4):
        case 0:
            return dice.randbytes(dice.choice([1, 7, 63, 65, 128, 4096]))
        case 1:
            return dice.randbytes(64)
        case 2:
            good[dice.randrange(8)] ^= 1 << dice.randrange(8)
            return bytes(good)
        case _:
            return bytes(good) + dice.randbytes(dice.randrange(1, 64))


def send_malformed(run: Path, seed: int, number: int) -> int:
    """Send this many messages, each on its own connection. Return how many were answered."""
    dice, answered = random.Random(seed), 0
    for _ in range(number):
        with connect(run) as sock:
            try:
                sock.send(malformed(dice))
            except OSError:
                continue
            answered += receive(sock) is not None
    return answered


@pytest.mark.timeout(7200)  # the full run's number of messages takes an hour
def test_a_malformed_message_closes_the_connection_of_its_sender(
    keeper: Keeper, tenant: Make, scale: Callable[..., int]
) -> None:
    place = tenant()
    resident, counted = keeper.resident_kib(), keeper.grows("malformed", 10)

    def closed() -> int:  # a connection of a tenant that has used its time up is closed unread
        return keeper.count("malformed") + keeper.count("dropped_tenant")

    before = closed()
    assert in_cgroup(place, send_malformed, keeper.run, 7, 100) == 0
    counted()
    until(lambda: closed() >= before + 100)
    each, before = 2500, closed()
    for seed in range(0, scale(1, 8, 4000), 4):
        crowd = [Child(tenant(), send_malformed, keeper.run, 100 + seed + n, each) for n in range(4)]
        assert [child.result() for child in crowd] == [0] * 4
    until(lambda: closed() >= before + 4 * each)
    until(lambda: in_cgroup(place, lambda: bool(hello(keeper.run))))
    assert keeper.resident_kib() - resident < 1024


def test_a_second_message_closes_the_connection(patient: Keeper, cgroup: Make) -> None:
    """The gatekeeper would keep the connection for a minute otherwise, and the process waits for 10 s at most."""

    def chatter() -> bool:
        with connect(patient.run) as sock:
            sock.send(request())
            time.sleep(0.05)
            sock.send(request())
            return receive(sock) is None

    counted = patient.grows("malformed", 1)
    assert in_cgroup(cgroup(), chatter)
    counted()


def test_the_gatekeeper_closes_descriptors_that_a_client_sends(keeper: Keeper, tenant: Make) -> None:
    def send() -> bool:
        with connect(keeper.run) as sock:
            socket.send_fds(sock, [request()], [0] * 200)
            return receive(sock) is not None

    before = keeper.descriptors()
    assert in_cgroup(tenant(), send)
    until(lambda: keeper.descriptors() <= before, 1)  # it may have had a file open for a moment


# -- T8, T9: silence and floods -------------------------------------------------------------------------------------


@pytest.mark.timed
def test_silent_clients_are_disconnected_and_delay_no_other_client(keeper: Keeper, tenant: Make) -> None:
    def silent() -> tuple[list[float], bool]:
        began = [(time.monotonic(), connect(keeper.run)) for _ in range(16)]
        deadline, ends = Deadline(1.5), []
        for begun, sock in began:
            assert receive(sock) is None
            ends.append(time.monotonic() - begun)
        return ends, deadline.is_over()

    in_cgroup(tenant(), waits, keeper, 1)  # a gatekeeper that has served a tenant has all of its own files open
    until(lambda: keeper.count("processes") == 0)
    counted = keeper.grows("silent", 64)
    before = keeper.descriptors()
    crowd = [Child(tenant(), silent) for _ in range(4)]
    time.sleep(0.1)
    assert prompt(in_cgroup(tenant(), waits, keeper, 20))
    for child in crowd:
        ends, is_late = child.result()
        assert (min(ends) > 0.8, is_late) == (True, False), ends
    counted()
    until(lambda: keeper.descriptors() <= before, 1)


@pytest.mark.parametrize("processes", [1, 40])
def test_a_tenant_has_at_most_sixteen_connections(patient: Keeper, tenant: Make, processes: int) -> None:
    """No connection is closed only for its age during the test."""
    ready, counting = os.pipe(), os.pipe()

    def still_open(number: int) -> int:
        os.close(counting[1])
        socks = [connect(patient.run) for _ in range(number)]
        os.write(ready[1], b".")
        os.read(counting[0], 1)
        return sum(not select.select([sock], [], [], 0)[0] for sock in socks)

    place = tenant()
    dropped = patient.grows("dropped_tenant", 24)
    crowd = [Child(place, still_open, 40 // processes) for _ in range(processes)]
    for _ in crowd:
        os.read(ready[0], 1)
    dropped()
    time.sleep(0.6)  # two heartbeats: it closes no more of them
    os.close(counting[1])
    assert sum(child.result() for child in crowd) == 16
    for end in (*ready, counting[0]):
        os.close(end)


def test_silent_connections_of_many_cgroups_are_closed_if_all_slots_are_used(
    start: Callable[..., Keeper], cgroup: Make
) -> None:
    """Seventy undecided cgroups hold 16 silent connections each. The number of open descriptors stays bounded."""
    keeper = start(code=PATIENT)
    place = cgroup()
    ready = os.pipe()

    def fill() -> None:
        os.setpgid(0, 0)
        for _ in range(70):
            if os.fork() == 0:
                inner = place / str(os.getpid())
                inner.mkdir()
                (inner / "cgroup.procs").write_text("0")
                kept = [connect(keeper.run, 60) for _ in range(16)]
                os.write(ready[1], b".")
                signal.pause()
                del kept
        signal.pause()

    filler = Child(place, fill)
    try:
        for _ in range(70):
            os.read(ready[0], 1)
        until(lambda: keeper.count("dropped_total") > 50, 4)
        assert keeper.descriptors() < 2 * 1024 + 50
    finally:
        os.killpg(filler.pid, signal.SIGKILL)
        os.waitpid(filler.pid, 0)
        for end in ready:
            os.close(end)


SHORT = PATIENT.replace(
    "sys.exit", "connections.WAIT_NS //= 4; connections.REFUSE_NS //= 4; connections.FORGIVE_NS //= 4; sys.exit"
)
HEARTBEAT_SECONDS = 0.25


def flood_silently(run: Path, on: Path) -> None:
    kept: list[socket.socket] = []
    while on.exists():
        try:
            kept.append(connect(run))
        except OSError:
            continue
        del kept[:-64]


def flood_with_hellos(run: Path, on: Path) -> None:
    while on.exists():
        try:
            with connect(run) as sock:
                sock.send(request())
        except OSError:
            continue


def flood_with_garbage(run: Path, on: Path) -> None:
    while on.exists():
        try:
            with connect(run) as sock:
                sock.send(b"?")
        except OSError:
            continue


@pytest.mark.timed
@pytest.mark.parametrize("flood", [flood_silently, flood_with_hellos, flood_with_garbage])
def test_a_flood_from_one_tenant_does_not_delay_another_tenant(
    start: Callable[..., Keeper],
    tenant: Make,
    tmp_path: Path,
    flood: Callable[[Path, Path], None],
    scale: Callable[..., int],
) -> None:
    """A tenant may use a quarter of its usual time, so that a flood uses it up without having a processor alone."""
    keeper, on = start(code=SHORT), tmp_path / "on"

    def nicely() -> None:
        os.nice(5)  # the test measures the queue, not the lack of processors
        flood(keeper.run, on)

    on.touch()
    place, began = tenant(), time.monotonic()
    crowd = [Child(place, nicely) for _ in range(2)]
    try:
        time.sleep(scale(1, 2, 20))
        took = in_cgroup(tenant(), waits, keeper, 10)
        until(lambda: keeper.count("dropped_tenant") >= 100, 10)
    finally:
        on.unlink()
        for child in crowd:
            child.result()
    assert prompt(took), took
    until(lambda: keeper.count("hello_managed") >= 10)  # figures of the end of the flood
    beats = 2 + (time.monotonic() - began) / HEARTBEAT_SECONDS
    print(f"{beats:.1f} heartbeats, {keeper.counts()}")
    assert keeper.count("hello_managed") < 62 * beats, "the time of a tenant is bounded"
    assert keeper.count("malformed") < 150 * beats


@pytest.mark.timed
def test_a_tenant_that_has_used_its_time_is_served_later(start: Callable[..., Keeper], tenant: Make) -> None:
    keeper = start(code=PATIENT.replace("sys.exit", "connections.WAIT_NS = 0; sys.exit"))

    def ask() -> tuple[float, float]:
        waited, longest = 0.0, 0.0
        for _ in range(3):
            began, quiet = time.monotonic(), quiet_seconds()
            assert hello(keeper.run)
            longest = max(longest, time.monotonic() - began)
            waited = max(waited, quiet_seconds() - quiet)
        return longest, waited

    longest, waited = in_cgroup(tenant(), ask)
    assert longest > 0.1
    assert waited < 0.9  # until the next heartbeat, or the one after it


@pytest.mark.timed
def test_a_peer_whose_mappings_cannot_be_read_delays_no_other_peer(
    start: Callable[..., Keeper], tenant: Make, tmp_path: Path
) -> None:
    """A read of /proc/PID/maps can block on that process."""
    code = """
import sys, time
from fgpu_ebpf.linux import breakpoints; from fgpu_ebpf.gatekeeper import main as gatekeeper
real = breakpoints.of_process
def stuck(pid, check):
    if open("/proc/%d/comm" % pid).read() == "stuck\\n":
        time.sleep(60)
    return real(pid, check)
breakpoints.of_process = stuck
sys.exit(gatekeeper.main())
"""
    keeper = start(code=code)

    def hang() -> bool:
        Path("/proc/self/comm").write_text("stuck")
        return hello(keeper.run) is None

    crowd = [Child(tenant(), hang) for _ in range(3)]
    time.sleep(0.1)
    assert prompt(in_cgroup(tenant(), waits, keeper, 20))
    assert [child.result() for child in crowd] == [True] * 3
    assert keeper.stop() == 0


# -- T10, T11: the folder and the socket ----------------------------------------------------------------------------


def replace_folder(run: Path) -> None:
    (run / "shim").rename(run / "away")
    (run / "shim").mkdir()


def remove_all(run: Path) -> None:
    (run / "shim" / "shim.sock").unlink()
    (run / "shim").rmdir()


def replace_socket(run: Path) -> None:
    (run / "shim" / "shim.sock").unlink()
    (run / "shim" / "shim.sock").touch()


def test_the_gatekeeper_creates_a_lost_socket_again(
    start: Callable[..., Keeper], unmanaged: Path, scale: Callable[..., int]
) -> None:
    """The socket exists again within two seconds, for every way in which it was lost. Gatekeepers run in parallel."""
    harms = {start(): harm for harm in (replace_folder, remove_all, replace_socket)}

    def answered(keeper: Keeper) -> bool:
        try:
            return hello(keeper.run) is not None
        except OSError:
            return False

    for _ in range(scale(1, 7, 34)):
        for keeper, harm in harms.items():
            harm(keeper.run)
        for keeper in harms:
            until(lambda keeper=keeper: in_cgroup(unmanaged, answered, keeper), 2)
            shim = keeper.run / "shim"
            assert ((shim / "shim.sock").stat().st_mode & 0o777, shim.stat().st_mode & 0o777) == (0o666, 0o755)
            assert [path.name for path in shim.iterdir()] == ["shim.sock"]
            shutil.rmtree(keeper.run / "away", ignore_errors=True)
    assert all("listening in" in keeper.log.read_text() for keeper in harms)


def test_a_folder_that_is_a_link_is_refused(start: Callable[..., Keeper], tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    (run / "shim").symlink_to(elsewhere)
    keeper = start(run=run)
    assert (keeper.ready, keeper.process.wait(30)) == (False, 1)
    assert list(elsewhere.iterdir()) == []
    assert len(keeper.log.read_text().splitlines()) == 1


def test_a_folder_of_another_user_is_refused(start: Callable[..., Keeper], tmp_path: Path) -> None:
    (tmp_path / "shim").mkdir()
    os.chown(tmp_path / "shim", NOBODY, NOBODY)
    keeper = start(run=tmp_path)
    assert (keeper.ready, keeper.process.wait(30)) == (False, 1)
    assert "another user" in keeper.log.read_text()


def test_a_successor_leaves_no_moment_without_a_listener(start: Callable[..., Keeper], unmanaged: Path) -> None:
    """A successor replaces the socket by rename.

    A connection reaches either gatekeeper, or the one that has just exited.
    """
    first = start()
    stop, missing = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            if not (first.run / "shim" / "shim.sock").is_socket():
                missing.append(time.monotonic())

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(3):
        first.process.terminate()
        first.process.wait(30)
        first = start(run=first.run)
        assert first.ready
        assert in_cgroup(unmanaged, lambda run: bool(hello(run)), first.run)
    stop.set()
    watcher.join()
    assert missing == []


# -- life of the process --------------------------------------------------------------------------------------------


def test_a_second_gatekeeper_prints_an_error_and_exits(
    keeper: Keeper, start: Callable[..., Keeper], pins: Path
) -> None:
    command = [sys.executable, "-m", "fgpu_ebpf.gatekeeper", "--pins", pins, "--run-dir", keeper.run]
    root = Path(__file__).parents[2]
    second = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False, timeout=60)
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr.splitlines() == [
        f"fgpu gatekeeper: another gatekeeper runs and holds the lock {keeper.run}/gatekeeper.lock"
    ]


def remove_folder(run: Path) -> None:
    """Remove the folder in one step, so that the gatekeeper creates nothing in it meanwhile."""
    run.rename(run.with_name("removed"))
    shutil.rmtree(run.with_name("removed"))


def remake_folder(run: Path) -> None:
    remove_folder(run)
    run.mkdir()


@pytest.mark.parametrize("harm", [remove_folder, remake_folder, lambda run: (run / "gatekeeper.lock").unlink()])
def test_a_gatekeeper_without_its_lock_file_prints_an_error_and_exits(
    start: Callable[..., Keeper], tmp_path: Path, unmanaged: Path, harm: Callable[[Path], None]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    run.mkdir()
    with log.open("wb") as file:
        keeper = start(run=run, stderr=file)
        until((run / "gatekeeper.json").exists)  # the file is not written again for a second
        harm(run)
        run.mkdir(exist_ok=True)
        successor = start(run=run)
        assert successor.ready
        socket_of_the_successor = (run / "shim" / "shim.sock").stat().st_ino
        assert keeper.process.wait(30) == 1
    said = [
        line for line in log.read_text().splitlines() if "listening" not in line and "opened the ledger" not in line
    ]
    assert [line[len("2026-05-12 09:41:07 ") :] for line in said] == [
        f"fgpu gatekeeper: {run}/gatekeeper.lock is no longer the file that this gatekeeper has locked: exiting"
    ]
    assert (run / "shim" / "shim.sock").stat().st_ino == socket_of_the_successor
    assert in_cgroup(unmanaged, lambda: bool(hello(run)))


def test_the_gatekeeper_leaks_no_descriptor_while_the_ledger_is_partly_pinned(
    start: Callable[..., Keeper], pins: Path
) -> None:
    part = pins.with_name(f"{pins.name}-part")
    (part / "maps").mkdir(parents=True)
    fd = bpf.create_array_page("fgpu_part", 8)
    try:
        bpf.pin(fd, part / "maps" / "pages")
        keeper = start(pins=part)
        time.sleep(0.1)
        before = keeper.descriptors()
        time.sleep(0.3)
        until(lambda: keeper.descriptors() <= before)  # it may have a file open for a moment
    finally:
        os.close(fd)
        shutil.rmtree(part)


def test_sigterm_ends_the_heartbeat_and_keeps_a_socket_that_refuses_connections(
    start: Callable[..., Keeper], tenant: Make
) -> None:
    keeper = start()

    def outlive() -> tuple[bool, bool, bool]:
        reply = hello(keeper.run)
        assert reply
        control = reply.page(0)
        os.kill(keeper.process.pid, signal.SIGTERM)
        until(lambda: keeper.process.pid not in pids(), 2)
        beat = control.heartbeat_ns
        time.sleep(0.3)
        try:
            connect(keeper.run)
        except ConnectionRefusedError:
            return control.heartbeat_ns == beat, (keeper.run / "shim" / "shim.sock").is_socket(), True
        return False, False, False

    def pids() -> list[int]:
        state = Path(f"/proc/{keeper.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return [] if state == "Z" else [keeper.process.pid]

    assert in_cgroup(tenant(), outlive) == (True, True, True)
    assert keeper.process.wait(30) == 0


def test_the_gatekeeper_does_not_wait_for_a_log_without_a_reader(start: Callable[..., Keeper], tenant: Make) -> None:
    """A write to the log would not return until the test reads, so no hello would be answered."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    try:
        while True:
            os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    keeper = start(stderr=write, code=PATIENT)
    assert keeper.ready
    in_cgroup(tenant(), waits, keeper, 15)
    os.close(read)
    in_cgroup(tenant(), waits, keeper, 15)
    os.close(write)


def test_the_heartbeat_is_written_continuously(keeper: Keeper, tenant: Make) -> None:
    """A heartbeat is late by as much as the gatekeeper, or the process that reads it, has waited for a processor."""

    def watch() -> tuple[list[int], float]:
        reply = hello(keeper.run)
        assert reply
        seen: set[int] = set()
        page, deadline, late, before = reply.page(0), Deadline(2), 0.0, time.monotonic()
        while len(seen) < 5 and not deadline.is_over():
            seen.add(page.heartbeat_ns)
            time.sleep(0.005)
            late, before = max(late, time.monotonic() - before), time.monotonic()
        return sorted(seen), late

    waiting = waiting_of(keeper.process.pid)
    beats, late = in_cgroup(tenant(), watch)
    late += waiting()
    gaps = [later - earlier for earlier, later in itertools.pairwise(beats)]
    assert len(gaps) >= 3
    assert max(gaps) / 1e9 < 0.4 + late, late
