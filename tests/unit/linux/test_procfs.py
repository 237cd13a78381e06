"""A shortage of memory or files is no end of a process."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import NoReturn

import pytest

from fgpu_ebpf.linux import procfs
from fgpu_ebpf.parker import processes
from fgpu_ebpf.parker.protocol import Named, RequestError


def fail(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.EMFILE, "too many open files")


@pytest.mark.parametrize("call", ["pidfd_open", "open", "listdir"])
def test_a_shortage_of_files_is_not_the_end_of_a_process(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    start = procfs.started(os.getpid())
    assert start
    monkeypatch.setattr(os, call, fail)
    assert not procfs.ended(os.getpid())
    assert not procfs.is_exiting(os.getpid(), os.getpid())
    if call == "open":
        with pytest.raises(OSError, match="too many open files"):
            procfs.started(os.getpid())
    else:
        assert procfs.started(os.getpid()) == start


@pytest.mark.parametrize("call", ["pidfd_open", "open"])
def test_the_parker_reports_no_process_as_gone_in_a_shortage(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The agent would delete the entry of a process that is parked."""
    named = Named(os.getpid(), procfs.started(os.getpid()) or 0)
    held = processes.Process(named)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="too many open files"):
        processes.Process(named)
    if call == "open":
        with pytest.raises(OSError, match="too many open files"):
            held.is_there()
    else:
        assert held.is_there()
    held.close()


def test_a_process_that_has_exited_has_ended() -> None:
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert (procfs.ended(child.pid), procfs.started(child.pid)) == (True, None), "a zombie"
    assert (procfs.ended(child.pid), procfs.started(child.pid)) == (True, None)
    assert procfs.is_exiting(child.pid, child.pid)
    assert not processes.Process(Named(child.pid, 1)).is_there()


def test_a_stopped_process_cannot_hide_its_state_by_a_name_with_a_line_end() -> None:
    program = r"import os; open('/proc/self/comm', 'w').write('a\rState:'); os.kill(os.getpid(), 19)"
    with subprocess.Popen([sys.executable, "-c", program]) as child:
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        held = processes.Process(Named(child.pid, procfs.started(child.pid) or 0))
        try:
            with pytest.raises(RequestError, match="is stopped"):
                held.check_runs()
        finally:
            held.close()
            child.send_signal(signal.SIGCONT)


def test_a_cgroup_with_a_line_end_in_its_name_is_read_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_roots", lambda _: {"": Path("/mnt")})
    monkeypatch.setattr(procfs, "read", lambda _: "0::/a\rb\x85c/d\n".encode())
    found = [path for path, _ in processes.cgroups(1, "freezer")]
    assert found[:2] == ["/a\rb\x85c/d", "/a\rb\x85c"]


def test_a_file_with_many_lines_is_read_to_its_end() -> None:
    """The kernel returns such a file page by page."""
    program = """
import mmap, sys
from fgpu_ebpf.linux import procfs
held = [mmap.mmap(-1, 4096, prot=mmap.PROT_READ if n % 2 else mmap.PROT_WRITE) for n in range(400)]
with open("/proc/self/maps", "rb") as file:
    lines = len(file.read().splitlines())
print(lines > 300, abs(len(procfs.read("/proc/self/maps", 1 << 20).splitlines()) - lines) < 10)
print(len(procfs.read("/proc/self/maps", 10)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "10"]


def test_a_read_takes_no_more_memory_than_the_file() -> None:
    tracemalloc.start()
    try:
        procfs.read("/proc/self/cgroup", 1 << 26)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
