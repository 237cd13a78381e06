"""A shortage of memory or files is no end of a process."""

from __future__ import annotations

import errno
import os
import subprocess
from typing import NoReturn

import pytest

from fgpu_ebpf.linux import procfs
from fgpu_ebpf.parker import processes
from fgpu_ebpf.parker.protocol import Named


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
