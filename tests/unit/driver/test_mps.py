"""Tests of `fgpu mps`, with a program in place of NVIDIA's control daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fgpu_ebpf.driver import mps
from tests.support.wait import eventually

DAEMON = """#!%s
import os, signal, socket, sys, time
with socket.socket(socket.AF_UNIX) as control:
    control.bind(os.environ["CUDA_MPS_PIPE_DIRECTORY"] + "/control")
    open(os.environ["CUDA_MPS_PIPE_DIRECTORY"] + "/args", "w").write(" ".join(sys.argv[1:]))
    time.sleep(60)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return a run folder with the folder that containers have, and a daemon in the path of programs."""
    folder = tmp_path / "run"
    (folder / "shim").mkdir(parents=True)
    daemon = tmp_path / "bin" / mps.DAEMON
    daemon.parent.mkdir()
    daemon.write_text(DAEMON % sys.executable)
    daemon.chmod(0o755)
    return folder


@pytest.fixture
def command(run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    code = (
        "import sys; from pathlib import Path; from fgpu_ebpf.driver import mps; sys.exit(mps.serve(Path(sys.argv[1])))"
    )
    environment = os.environ | {"PATH": f"{run_dir.parent}/bin:{os.environ['PATH']}"}
    with subprocess.Popen([sys.executable, "-c", code, str(run_dir)], env=environment) as process:
        yield process
        process.kill()


def test_containers_get_the_socket_and_nothing_else_of_the_daemon_s_folder(command, run_dir):
    eventually(lambda: mps.check(run_dir).ok)
    shared = mps.shared(run_dir)
    assert os.listdir(shared.parent) == ["control"]
    assert shared.samefile(run_dir / "mps/control")
    assert (run_dir / "mps").stat().st_mode & 0o777 == 0o700
    eventually(lambda: (run_dir / "mps/args").exists() and (run_dir / "mps/args").read_text())
    assert (run_dir / "mps/args").read_text() == "-f -multiuser-server"


def test_sigterm_ends_the_daemon_and_removes_the_socket(command, run_dir):
    eventually(lambda: mps.check(run_dir).ok)
    command.send_signal(signal.SIGTERM)
    assert command.wait(10) == 0
    assert not mps.shared(run_dir).parent.exists()
    assert not (run_dir / "mps").exists()


def test_a_daemon_that_ends_by_itself_is_an_error(command, run_dir):
    eventually(lambda: mps.check(run_dir).ok)
    (pid,) = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    os.kill(int(pid), signal.SIGKILL)
    assert command.wait(10) == 1
    assert not mps.shared(run_dir).parent.exists()


def test_what_an_earlier_daemon_has_left_is_replaced(run_dir, request):
    left = mps.shared(run_dir)
    left.parent.mkdir()
    left.touch()
    (run_dir / "mps").mkdir()
    (run_dir / "mps/control").touch()
    assert not mps.check(run_dir).ok
    request.getfixturevalue("command")
    eventually(lambda: mps.check(run_dir).ok)


def test_a_host_without_mps(run_dir, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert mps.serve(run_dir) == 1
    assert "there is no nvidia-cuda-mps-control" in capsys.readouterr().err
    assert mps.check(run_dir).fix == "systemctl enable --now fgpu-mps"
