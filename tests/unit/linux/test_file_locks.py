"""Lock files: one holder, root only, and a check of a lock does not prevent another process from taking it."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from fgpu_ebpf.linux import file_locks
from fgpu_ebpf.linux.file_locks import FileLock, holder, is_locked
from tests.support.wait import Deadline
from tests.unit.root_kit import needs_root


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run/fgpu.lock"


def test_a_short_shared_lock_of_a_check_does_not_prevent_the_lock_from_being_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.parent.mkdir()
    path.touch()
    with open(path, "rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        waits = iter([lambda: None, lambda: fcntl.flock(looking, fcntl.LOCK_UN)])  # the check ends in the second wait
        monkeypatch.setattr(file_locks.time, "sleep", lambda _: next(waits)())
        assert FileLock(path).take(), "a short check was taken for a holder"


def test_a_second_lock_on_the_same_file_is_refused_within_2_s(path: Path) -> None:
    first, deadline = FileLock(path), Deadline(2)
    assert first.take()
    assert not FileLock(path).take()
    assert not deadline.is_over()
    assert (is_locked(path), holder(path)) == (True, os.getpid())


def test_a_released_lock_can_be_taken(path: Path) -> None:
    first, second = FileLock(path), FileLock(path)
    assert first.take()
    first.release()
    first.release()
    assert not is_locked(path)
    assert second.take()


def test_a_replaced_lock_file_is_not_held(path: Path) -> None:
    lock = FileLock(path)
    assert lock.take()
    assert lock.is_held()
    path.unlink()
    assert not lock.is_held()
    other = FileLock(path)
    assert other.take()
    assert (lock.is_held(), other.is_held()) == (False, True)


@needs_root("it starts a program as another user")
@pytest.mark.parametrize("is_there", [False, True], ids=["new", "of an earlier version"])
def test_no_user_except_root_can_take_the_lock(path: Path, is_there: bool) -> None:
    """flock() needs only permission to read: otherwise a local user could prevent the agent's start."""
    path.parent.mkdir(mode=0o755)
    if is_there:
        path.touch()
        path.chmod(0o644)
    lock = FileLock(path)
    assert lock.take()
    lock.release()
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "flock", "--nonblock", path, "true"], capture_output=True
    )
    assert done.returncode != 0
    assert FileLock(path).take()


@pytest.mark.parametrize("text", ["", "x\n"])
def test_a_file_without_a_pid_has_no_holder(path: Path, text: str) -> None:
    path.parent.mkdir()
    assert holder(path) is None
    path.write_text(text)
    assert holder(path) is None
