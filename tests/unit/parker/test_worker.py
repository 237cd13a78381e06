"""The process of a job reports whether it has made a call of the driver."""

from __future__ import annotations

import errno
import json
import os
from typing import Any, NoReturn

import pytest

from fgpu_ebpf.linux import procfs
from fgpu_ebpf.parker import worker
from fgpu_ebpf.parker.cuda import Checkpoints, DriverError, State
from fgpu_ebpf.parker.protocol import Named, Request
from tests.unit.parker.parker_kit import Driver


def no_driver() -> Checkpoints:
    raise DriverError("cuInit returned 999", 999)


def failing() -> Checkpoints:
    driver = Driver((os.getppid(),), State.LOCKED)

    def fail(*_: object) -> None:
        raise OSError("no memory")

    driver.at = fail
    return driver


def reply(op: str, why: str, open_driver: Any) -> dict[str, Any]:
    pid = os.getpid()
    request = Request(op, (Named(pid, procfs.started(pid) or 0),))
    started = worker.start(request, -1, why, (), open_driver)
    with os.fdopen(started.output) as output:
        said = json.loads(output.read().splitlines()[-1])
    os.waitpid(started.pid, 0)
    return dict(said)


@pytest.mark.parametrize(("op", "result"), [("park", "running"), ("wake", "parked"), ("state", "")])
def test_a_job_without_the_driver_has_changed_nothing(op: str, result: str) -> None:
    assert reply(op, "", no_driver) == {"result": result, "error": "cuInit returned 999", "changed": False}


def test_a_recovery_without_the_driver_may_follow_a_job_that_has_changed_states() -> None:
    assert reply("park", "killed", no_driver) == {"result": "lost", "error": "killed; cuInit returned 999"}


def test_a_job_that_fails_after_a_call_may_have_changed_states() -> None:
    assert reply("wake", "", failing) == {"result": "parked", "error": "no memory"}


def test_a_fork_that_fails_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> NoReturn:
        raise OSError(errno.EAGAIN, "too many processes")

    monkeypatch.setattr(os, "fork", fail)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="too many processes"):
        worker.start(Request("state", ()), -1, "", (), no_driver)
    assert len(os.listdir("/proc/self/fd")) == len(before)
