"""Tests of a peer's identity on older kernels: a socket gives only a pid, and a pidfd only its entry in /proc."""

from __future__ import annotations

import os
import socket
import subprocess
from time import monotonic_ns

import pytest

from fgpu_ebpf.gatekeeper import peer_pidfd
from fgpu_ebpf.gatekeeper.peer_pidfd import PeerIdentifier
from fgpu_ebpf.linux import procfs


@pytest.fixture
def sock(monkeypatch: pytest.MonkeyPatch):
    """Return a connection from this process, on a kernel before Linux 6.5."""
    monkeypatch.setattr(peer_pidfd, "SO_PEERPIDFD", 9999)
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        yield one


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a kernel that gives no information on a pidfd."""
    monkeypatch.setattr(procfs, "_PIDFD_GET_INFO", 0xC040EE0B)
    monkeypatch.setattr(procfs, "_PIDFD_GET_PID_NAMESPACE", 0xEE05)


def test_a_peer_is_identified_if_no_process_of_its_pid_has_ended_since(sock):
    pidfd = PeerIdentifier(lambda pid: 0 if pid == os.getpid() else None).pidfd(sock)
    assert procfs.identity(pidfd)[0] == os.getpid()
    os.close(pidfd)


@pytest.mark.parametrize("ended", [monotonic_ns, lambda: None], ids=["ended since", "unknown"])
def test_a_peer_that_may_be_another_process_is_not_identified(sock, ended):
    found = PeerIdentifier(lambda _: ended())
    with pytest.raises(ProcessLookupError):
        found.pidfd(sock)


def test_an_exit_before_the_connection_belongs_to_another_process(sock):
    ended_ns = monotonic_ns()
    found = PeerIdentifier(lambda _: ended_ns)
    found.none_waiting(monotonic_ns())
    os.close(found.pidfd(sock))


def test_proc_and_the_pidfd_give_the_same_identity(monkeypatch):
    pidfd = os.pidfd_open(os.getpid())
    said = procfs.identity(pidfd), procfs.pid_space(pidfd)
    monkeypatch.setattr(procfs, "_PIDFD_GET_INFO", 0xC040EE0B)
    monkeypatch.setattr(procfs, "_PIDFD_GET_PID_NAMESPACE", 0xEE05)
    assert (procfs.identity(pidfd), procfs.pid_space(pidfd)) == said
    os.close(pidfd)


@pytest.mark.parametrize("reaped", [True, False])
def test_an_ended_peer_is_not_identified(by_name, reaped):
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    pidfd = os.pidfd_open(child.pid)
    child.stdin.close()
    if reaped:
        child.wait()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    for ask in (procfs.identity, procfs.pid_space):
        with pytest.raises(OSError, match=r"the process has exited|No such"):
            ask(pidfd)
    os.close(pidfd)
    child.wait()
