"""An installed package as its user has it, for the package tests.

The module has the parts that are the same for every kind of installation: the commands, a program that allocates
memory, and the conditions that must hold for it. Imports nothing of fgpu.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.support import wait
from tests.support.host import free_port

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
PACKAGES = BUILD / "packages"
STATE = Path("/var/lib/fgpu")
MIB, GIB = 1 << 20, 1 << 30
CONTEXT = 518 * MIB  # the size of a context on the simulated device
T = TypeVar("T")


def eventually(look: Callable[[], T], seconds: float, what: str) -> T:
    """Call a function until it returns a true value, and return that."""
    return wait.eventually(look, seconds, what, pause=0.02)


def run(*command: str | Path, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output. `check`: it must succeed."""
    more.setdefault("timeout", 120)
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False, **more)
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


@contextlib.contextmanager
def driver(log: Path, memory: str, seconds: float) -> Iterator[None]:
    """Run fgpu-simd with one device of `memory`. It must be ready within `seconds`."""
    environment = {"FGPU_SIM_MEMORY": memory, "FGPU_SIM_GPUS": "1"}
    with open(log, "wb") as out:
        process = subprocess.Popen([BUILD / "sim/fgpu-simd"], stdout=out, stderr=out, env=environment)
    try:
        eventually(lambda: b"ready" in log.read_bytes() or process.poll() is not None, seconds, "the driver")
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        process.wait(30)


def cgroup2() -> Path:
    """Return where cgroup v2 is mounted here."""
    return Path(next(line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line))


def package(pattern: str) -> Path:
    """Return the package of that name that `./dev package` has just built."""
    found = list(PACKAGES.glob(pattern))
    assert len(found) == 1, f"{PACKAGES} has {found}"
    return found[0]


# -- places where fgpu is installed ---------------------------------------------------------------------------------


@dataclass
class Installed:
    """An installed fgpu, entered by a prefix such as `chroot ROOT`. `build` is the path of build/ there."""

    fgpu: str
    prefix: list[str] = field(default_factory=list)
    build: Path = BUILD
    listen: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    agent: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of a user of the simulated driver."""
        return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LD_LIBRARY_PATH": str(self.build / "sim/lib")}

    def command(self, *words: str | Path) -> list[str]:
        """Return the command line that runs these words there."""
        return [*self.prefix, *map(str, words)]

    def run(self, *words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run a command there."""
        more.setdefault("env", self.environment)
        return run(*self.command(*words), **more)

    def call(self, *words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run `fgpu …` there."""
        return self.run(self.fgpu, *words, **more)

    @property
    def agent_words(self) -> list[str]:
        """Return the one command that starts enforcement."""
        return [self.fgpu, "agent", "--driver-root", str(self.build / "sim"), "--listen", self.listen]

    def start_agent(self, log: Path) -> float:
        """Start `fgpu agent`. Return the seconds until it enforces."""
        begun = time.monotonic()
        with open(log, "wb") as file:
            environment = {"PATH": self.environment["PATH"]}
            self.agent = subprocess.Popen(self.command(*self.agent_words), stdout=file, stderr=file, env=environment)

        def enforcing() -> bool:
            assert self.agent is not None
            assert self.agent.poll() is None, log.read_text()
            return b"enforcing" in log.read_bytes()

        eventually(enforcing, 30, "the agent")
        return time.monotonic() - begun

    def stop(self) -> None:
        """Stop an agent that a test has left running."""
        if self.agent and self.agent.poll() is None:
            with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
                self.call("detach", timeout=60)
            self.agent.kill()
            self.agent.wait(60)  # during its exit the kernel removes the probes from other processes one by one

    def fill(self, *words: str | Path, held_seconds: int = 0) -> subprocess.Popen[str]:
        """Start a command there: `words`, then the words of examples/fill. Its stdout also has its stderr."""
        fill = [self.build / "examples/fill", "--step", "2MiB", "--hold", str(held_seconds)]
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(self.command(*words, *fill), text=True, env=self.environment, **both)

    def filled(self, *words: str) -> tuple[int, str]:
        """Return the bytes that fill got before it was refused, and the reply that it got."""
        with self.fill(*words) as program:
            said, _ = program.communicate(timeout=60)
        found = re.fullmatch(r"admitted (\d+) bytes(?:, then (\w+))?\n", said)
        assert found, said
        return int(found[1]), found[2] or ""


KINDS = ("context", "block", "vmm", "managed", "pool", "module")


def driver_bytes() -> list[int]:
    """Return what each process holds, by the driver's own figures."""
    books = json.loads(run(BUILD / "sim/fgpu-simd", "--dump").stdout)["processes"]
    return [sum(process[f"{kind}_bytes"] for kind in KINDS) for process in books]


def assert_page_shows(place: Installed, name: str) -> None:
    """Check that the web page and all of its parts are installed."""
    with urllib.request.urlopen(f"http://{place.listen}/", timeout=20) as answer:
        page = answer.read().decode()
    assert f"<bdi>{name}</bdi>" in page
    assert re.search(r"<style>[^<]{1000}", page)
    assert re.search(r"<script>[^<]{1000}", page)


def assert_enforced(place: Installed, name: str) -> None:
    """Check that a tenant gets exactly its limit, by the driver's figures too. Without fgpu the program gets more."""
    limit = GIB
    with place.fill(place.fgpu, "run", "--name", name, "--memory", "1GiB", "--", held_seconds=120) as tenant:
        try:
            assert tenant.stdout
            assert tenant.stdout.readline() == f"admitted {limit - CONTEXT} bytes, then CUDA_ERROR_OUT_OF_MEMORY\n"
            assert driver_bytes() == [limit]
            status = json.loads(place.call("status", "--json").stdout)
            (seen,) = next(t for t in status["tenants"] if t["tenant"] == name)["devices"]
            assert seen["admitted_bytes"] == seen["witnessed_bytes"] == limit - CONTEXT, seen  # enforcement is live
            assert (seen["limit_bytes"], seen["used_bytes"], seen["refused"]) == (limit, limit, 1), seen
            assert_page_shows(place, name)
        finally:
            tenant.kill()
    got, why = place.filled()
    assert got > 4 * limit, "the program was limited without fgpu too"
    assert why == "CUDA_ERROR_OUT_OF_MEMORY"
