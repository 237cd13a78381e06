"""The library for the tests of the shim: the built shim, compiled programs, a stand-in for the driver, a fake agent.

Everything is built into a separate folder, including the shim, so that probes and preloads affect no other file.
Compilers have no time limit of their own: they may need minutes for a part of a processor, and the test has a limit.
"""

import json
import subprocess
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fgpu_ebpf.linux import procfs
from tests import hang

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SYSTEM_PYTHON = "/usr/bin/python3"
DEADLINE = 60  # seconds; a program that starts and makes thousands of calls may wait for a processor
EXIT_SECONDS = 100

PREAMBLE = """
import ctypes as C, os, sys, json, time, threading
def out(*a): os.write(1, (json.dumps(a) + "\\n").encode())
L = C.CDLL("libcuda.so.1", use_errno=True)
def alloc(n):
    p = C.c_uint64()
    return L.cuMemAlloc_v2(C.byref(p), C.c_size_t(n))
def info():
    f, t = C.c_size_t(), C.c_size_t()
    return L.cuMemGetInfo_v2(C.byref(f), C.byref(t)), f.value, t.value
def fds(): return sorted(os.listdir("/proc/self/fd"))
MiB, GiB = 1 << 20, 1 << 30
"""

# Look up all names. This process sends no hello before its first call.
IN_A_FRESH_CHILD = """
for name in ("cuInit", "cuMemAlloc_v2", "cuMemGetInfo_v2", "fake_errno", "fake_calls"): getattr(L, name)
pid = os.fork()
if pid: os.waitpid(pid, 0); os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class Build:
    folder: Path
    shim: Path
    headers: Path
    first: tuple[Path, ...] = ()  # libraries that are preloaded before all others
    compiler: tuple[str, ...] = ("cc",)

    def compile(self, source: str | Path, target: str, *flags: str) -> Path:
        path = self.folder / target
        where = HERE / "programs" / source if isinstance(source, str) else source
        subprocess.run([*self.compiler, "-O1", "-w", "-isystem", self.headers, "-o", path, where, *flags], check=True)
        return path

    def library(self, source: str | Path, target: str, *flags: str) -> Path:
        (self.folder / target).parent.mkdir(exist_ok=True)
        return self.compile(source, target, "-shared", "-fPIC", *flags)

    def libraries(self) -> None:
        """Compile the stand-in for the driver, of two versions, and other libraries that programs load.

        The stand-in needs libdl, as NVIDIA's driver does.
        """
        pools = str(HERE / "programs" / "pools.c")
        flags = ("-Wl,--no-as-needed", "-ldl", "-Wl,-Bsymbolic,-soname,libcuda.so.1")
        self.library("libcuda.c", "driver/libcuda.so.1", pools, *flags)
        self.library("libcuda.c", "old/libcuda.so.1", "-DOLD", *flags)
        self.library("libnvml.c", "driver/libnvidia-ml.so.1", "-Wl,-Bsymbolic,-soname,libnvidia-ml.so.1")
        self.library("fault.c", "fault.so")
        self.library("next.c", "next.so")

    def make(self, out: Path, *variables: str) -> Path:
        subprocess.run(
            ["make", "-s", "-C", ROOT / "shim", f"OUT={out}", f"HEADERS={self.headers}", *variables], check=True
        )
        return out / "libfgpu.so"


@dataclass(frozen=True, slots=True)
class Libc:
    """A C library: that of this host, or that of another root file system, with libraries that are built for it."""

    build: Build
    root: Path | None = None

    @property
    def dlsym_version(self) -> str:
        """The symbol version of its newest dlsym."""
        return "GLIBC_2.2.5" if self.root else "GLIBC_2.34"

    def command(self, program: Path, driver: str = "driver") -> list[object]:
        """Return a command that runs a program with this library. `driver` is a folder of the build; empty: none."""
        if not self.root:
            return [program]
        here = [f"{self.root}{folder}/x86_64-linux-gnu" for folder in ("/lib", "/usr/lib")]
        where = [*([str(self.build.folder / driver)] if driver else ()), *here]
        return [self.root / "lib64/ld-linux-x86-64.so.2", "--library-path", ":".join(where), program]

    def python(self, script: str, driver: str = "driver") -> list[object]:
        """Return a command that runs a script."""
        if not self.root:
            return [SYSTEM_PYTHON, "-c", script]
        environment = [f"PYTHONHOME={self.root}/usr", "LC_ALL=C"]  # an older library cannot read this host's locales
        return ["env", *environment, *self.command(self.root / "usr/bin/python3", driver), "-c", script]


class Program(subprocess.Popen[str]):
    """A program under test. Its time limit excludes the kernel's work after the program's last instruction.

    The kernel may need long to release the memory of a process while it maintains pages of the same files for other
    processes.
    """

    def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:  # noqa: A002
        """Send the input. Return the program's output once the kernel has ended the process."""
        try:
            return super().communicate(input, timeout)
        except subprocess.TimeoutExpired:
            if not procfs.exiting(self.pid):
                raise
            held_up = "\n".join(hang.uninterruptible())
            warnings.warn(f"{self.pid} has exited, and the kernel has not ended it:\n{held_up}", stacklevel=2)
            return super().communicate(timeout=EXIT_SECONDS)


class Agent:
    """The fake agent: its process, and programs that run where they can connect to it."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.process = subprocess.Popen(
            [SYSTEM_PYTHON, "-I", HERE / "fake_agent.py", build.shim, ROOT / "bpf"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == {"ready": True}

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        return dict(json.loads(self.process.stdout.readline() or "{}"))

    def do(self, verb: str, **what: Any) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"do": verb, **what}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def calls(self, kind: int | None = None) -> list[dict[str, int]]:
        return [c for c in self.do("look")["calls"] if kind is None or c["kind"] == kind]

    def popen(
        self, *command: Any, preload: tuple[Any, ...] = (), driver: Any = "driver", libraries: Any = None, **more: Any
    ) -> Any:
        libraries = ":".join(map(str, (*self.build.first, *(libraries or (*preload, self.build.shim)))))
        inside = ["nsenter", f"--mount=/proc/{self.process.pid}/ns/mnt", "--", "env", f"LD_PRELOAD={libraries}"]
        return Program(
            [*inside, f"LD_LIBRARY_PATH={self.build.folder / driver}", *map(str, command)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
            cwd="/",
            **more,
        )

    def run(self, *command: Any, **more: Any) -> tuple[str, str]:
        process = self.popen(*command, **more)
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, (process.returncode, out, err)
        return out, err

    def python(self, script: str, **more: Any) -> list[list[Any]]:
        """Run a script that calls the driver by ctypes. Return what it passes to out()."""
        return [json.loads(line) for line in self.run(SYSTEM_PYTHON, "-c", PREAMBLE + script, **more)[0].splitlines()]

    def start_python(self, script: str, **more: Any) -> Any:
        return self.popen(SYSTEM_PYTHON, "-u", "-c", PREAMBLE + script, **more)


@dataclass(frozen=True, slots=True)
class Simulator:
    agent: Agent
    folder: Path
    started: list[Any] = field(default_factory=list)

    def run(self, *command: object) -> str:
        return self.agent.run(*command, driver=self.folder / "lib")[0]

    def python(self, script: str) -> str:
        return self.run(SYSTEM_PYTHON, "-c", PREAMBLE + script)

    def start(self, script: str, **more: Any) -> Any:
        """Start a program. The fixture ends the program if the test does not."""
        self.started.append(self.agent.start_python(script, **{"driver": self.folder / "lib", **more}))
        return self.started[-1]

    def end(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.communicate()
