"""Helpers for benchmarks: requests to the service, programs in tenants, the file with the figures.

The module imports nothing of fgpu. Errors are BenchError.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.lib.service import FGPU, ROOT, BenchError

RUN = Path("/run/fgpu")
PATIENCE_SECONDS = 120.0  # a framework's start on a busy machine


def ask(**request: Any) -> Any:
    """Send one request to the control socket and return its result. Raises BenchError if the agent returns an error."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(str(RUN / "control.sock"))
        sock.sendall(json.dumps(request).encode() + b"\n")
        answer = json.loads(b"".join(iter(lambda: sock.recv(1 << 16), b"")))
    if "ok" not in answer:
        raise BenchError(f"{request}: {answer}")
    return answer["ok"]


def memory_of(name: str) -> dict[str, Any]:
    """Return the current figures of a tenant on device 0 (limit, used, peak, refused and others), as in a Snapshot."""
    for tenant in ask(verb="snapshot")["tenants"]:
        if tenant["tenant"] == name:
            return dict(tenant["devices"][0])
    raise BenchError(f"no tenant {name}")


def service_pids() -> dict[str, int]:
    """Return the pids of agent and gatekeeper."""
    lock = RUN / "gatekeeper.lock"
    return {"agent": int(ask(verb="ping")["pid"]), "gatekeeper": int(lock.read_text())}


def cpu_ms(pid: int) -> float:
    """Return the total processor time of all threads of a process, in milliseconds."""
    return time.clock_gettime_ns((~pid << 3) | 2) / 1e6  # see clock_getcpuclockid(3); /proc counts in 10 ms only


def children_ms(pid: int) -> int:
    """Return the processor time of a process's exited children, in milliseconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) * 1000 // os.sysconf("SC_CLK_TCK")


def cgroup_root() -> Path:
    """Return the mount point of cgroup v2."""
    for line in Path("/proc/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    raise BenchError("no cgroup v2 here")


class Program:
    """A program that reads and writes lines. With a limit (in bytes), it runs in a tenant with this name.

    `options`: other options of `fgpu run`.
    """

    def __init__(
        self, command: list[str], limit: int | None = None, name: str = "", options: Sequence[str] = ()
    ) -> None:
        self.name = name or Path(command[0]).name
        self._cgroup = None if limit is None else cgroup_root() / "fgpu" / name
        run = [] if limit is None else [*FGPU, "run", "--memory", f"{limit}B", *options, "--name", name, "--"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([*run, *command], stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True)
        self._left = b""

    def say(self, line: str) -> None:
        """Write one line to the program's stdin. If the program has exited, hear() reports it."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line.encode() + b"\n")

    def hear(self, seconds: float = PATIENCE_SECONDS) -> str:
        """Return one line of the program's stdout. Raises BenchError if it exited, or wrote nothing in `seconds`."""
        assert self.process.stdout
        deadline = time.monotonic() + seconds
        while b"\n" not in self._left:
            if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise BenchError(f"{self.name} writes no line within {seconds:.0f} s")
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                raise BenchError(f"{self.name} has exited: {self._left.decode(errors='replace')}")
            self._left += data
        line, self._left = self._left.split(b"\n", 1)
        return line.decode()

    def end(self) -> None:
        """Close the program's stdin and wait for its exit. After 10 s, kill it. Remove its cgroup."""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        if self._cgroup:
            remove_cgroup(self._cgroup)
            self._cgroup = None  # a later program may have a cgroup of this name


def remove_cgroup(cgroup: Path) -> None:
    """Kill what is left in a cgroup, and remove it. Raises OSError if a process is in it for another 10 s."""
    with contextlib.suppress(OSError):
        (cgroup / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + 10
    while True:
        try:
            return cgroup.rmdir()
        except FileNotFoundError:  # the agent has removed it
            return None
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextlib.contextmanager
def ending() -> Iterator[list[Program]]:
    """Yield a list. All programs in the list are ended at the end of the block."""
    programs: list[Program] = []
    try:
        yield programs
    finally:
        with contextlib.ExitStack() as ends:  # an exception of one end does not leave the others running
            for program in reversed(programs):
                ends.callback(program.end)


def record(name: str, lines: Mapping[str, tuple[float, str]]) -> None:
    """Print a line for each figure, and write build/bench/NAME.json. `lines`: (value, unit) by name."""
    for line, (value, unit) in lines.items():
        print(f"{line} {value:.2f} {unit}" if isinstance(value, float) else f"{line} {value} {unit}", flush=True)
    out = ROOT / f"build/bench/{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({line: {"value": v, "unit": u} for line, (v, u) in lines.items()}, indent=1) + "\n")
