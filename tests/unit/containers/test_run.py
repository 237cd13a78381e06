"""Tests of `fgpu run`: after which failures of its mounts the program is not run, and signals at its start."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from fgpu_ebpf.containers import run

USUAL, OF_NIX = run.PRELOADS


@pytest.fixture
def mounts(monkeypatch):
    """Return the list of mounted targets, and a map from target to the error of its mount."""
    done, errors = [], {}

    def mount(source, target, kind, flags):
        if target in errors:
            raise OSError(errors[target], os.strerror(errors[target]))
        done.append(target)

    monkeypatch.setattr(run, "_mount", mount)
    monkeypatch.setattr(run, "LIBC", type("Libc", (), {"unshare": staticmethod(lambda _: 0)}))
    monkeypatch.setattr(run, "_create_preload_file", lambda *_: None)
    return done, errors


@pytest.mark.parametrize("why", [errno.EROFS, errno.ENOENT])
def test_programs_run_with_the_first_list_if_the_second_cannot_be_mounted(mounts, tmp_path, why):
    """The reason is a read-only /etc, or an agent that is older than the command."""
    done, errors = mounts
    errors[str(OF_NIX)] = why
    run._preload_the_shim(tmp_path)
    assert done == ["/", str(USUAL)]


@pytest.mark.parametrize(("place", "why"), [(USUAL, errno.EROFS), (USUAL, errno.ENOENT), (OF_NIX, errno.EPERM)])
def test_a_program_is_not_run_without_the_first_list_or_permission_to_mount_the_second(mounts, tmp_path, place, why):
    mounts[1][str(place)] = why
    with pytest.raises(run.LaunchError, match=str(place)):
        run._preload_the_shim(tmp_path)


EARLY = """
import os, signal, sys
from types import SimpleNamespace
from fgpu_ebpf.containers import run

fork = os.fork

def interrupted():
    child = fork()
    if child:
        os.kill(os.getpid(), int(sys.argv[1]))
    return child

os.fork = interrupted
run.enter = run._mount = lambda *_: None
run.LIBC = SimpleNamespace(unshare=lambda _: 0, prctl=lambda *_: 0)
sys.exit(run.run(SimpleNamespace(pid_namespace=True), ["sleep", "60"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_forwarded_from_the_moment_on_that_the_program_exists(number: signal.Signals) -> None:
    """The kernel delivers the signal to the waiting process before that process runs again after fork()."""
    command = [sys.executable, "-c", EARLY, str(int(number))]
    assert subprocess.run(command, timeout=30, check=False).returncode == 128 + number
