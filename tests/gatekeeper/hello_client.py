"""The hello of a shim, in Python, and child processes that act inside a cgroup."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fgpu_ebpf import abi
from tests.support.wait import eventually


def request(**changes: Any) -> bytes:
    """Return a well-formed hello, with some fields changed."""
    size = ctypes.sizeof(abi.Hello)
    return bytes(abi.Hello(**{"magic": abi.MAGIC, "version": abi.LAYOUT, "size": size, **changes}))


@dataclass
class Reply:
    """An answer and its descriptors: control, status, usage pages leaf first."""

    answer: abi.Answer
    fds: list[int]
    maps: list[mmap.mmap] = field(default_factory=list)

    def page(self, place: int, form: type[ctypes.Structure] = abi.ControlPage) -> Any:
        """Return a live view of one page."""
        memory = mmap.mmap(self.fds[place], abi.PAGE_BYTES, prot=mmap.PROT_READ)
        self.maps.append(memory)
        return Live(memory, form)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class Live:
    """The current values of a page's fields, which can only be read."""

    def __init__(self, memory: mmap.mmap, form: type[ctypes.Structure]) -> None:
        self._memory, self._form = memory, form

    def __getattr__(self, name: str) -> Any:
        return getattr(self._form.from_buffer_copy(self._memory), name)


def connect(run: Path, patience: float = 10.0) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    limit = struct.pack("qq", int(patience), int(patience % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)  # the send blocks, so that it queues behind a flood
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.connect(str(run / "shim" / "shim.sock"))
    return sock


def hello(run: Path, payload: bytes | None = None, patience: float = 10.0) -> Reply | None:
    """Send one hello. Return its answer, or None if there is none."""
    with connect(run, patience) as sock:
        sock.send(request() if payload is None else payload)
        return receive(sock)


def receive(sock: socket.socket) -> Reply | None:
    try:
        data, fds, flags, _ = socket.recv_fds(sock, 512, 16)
    except ConnectionResetError:
        return None
    if not data:
        return None
    assert len(data) == ctypes.sizeof(abi.Answer)
    assert not flags & socket.MSG_CTRUNC
    return Reply(abi.Answer.from_buffer_copy(data), list(fds))


class Child:
    """A process in a cgroup that runs one function and returns its result."""

    def __init__(self, cgroup: Path, work: Callable[..., Any], *args: Any, uid: int = 0) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._read)
            self._live(cgroup, work, args, uid, write)
        os.close(write)

    @staticmethod
    def _live(cgroup: Path, work: Callable[..., Any], args: Any, uid: int, write: int) -> None:
        gc.disable()  # otherwise each of hundreds of children might copy all memory of the parent
        signal.alarm(120)  # a test that has failed leaves no child for long
        try:
            (cgroup / "cgroup.procs").write_text("0")
            if uid:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            said: Any = (True, work(*args))
        except BaseException:  # the parent prints all of it
            said = (False, traceback.format_exc())
        try:
            with open(write, "wb") as pipe:
                pickle.dump(said, pipe)
        finally:
            os._exit(0)  # never return into the test runner, of which this process is a copy

    def has_said(self) -> bool:
        """Return whether the function has returned. Its result is still unread."""
        return bool(select.select([self._read], [], [], 0)[0])

    def result(self) -> Any:
        with open(self._read, "rb") as pipe:
            good, said = pickle.load(pipe)
        os.waitpid(self.pid, 0)
        assert good, said
        return said

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._read)


def in_cgroup(cgroup: Path, work: Callable[..., Any], *args: Any, uid: int = 0) -> Any:
    return Child(cgroup, work, *args, uid=uid).result()


def until(true: Callable[[], Any], patience: float = 3.0) -> Any:
    """Wait until the function returns a true value, and return that value."""
    return eventually(true, patience)
