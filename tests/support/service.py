"""The service under test: the simulated driver, the agent and its gatekeeper, and the programs of the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support import host
from tests.support.commands import fgpu
from tests.support.host import (
    BUILD,
    DRIVER_ROOT,
    FGPU,
    LISTEN,
    MEMORY,
    PARALLEL,
    ROOT,
    RUN_DIR,
    SERVICE_ENVIRONMENT,
    SHIM,
    SIM,
)
from tests.support.wait import eventually


def compile_programs() -> None:
    """Compile the C programs of tests/programs into build/e2e."""
    out = BUILD / "e2e"
    out.mkdir(parents=True, exist_ok=True)
    for source in (ROOT / "tests/programs").glob("*.c"):
        if (out / source.stem).exists() and (out / source.stem).stat().st_mtime > source.stat().st_mtime:
            continue
        flags = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", f"-I{BUILD}/headers"]
        made = out / f".{source.stem}-{os.getpid()}"
        subprocess.run(["gcc", *flags, "-o", made, source, "-ldl", "-pthread"], check=True, timeout=60)
        made.rename(out / source.stem)


def gatekeepers_of(run_dir: Path) -> set[int]:
    """Return the pids of all gatekeepers that were started with that folder."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):  # no glob: it fails if a process exits during the search
        with contextlib.suppress(OSError):
            words = Path("/proc", pid, "cmdline").read_bytes().split(b"\0")
            if b"fgpu_ebpf.gatekeeper" in words and str(run_dir).encode() in words:
                found.add(int(pid))
    return found


def _reads(link: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return ""


# Runs a command in a new world, in which it can start a separate driver and agent.
IN_A_WORLD = (sys.executable, "-m", "tests.world")


def run_on_devices(
    file: str,
    number: int = 2,
    memory: str = "16GiB",
    seconds: float = 225,
    parallel: str = "",
    has_limits: bool = False,
) -> None:
    """Run the tests of a file in a separate world with an agent and `number` simulated devices of `memory` each.

    Fail if a test fails, or if the tests take longer than `seconds`. `parallel`: the value of FGPU_SIM_PARALLEL.
    `has_limits`: the driver has memory limits of cgroups.
    """
    command = [*IN_A_WORLD, sys.executable, "-m", "pytest", "-q", file]
    environment = {**os.environ, "FGPU_TEST_GPUS": str(number), "FGPU_TEST_MEMORY": memory, "FGPU_TEST_WORLDS": ""}
    environment |= {"FGPU_TEST_PARALLEL": parallel, "FGPU_TEST_DRIVER_LIMITS": "1" if has_limits else ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


class Service:
    """The service under test: simulated driver and agent, started once and restarted on request."""

    def __init__(self, work: Path, asked: Sequence[str] = ("docker", "cri")) -> None:
        """Initialize the service.

        `asked` has the kinds of engines whose sockets the agent uses.
        """
        self.log = work / "agent.log"
        self.config = work / "agent.yaml"
        self.cdi = work / "cdi"
        self.cdi.mkdir()
        sockets = {kind: work / f"{kind}.sock" for kind in ("docker", "podman", "cri")}
        self.engine, self.podman, self.containerd = sockets.values()
        engines = [f"{kind}:{sockets[kind]}" for kind in asked]
        self.config.write_text(f"overcommit: allow\nengines: {engines}\ncdiFolder: {self.cdi}\n")
        self.policies = work / "policy.d"
        self.policies.mkdir()
        self._driver_log = work / "driver.log"
        self._driver: subprocess.Popen[bytes] | None = None
        self.agent: subprocess.Popen[bytes] | None = None
        self.started_in = 0.0  # seconds from the last start to enforcement
        self._checked = 0  # number of characters of the log that check() has read
        self.command = FGPU  # of the agent

    def start_driver(self, memory: str = MEMORY) -> None:
        """Start fgpu-simd with one device, or FGPU_TEST_GPUS devices. Returns when it is ready."""
        assert not self.gatekeepers(), "fgpu runs on this host already"
        running = subprocess.run([SIM / "fgpu-simd", "--dump"], capture_output=True, check=False, timeout=30)
        assert running.returncode, "a simulated driver runs on this host already"
        with open(self._driver_log, "wb") as log:
            environment = {"FGPU_SIM_MEMORY": memory, "FGPU_SIM_GPUS": host.GPUS}
            environment |= {"FGPU_SIM_PARALLEL": PARALLEL} if PARALLEL else {}
            environment |= {"FGPU_SIM_MEMORY_LIMITS": "1"} if host.DRIVER_LIMITS else {}
            self._driver = subprocess.Popen([SIM / "fgpu-simd"], stdout=log, stderr=log, env=environment)
        eventually(lambda: b"ready" in self._driver_log.read_bytes(), 20, "the simulated driver")

    def start_agent(self, stderr: int | None = None, *options: str) -> float:
        """Start `fgpu agent` with the log to `stderr` or the usual file.

        Return the seconds until limits are in force.
        """
        begun = time.monotonic()
        said = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") if stderr is None else open(stderr, "wb", closefd=False) as log:
            command = [*self.command, "agent", "--driver-root", DRIVER_ROOT, "--shim", SHIM, "--listen", LISTEN]
            command += ["--config", self.config, "--policies", self.policies, *options]
            environment = {k: v for k, v in host.ENVIRONMENT.items() if k != "LD_LIBRARY_PATH"} | SERVICE_ENVIRONMENT
            self.agent = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

        def enforcing() -> bool:
            text = self.log.read_bytes()[said:]
            assert self.agent is not None
            assert self.agent.poll() is None, f"the agent ended: {text.decode()}"
            if stderr is None:
                return b"enforcing" in text or b"policies are not enforced" in text  # older versions have the first
            return not fgpu("status", check=False).returncode

        eventually(enforcing, 60, "the agent")
        self.started_in = time.monotonic() - begun
        return self.started_in

    def gatekeepers(self) -> set[int]:
        """Return the pids of all gatekeepers that use this /run."""
        here = os.readlink("/proc/self/ns/mnt")
        return {pid for pid in gatekeepers_of(RUN_DIR) if _reads(f"/proc/{pid}/ns/mnt") == here}

    def stand(self) -> None:
        """Start an agent if none runs, because a trial may have failed while no agent was running."""
        assert self.agent is not None
        if self.agent.poll() is not None:
            self.start_agent()

    def kill_agent(self, how: int = signal.SIGKILL) -> None:
        """Kill the agent with SIGKILL, or another signal."""
        assert self.agent is not None
        self.agent.send_signal(how)
        self.agent.wait(30)

    def kill_gatekeeper(self) -> None:
        """Kill the gatekeeper with SIGKILL."""
        pids = self.gatekeepers()
        assert pids, "no gatekeeper to kill"
        self._kill(pids)

    def _kill(self, pids: set[int]) -> None:
        """Kill these gatekeepers, some of which may be about to exit, and wait for their exit."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not pids & self.gatekeepers(), 20, "the gatekeeper's end")

    @classmethod
    @contextlib.contextmanager
    def running(cls, work: Path, *asked: str) -> Iterator[Service]:
        """Run the simulated driver (16 GiB, one device) and the agent, which enforces. Both end with the block."""
        service = cls(work, asked) if asked else cls(work)
        try:
            service.start_driver()
            service.start_agent()
            yield service
        finally:
            service.stop()

    def check(self) -> None:
        """Check that the agent runs, and that its log has no traceback since the last check."""
        assert self.agent is not None
        assert self.agent.poll() is None, "the agent has exited"
        log = self.log.read_text()[self._checked :]
        self._checked += len(log)  # a traceback is the failure of one test, not of all later tests
        assert "Traceback" not in log, log

    def detach(self) -> None:
        """Run `fgpu detach`, and kill a gatekeeper that stays."""
        self.stand()
        fgpu("detach", seconds=60)
        self.agent.wait(60)  # during its exit the kernel removes the probes from other processes one by one
        self._kill(self.gatekeepers())
        shim = SHIM.stat()
        left = sorted(Path("/sys/fs/bpf").glob(f"*/links/*-{shim.st_dev:x}-{shim.st_ino:x}-*"))
        assert not left, f"another agent of the tests has left probes: {left}"

    def stop(self) -> None:
        """Detach, and stop all processes that this object has started."""
        try:
            if self.agent:
                self.detach()
        finally:  # a failed start of an agent leaves no driver behind
            if self._driver:
                self._driver.terminate()
                self._driver.wait(30)
