"""Provide one simulated driver for each test that requests it, build missing parts, and change nothing else.

The libraries find their server at one fixed path. So that several test runs do not use the same one, each server runs
in a mount namespace with its own `/run`, and clients are started inside that namespace.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.wait import Deadline, eventually

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "sim"
BUILD = Path(os.environ.get("FGPU_SIM_BUILD", ROOT / "build" / "sim"))
HEADERS = ROOT / "build" / "headers"

MIB = 1 << 20

# Imported by every client script that the tests run with `python -c`.
CLIENT = """
import ctypes as C, os, sys, time
L = C.CDLL("libcuda.so.1")
def need(name, *args):
    result = getattr(L, name)(*args)
    if result:
        print("failed", name, result, flush=True)
        sys.exit(1)
def start(device=0):
    need("cuInit", 0)
    context = C.c_void_p()
    need("cuDevicePrimaryCtxRetain", C.byref(context), device)
    need("cuCtxSetCurrent", context)
    return context
def alloc(size):
    pointer = C.c_uint64()
    need("cuMemAlloc_v2", C.byref(pointer), C.c_size_t(size))
    return pointer
def info():
    free, total = C.c_size_t(), C.c_size_t()
    need("cuMemGetInfo_v2", C.byref(free), C.byref(total))
    return free.value, total.value
def say(*words):
    print(*words, flush=True)
def wait():
    sys.stdin.readline()
def stream(flags=1):
    stream = C.c_void_p()
    need("cuStreamCreate", C.byref(stream), flags)
    return stream
def kernel(name, image=b"any"):
    module, function = C.c_void_p(), C.c_void_p()
    need("cuModuleLoadData", C.byref(module), image)
    need("cuModuleGetFunction", C.byref(function), module, name.encode())
    return module, function
def launch(function, stream=None):
    return L.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, None, None)
"""


def say(client: subprocess.Popen[str], text: str = "") -> None:
    """Send a line to a script that waits for one."""
    assert client.stdin
    client.stdin.write(f"{text}\n")
    client.stdin.flush()


class Machine:
    """A machine with simulated GPUs: a server, and a way to run programs that find this server."""

    def __init__(self, tools: Path, settings: dict[str, str]) -> None:
        self.tools = tools
        environment = {"PATH": os.environ["PATH"], **settings}
        self.server = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && exec "$0"', str(tools / "fgpu-simd")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line == "ready\n", self.server.communicate()

    def command(self, *words: str | Path) -> list[str]:
        return ["nsenter", f"--mount=/proc/{self.server.pid}/ns/mnt", "--", *map(str, words)]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "LD_LIBRARY_PATH": str(self.tools / "lib"), "TERM": "dumb"}

    def run(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words), env=self.environment(), capture_output=True, text=True, timeout=60, cwd="/"
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def python(self, script: str, check: bool = True) -> list[str]:
        return self.run(sys.executable, "-c", CLIENT + script, check=check).stdout.split("\n")[:-1]

    def spawn(self, script: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*prefix, sys.executable, "-c", CLIENT + script),
            env=self.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
        )

    def together(self, *scripts: str, apart: float = 0.0) -> list[subprocess.Popen[str]]:
        """Start programs that print "ready" and wait, then let all begin.

        `apart` is the time between the starts of two programs, in seconds.
        """
        running = [self.spawn(script) for script in scripts]
        for one in running:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        for one in running:
            say(one)
            time.sleep(apart)
        return running

    def dump(self) -> dict[str, list[dict[str, int]]]:
        return json.loads(self.run(self.tools / "fgpu-simd", "--dump").stdout)

    def used(self, device: int = 0) -> int:
        return self.dump()["devices"][device]["used_bytes"]

    def process(self, pid: int, device: int = 0) -> dict[str, int]:
        found = [p for p in self.dump()["processes"] if p["pid"] == pid and p["device"] == device]
        assert len(found) == 1, found
        return found[0]

    def freed_after_us(self, pid: int) -> int:
        """Return how long after the last close of a process's connection the server will free its memory.

        This is the server's plan, which does not change. Use a process with an end that is delayed: the row of another
        process may have gone when the dump is read.
        """
        return eventually(lambda: self.process(pid)["freed_after_us"])

    def settles_at(self, used: int, within: float = 1.0) -> float:
        """Return the seconds until the device has `used` bytes in use. Fail after `within`."""
        start, deadline = time.monotonic(), Deadline(within)
        while self.used() != used:
            assert not deadline.is_over(), self.dump()
            time.sleep(0.005)
        return time.monotonic() - start

    def has_descriptors(self, n: int, within: float = 1.0) -> None:
        """Wait until the server has n descriptors. It may not have processed the end of the last client yet."""
        deadline = Deadline(within)
        while self.descriptors() != n:
            assert not deadline.is_over(), self.descriptors()
            time.sleep(0.005)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.server.pid}/fd"))

    def ticks(self) -> int:
        """Return the CPU time of the server, in hundredths of a second."""
        fields = Path(f"/proc/{self.server.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    def resident(self) -> int:
        fields = Path(f"/proc/{self.server.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> int:
        if self.server.poll() is None:
            self.server.send_signal(signal.SIGTERM)
        self.server.communicate(timeout=30)
        return self.server.returncode


@pytest.fixture(scope="session")
def tools() -> Path:
    if os.geteuid() != 0:
        pytest.skip("mount namespaces need root")
    subprocess.run(
        ["make", "-s", "-C", str(ROOT / "sim"), f"OUT={BUILD}", f"HEADERS={HEADERS}"],
        check=True,
        timeout=300,
        stdout=subprocess.DEVNULL,
    )
    return BUILD


@pytest.fixture(scope="session")
def program(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the conformance program, and return its path."""
    out = tmp_path_factory.mktemp("conformance") / "conformance"
    sources = sorted(HERE.glob("conformance*.c"))
    settled = "-DSETTLED_MS=200"  # the simulated driver frees memory within 97 ms
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{HEADERS}", settled]
    subprocess.run(["cc", *flags, *map(str, sources), "-o", str(out), "-ldl"], check=True, timeout=120)
    return out


@pytest.fixture
def make_machine(tools: Path) -> Iterator[Callable[..., Machine]]:
    machines: list[Machine] = []

    def make(**settings: str) -> Machine:
        machines.append(Machine(tools, settings))
        return machines[-1]

    yield make
    for machine in machines:
        assert machine.stop() == 0


@pytest.fixture
def machine(make_machine: Callable[..., Machine]) -> Machine:
    return make_machine()


@pytest.fixture
def holder(machine: Machine) -> Iterator[subprocess.Popen[str]]:
    with machine.spawn("start(); alloc(100 << 20); say('holding'); wait()") as client:
        assert client.stdout is not None
        client.stdout.readline()
        yield client
        client.kill()
