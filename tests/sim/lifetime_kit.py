"""Processes that hold device memory, and the ways in which their connection to the driver can be kept open."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable
from subprocess import Popen

from .conftest import Machine, say
from .sharing_kit import hear

SYS_PIDFD_GETFD = 438

# A program that holds memory and runs the lines that it reads. It answers each line with one line.
FILES = """
import socket
def driver_files():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try: target = os.readlink("/proc/self/fd/" + name)
        except OSError: continue
        if int(name) > 2 and (target.startswith("socket:") or target.endswith("/nvidiactl")): found.append(int(name))
    return sorted(found)
def serve():
    for line in sys.stdin:
        word, *more = line.split()
        if word == "fork":
            child = os.fork()
            if not child:
                os.closerange(0, 3); time.sleep(60); os._exit(0)
            say(child)
        if word == "send":
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                files = driver_files(); sock.connect("\\0" + more[0]); socket.send_fds(sock, [b"x"], files)
            say("sent")
"""


def get_descriptor(pid: int, fd: int) -> int:
    """Duplicate another process's descriptor."""
    pidfd = os.pidfd_open(pid)
    try:
        return int(ctypes.CDLL(None).syscall(SYS_PIDFD_GETFD, pidfd, fd, 0))
    finally:
        os.close(pidfd)


def sockets_of(pid: int) -> list[int]:
    """Return the process's descriptors of sockets. A client of the driver has one."""
    folder = f"/proc/{pid}/fd"
    return [int(fd) for fd in os.listdir(folder) if os.readlink(f"{folder}/{fd}").startswith("socket:")]


def kept_by_child(client: Popen[str]) -> Callable[[], None]:
    say(client, "fork")
    child = int(hear(client))
    return lambda: os.kill(child, signal.SIGKILL)


def kept_in_queue(client: Popen[str]) -> Callable[[], None]:
    """Keep the connection in the queue of a socket that is never read."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        name = f"fgpu-kept-{os.getpid()}-{time.monotonic_ns()}"
        listener.bind(f"\0{name}")
        listener.listen(1)
        listener.settimeout(10)
        say(client, f"send {name}")
        sock, _ = listener.accept()
        assert hear(client) == "sent"
    return sock.close


def kept_by_other(client: Popen[str]) -> Callable[[], None]:
    """Keep the connection in a process that took a duplicate without the client's help."""
    (fd,) = sockets_of(client.pid)
    duplicate = get_descriptor(client.pid, fd)
    return lambda: os.close(duplicate)


KEEPERS = {"child": kept_by_child, "queue": kept_in_queue, "other": kept_by_other}


def compute_rows(machine: Machine) -> dict[int, int]:
    """Return NVML's list of processes: pid to MiB."""
    words = [machine.tools / "nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    lines = machine.run(*words).stdout.splitlines()
    return {int(pid): int(mib) for pid, mib in (line.split(", ") for line in lines)}
