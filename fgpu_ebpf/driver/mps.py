"""NVIDIA's MPS for concurrent devices: `fgpu mps` starts MPS's control daemon and gives containers the daemon's socket.

Programs find the daemon by the socket `control`. The daemon's folder also has a socket through which root can end the
daemon, and root in a container is root for that socket. Therefore the folder stays private, and a hard link to
`control` is created in the folder `shim`, which every container has. The shim makes a program use MPS only if the
folder with this link exists. The command `fgpu mps` runs in a process of its own, and exits if the daemon exits. Errors
are OSError.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from fgpu_ebpf.check import Check

DAEMON = "nvidia-cuda-mps-control"
START_SECONDS = 30.0
STEP_SECONDS = 0.05


def shared(run_dir: Path) -> Path:
    """Return the path of the link to the daemon's socket, which programs in containers use."""
    return run_dir / "shim/mps/control"


def check(run_dir: Path) -> Check:
    """Check that programs on concurrent devices find the daemon's socket."""
    if shared(run_dir).is_socket():
        return Check("mps", True, str(shared(run_dir)))
    found = "the MPS daemon for devices with `sharing: concurrent` is not running"
    return Check("mps", False, found, "systemctl enable --now fgpu-mps")


def serve(run_dir: Path) -> int:
    """Run the daemon until SIGTERM or SIGINT, or until the daemon exits. Return the exit status of the command.

    Programs that run when the daemon exits lose their contexts.
    """
    if not shutil.which(DAEMON):
        print(f"fgpu mps: there is no {DAEMON}: install the NVIDIA driver's MPS", file=sys.stderr)
        return 1
    private = run_dir / "mps"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(private)
    private.mkdir(mode=0o700, parents=True)
    # The folder for log files does not exist, so the daemon writes none: nothing would limit their size.
    folders = {"CUDA_MPS_PIPE_DIRECTORY": str(private), "CUDA_MPS_LOG_DIRECTORY": str(private / "none")}
    command = [DAEMON, "-f", "-multiuser-server"]
    daemon = subprocess.Popen(command, env=os.environ | folders, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(_number: int, _frame: FrameType | None) -> None:
        _withdraw(run_dir)
        daemon.terminate()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        if not _offer(run_dir, private / "control", daemon):
            print("fgpu mps: the daemon has not started", file=sys.stderr)
            daemon.terminate()
        status = daemon.wait()
    finally:
        _withdraw(run_dir)
        shutil.rmtree(private, ignore_errors=True)
    return 0 if status in (0, -signal.SIGTERM) else 1


def _offer(run_dir: Path, socket: Path, daemon: subprocess.Popen[bytes]) -> bool:
    """Link the socket into the folder of containers. Return False if the daemon or the gatekeeper does not start."""
    until = time.monotonic() + START_SECONDS
    while not (socket.is_socket() and (run_dir / "shim").is_dir()):  # the gatekeeper creates the folder `shim`
        if daemon.poll() is not None or time.monotonic() > until:
            return False
        time.sleep(STEP_SECONDS)
    link = shared(run_dir)
    _withdraw(run_dir)
    link.parent.mkdir(mode=0o755)
    link.hardlink_to(socket)
    return True


def _withdraw(run_dir: Path) -> None:
    """Remove the link and its folder: programs that start from now on do not use MPS."""
    with contextlib.suppress(FileNotFoundError):
        shared(run_dir).unlink()
    with contextlib.suppress(FileNotFoundError):
        shared(run_dir).parent.rmdir()
