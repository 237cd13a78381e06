"""The parker's main loop, which accepts requests of root and starts a process for each job.

The command is `python -m fgpu_ebpf.parker`. The loop never calls the driver. A connection has one request, and gets the
replies of its job. A job continues if its client closes the connection. If the process of a job exits without a result,
or hangs, a second process restores the job's processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fgpu_ebpf.linux import peer_credentials, sd_notify
from fgpu_ebpf.linux.clear_path import make_way
from fgpu_ebpf.linux.wakeup import Wakeup
from fgpu_ebpf.parker import claims, worker
from fgpu_ebpf.parker.cuda import Checkpoints
from fgpu_ebpf.parker.protocol import MOST_LINE_BYTES, UNCHANGED, Outcome, Request, RequestError, line, parse
from fgpu_ebpf.parker.room import Copy

SOCKET = "parker.sock"
MOST_JOBS = 64
LINE_SECONDS = 2.0
IDLE_SECONDS = 60.0  # a parker that systemd starts on demand exits after this idle time
LOOK_SECONDS = 5.0  # period at which a parker checks that the file of its socket exists
_FIRST_PASSED = 3  # the descriptor of the socket that systemd passes
SLOWEST = 256 << 20  # bytes per second (measured: 2 GB/s); a job hangs beyond this copying time plus its deadline
RECOVERY_SECONDS = 20.0


class Running:
    """A request, its connection, and the process that executes the request."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock: socket.socket | None = sock
        self.received, self.unsent, self.line = b"", b"", b""
        self.request: Request | None = None
        self.claimed = -1
        self.worker: worker.Worker | None = None
        self.until = time.monotonic() + LINE_SECONDS
        self.why = ""  # not empty: the job is a recovery
        self.is_killed, self.has_result = False, False


class Parker:
    """The state of the parker, and its loop."""

    def __init__(
        self, listener: socket.socket, run_dir: Path, open_driver: Callable[[], Checkpoints], is_lasting: bool,
        waits_for_jobs: bool,
    ) -> None:  # fmt: skip
        """Make a parker that serves at `listener`.

        `is_lasting`: the parker has created its own socket, and continues to run without jobs. `waits_for_jobs`:
        end() waits for the jobs, because their processes would be killed with the parker's process.
        """
        self._made = _file_at(run_dir / SOCKET) if is_lasting else None
        self._listener, self._run_dir, self._open_driver = listener, run_dir, open_driver
        self._is_lasting, self._waits_for_jobs, self._ended = is_lasting, waits_for_jobs, False
        self._jobs: dict[Running, None] = {}
        self._selector = selectors.DefaultSelector()
        self._wakeup = Wakeup()
        self._selector.register(self._wakeup, selectors.EVENT_READ, self._wakeup.clear)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._used = time.monotonic()

    def end(self, *_: object) -> None:
        """Make run() return, and accept no more connections. This method is also the handler of SIGTERM and SIGINT."""
        self._ended = True
        self._wakeup.wake()

    def run(self) -> None:
        """Serve until end() is called, or until the parker has no job and no possible client.

        No client can need a parker if the file of its socket was removed (`fgpu detach`). A parker that systemd starts
        on demand is not needed after IDLE_SECONDS without a job, because systemd starts another parker at the next
        request.
        """
        while not self._ended or (self._waits_for_jobs and self._jobs):
            for key, _ in self._selector.select(self._leisure()):
                key.data()
            now = time.monotonic()
            for job in [job for job in self._jobs if job.until <= now]:
                self._overdue(job)
            if self._jobs:
                self._used = now
            elif self._is_lasting:
                if _file_at(self._run_dir / SOCKET) != self._made:
                    return
            elif now - self._used >= IDLE_SECONDS:
                return

    def _leisure(self) -> float:
        if not self._jobs and self._is_lasting:
            return LOOK_SECONDS
        due = [job.until for job in self._jobs] or [self._used + IDLE_SECONDS]
        return max(0.0, min(due) - time.monotonic())

    # -- a request

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._listener.accept()
            if self._ended or peer_credentials.pid_and_uid(sock)[1] != 0 or len(self._jobs) >= MOST_JOBS:
                sock.close()
                return
            sock.setblocking(False)
            job = Running(sock)
            self._jobs[job] = None
            self._selector.register(sock, selectors.EVENT_READ, partial(self._receive, job))

    def _receive(self, job: Running) -> None:
        if not job.sock:  # the end of the job, reported together with this event, has closed the connection
            return
        try:
            more = job.sock.recv(MOST_LINE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        if not more:
            self._hang_up(job)
            return
        if job.request:  # a client sends nothing after its request
            return
        job.received += more
        if b"\n" in job.received or len(job.received) > MOST_LINE_BYTES:
            self._begin(job)

    def _begin(self, job: Running) -> None:
        op = ""
        try:
            request = parse(job.received)
            op = request.op
            # A request for states needs the claim too, because states change during a job.
            job.claimed = claims.claim(self._run_dir, [process.pid for process in request.processes])
            job.request = request
            self._start(job)
        except (RequestError, OSError) as error:
            job.has_result = True
            self._send(job, line(Outcome(UNCHANGED.get(op, ""), str(error)).reply()))
            self._finish(job)

    def _start(self, job: Running) -> None:
        assert job.request
        running = (other.request for other in self._jobs if other is not job and other.worker)
        parks = (request for request in running if request and request.op == "park")
        others = [Copy([process.pid for process in request.processes], request.size) for request in parks]
        job.worker = worker.start(job.request, job.claimed, job.why, others, self._open_driver)
        copying = job.request.size / SLOWEST
        job.until = time.monotonic() + copying + (RECOVERY_SECONDS if job.why else job.request.deadline_ms / 1000)
        job.is_killed, job.line = False, b""
        self._selector.register(job.worker.output, selectors.EVENT_READ, partial(self._relay, job))

    # -- a job

    def _relay(self, job: Running) -> None:
        assert job.worker
        text = os.read(job.worker.output, MOST_LINE_BYTES)
        if not text:
            self._ended_worker(job)
            return
        *lines, job.line = (job.line + text).split(b"\n")
        for one in lines:
            if one.startswith(b'{"at"'):
                self._send(job, one + b"\n")
            else:  # the result is sent when the processes may have another job
                job.has_result, job.unsent = True, one + b"\n"

    def _ended_worker(self, job: Running) -> None:
        """Handle the end of a job's worker: if the worker returned no result, have the job's processes restored."""
        assert job.worker
        assert job.request
        self._selector.unregister(job.worker.output)
        os.close(job.worker.output)
        _, status = os.waitpid(job.worker.pid, 0)
        job.worker = None
        if job.has_result:
            self._finish(job)
            return
        how = (
            f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.waitstatus_to_exitcode(status)}"
        )
        why = "a call of the driver timed out" if job.is_killed else f"the process of the job has ended with {how}"
        if job.why or job.request.op == "state":
            self._give_up(job, f"{job.why}; {why}" if job.why else why)
            return
        job.why = why
        try:
            self._start(job)
        except OSError as error:
            self._give_up(job, f"{why}; {error}")

    def _overdue(self, job: Running) -> None:
        """Handle a connection without a request, or a job that hangs. A killed process may hang in the driver."""
        if job.worker is None:
            self._finish(job)
        elif not job.is_killed:
            os.kill(job.worker.pid, signal.SIGKILL)
            job.is_killed, job.until = True, time.monotonic() + LINE_SECONDS
        else:
            self._selector.unregister(job.worker.output)
            os.close(job.worker.output)
            self._give_up(job, "a call of the driver hangs, and its process cannot be killed")

    def _give_up(self, job: Running, why: str) -> None:
        if not job.has_result:
            job.has_result, job.unsent = True, line(Outcome("lost", why).reply())
        self._finish(job)

    def _send(self, job: Running, text: bytes) -> None:
        """Send replies. A client that does not read its replies loses its connection."""
        if job.sock:
            try:
                if job.sock.send(text, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(text):
                    return
            except OSError:
                pass
            self._hang_up(job)

    def _hang_up(self, job: Running) -> None:
        """Close the connection. The job continues."""
        if job.sock:
            self._selector.unregister(job.sock)
            job.sock.close()
            job.sock = None
        if job.request is None:
            self._jobs.pop(job, None)

    def _finish(self, job: Running) -> None:
        if job.claimed >= 0:
            os.close(job.claimed)
            job.claimed = -1
        if job.unsent:
            self._send(job, job.unsent)
        self._hang_up(job)
        self._jobs.pop(job, None)


# -- start ----------------------------------------------------------------------------------------------------------


def _file_at(path: Path) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def passed_socket() -> socket.socket | None:
    """Return the socket that systemd has passed (sd_listen_fds), or None."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    os.set_inheritable(_FIRST_PASSED, False)
    return socket.socket(fileno=_FIRST_PASSED)


def listen(run_dir: Path) -> socket.socket:
    """Return a new socket at its path, to which only root can connect. Raise OSError on failure."""
    run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    path, aside = run_dir / SOCKET, run_dir / f".{SOCKET}"
    aside.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(aside))
    aside.chmod(0o600)
    listener.listen()
    make_way(str(path))
    aside.rename(path)
    return listener


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="fgpu-parker",
        description="Checkpoints GPU processes to host memory and restores GPU processes, for the agent.",
    )
    parser.add_argument("--run-dir", type=Path, default=Path("/run/fgpu"), help=f"the folder of {SOCKET}")
    parser.add_argument("--driver-root", type=Path, help="root of the NVIDIA driver's libraries (default: agent.yaml)")
    parser.add_argument("--wait-for-jobs", action="store_true", help="at SIGTERM, wait until no job runs")
    options = parser.parse_args(argv)
    passed = passed_socket()
    try:
        listener = passed or listen(options.run_dir)
    except OSError as error:
        print(f"fgpu parker: {error}", file=sys.stderr)
        return 1
    listener.setblocking(False)
    open_driver = partial(worker.host_driver, options.driver_root)
    parker = Parker(listener, options.run_dir, open_driver, passed is None, options.wait_for_jobs)
    signal.signal(signal.SIGTERM, parker.end)
    signal.signal(signal.SIGINT, parker.end)
    sd_notify.ready()
    parker.run()
    return 0
