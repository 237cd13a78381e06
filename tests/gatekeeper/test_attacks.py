"""Attacks with torn reads, passed descriptors and races: T2, T4 and T10 of docs/security.md."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from fgpu_ebpf import abi
from fgpu_ebpf.gatekeeper.listener import Listener
from fgpu_ebpf.gatekeeper.memfd_pages import ControlMemory, row_bytes
from tests.gatekeeper.conftest import ROOT, Keeper
from tests.gatekeeper.hello_client import Child, Reply, connect, hello, in_cgroup, receive, request, until

Make = Callable[..., Path]
NOBODY = 65534
LIBC = ctypes.CDLL(None)
AT_FDCWD, RENAME_EXCHANGE = -100, 2
MANY = 10_000  # updates between two checks whether the readers have exited
# The number of states that a reader must read. If a reader and the writer alternate on a processor, the number of reads
# proves nothing.
STATES = 1000


# -- T2: half an update ---------------------------------------------------------------------------------------------


def test_no_reader_reads_half_an_update(tmp_path: Path, scale: Callable[..., int]) -> None:
    """Two readers run at full speed, while the gatekeeper's own code writes without a pause."""
    reads, flags = scale(2_000_000, 50_000_000, 500_000_000), ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    reader, memory = tmp_path / "reader", ControlMemory()
    command = ["gcc", *flags, f"-I{ROOT}/bpf", "-o", reader, Path(__file__).with_name("reader.c")]
    subprocess.run(command, check=True)
    states = 1
    memory.show(row_bytes([(pid, 0, states) for pid in range(4)]))
    read = [reader, str(memory.descriptor), str(reads), str(STATES)]
    readers = [subprocess.Popen(read, stdout=subprocess.PIPE, text=True, pass_fds=[memory.descriptor]) for _ in "12"]
    try:
        while any(reader.poll() is None for reader in readers):
            for _ in range(MANY):
                states += 1
                memory.show(row_bytes([(pid, 0, states) for pid in range(4)]))
    finally:
        for process in readers:
            process.kill()
    found = [[int(word) for word in reader.communicate()[0].split()] for reader in readers]
    assert [(torn, empty) for torn, empty, _, _ in found] == [(0, 0)] * 2
    assert all(STATES <= seen <= states for _, _, seen, _ in found)
    memory.close()


# -- T4: another process's socket, another process's pages -----------------------------------------------------------


def use_sockets(channel: socket.socket) -> int:
    """Send a hello on every received socket, and report to the peer of `channel` whether it was answered.

    Return how many were answered with pages of that peer.
    """
    right = 0
    while data := socket.recv_fds(channel, 8, 1):
        word, fds, _, _ = data
        if not word:
            return right
        with socket.socket(fileno=fds[0]) as sock:
            with contextlib.suppress(BrokenPipeError):
                sock.send(request())
            reply = receive(sock)
        if reply:
            right += reply.page(2, abi.UsagePage).cgroup == int.from_bytes(word, "little")
            reply.maps.pop().close()
            reply.close()
        channel.send(b"." if reply else b"-")
    return right


def test_the_connecting_process_is_answered_even_if_another_uses_its_socket(
    keeper: Keeper, tenant: Make, scale: Callable[..., int]
) -> None:
    mine, other, times = tenant(), tenant(), scale(20, 1000, 10_000)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    user = Child(other, lambda: (ours.close(), use_sockets(theirs))[1])
    theirs.close()

    def hand_on() -> int:
        answered = 0
        while answered < times:
            with connect(keeper.run) as sock:
                socket.send_fds(ours, [mine.stat().st_ino.to_bytes(8, "little")], [sock.fileno()])
            if ours.recv(1) == b".":
                answered += 1
            else:  # its tenant has used its time up: a shim sends another hello
                time.sleep(0.02)
        return answered

    assert in_cgroup(mine, hand_on) == times
    ours.close()
    assert user.result() == times


def test_the_heartbeat_of_pages_passed_on_stops_when_their_own_process_ends(keeper: Keeper, tenant: Make) -> None:
    """The heartbeat of the pages stops with the process that they were created for, and the gatekeeper closes them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def owner() -> None:
        with connect(keeper.run) as sock:
            sock.send(request())
            reply = receive(sock)
        assert reply
        socket.send_fds(theirs, [b"."], [reply.fds[0]])
        signal.pause()

    owning = Child(tenant(), owner)
    _, fds, _, _ = socket.recv_fds(ours, 8, 1)
    until(lambda: keeper.count("processes") == 1)
    owning.kill()
    until(lambda: keeper.count("processes") == 0)

    def watch() -> bool:
        """Read another process's page for two heartbeats of this process's page.

        Return whether its heartbeat has stopped.
        """
        theirs, own = Reply(abi.Answer(), fds).page(0), hello(keeper.run)
        assert own
        page, last = own.page(0), theirs.heartbeat_ns
        for _ in range(2):
            beat = page.heartbeat_ns
            until(lambda beat=beat: page.heartbeat_ns != beat)
        return bool(theirs.heartbeat_ns == last)

    assert in_cgroup(tenant(), watch)
    os.close(fds[0])


# -- T10: a race for the folder -------------------------------------------------------------------------------------


def files(folder: Path) -> list[tuple[str, int]]:
    return sorted((entry.name, entry.inode()) for entry in os.scandir(folder))


def test_the_gatekeeper_touches_no_other_folder_in_a_race_for_its_folder(
    tmp_path: Path, scale: Callable[..., int]
) -> None:
    """The folder changes at full speed between a link to root's folder, another user's folder, and the right folder."""
    run, linked, foreign = tmp_path / "run", tmp_path / "linked", tmp_path / "foreign"
    for folder in (run, linked, foreign):
        folder.mkdir()
    for folder in (linked, foreign):
        for name in ("shim.sock", ".shim.sock"):
            (folder / name).touch()
    os.chown(foreign, NOBODY, NOBODY)
    before = files(linked), files(foreign)

    (run / "link").symlink_to(linked)
    foreign.rename(run / "foreign")
    (run / "shim").mkdir()
    racer = os.fork()
    if racer == 0:
        swap_for_ever(run)
    door, opened, refused = Listener(run), 0, 0
    try:
        until, least = time.monotonic() + 60, scale(100, 1000, 10_000)
        while opened + refused < least or (not (opened and refused) and time.monotonic() < until):
            try:
                door.open()
                opened += 1
            except OSError:
                refused += 1
        assert os.waitpid(racer, os.WNOHANG) == (0, 0), "there was no race"
    finally:
        os.kill(racer, signal.SIGKILL)
        os.waitpid(racer, 0)
        door.close()
    swapped = (run / "shim").stat().st_uid == NOBODY and not (run / "shim").is_symlink()
    assert (files(linked), files(run / ("shim" if swapped else "foreign"))) == before
    assert refused > 0
    assert opened > 0


def swap_for_ever(run: Path) -> None:
    """Replace `shim` by a link, the right folder, another user's folder, and the right folder, without end."""
    try:
        for name in itertools.cycle((b"link", b"link", b"foreign", b"foreign")):
            here, there = os.fsencode(run / "shim"), os.fsencode(run) + b"/" + name
            if LIBC.renameat2(AT_FDCWD, here, AT_FDCWD, there, RENAME_EXCHANGE):
                break
    finally:
        os._exit(1)
