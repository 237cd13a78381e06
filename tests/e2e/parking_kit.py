"""A parker, and programs with data on the device that can be parked and woken."""

from __future__ import annotations

import ast
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support import host
from tests.support.commands import ask, fgpu
from tests.support.host import DRIVER_ROOT, FGPU, MIB, RUN_DIR
from tests.support.service import Service
from tests.support.tenant import Program, Tenant
from tests.support.wait import eventually

HELD = 64 * MIB
# Runs lines of Python, and answers each with its value. `write` fills memory with a pattern, `intact` compares it.
SCRIPT = """
import ctypes as C, os, sys, threading, time
L = C.CDLL("libcuda.so.1")
def need(name, *arguments):
    result = getattr(L, name)(*arguments)
    if result: raise SystemExit(f"{name}: {result}")
kept = []
def begin():
    context = C.c_void_p()
    need("cuInit", 0)
    need("cuDevicePrimaryCtxRetain", C.byref(context), 0)
    need("cuCtxSetCurrent", context)
    kept.append(context)
    return os.getpid()
def alloc(size):
    pointer = C.c_uint64()
    return L.cuMemAlloc_v2(C.byref(pointer), C.c_size_t(size)), pointer.value
def from_pool(size):
    pointer = C.c_uint64()
    return L.cuMemAllocAsync(C.byref(pointer), C.c_size_t(size), None), pointer.value
def create(size):
    handle, device = C.c_uint64(), (C.c_uint32 * 8)(1, 0, 1, 0)
    return L.cuMemCreate(C.byref(handle), C.c_size_t(size), device, C.c_uint64(0)), handle.value
def free(pointer): return L.cuMemFree_v2(C.c_uint64(pointer))
def pattern(size): return bytes(range(256)) * (size // 256)
def write(pointer, size): return L.cuMemcpyHtoD_v2(C.c_uint64(pointer), pattern(size), C.c_size_t(size))
def intact(pointer, size):
    back = C.create_string_buffer(size)
    need("cuMemcpyDtoH_v2", back, C.c_uint64(pointer), C.c_size_t(size))
    return back.raw == pattern(size)
def synchronise(): return L.cuCtxSynchronize()
def query(): return L.cuStreamQuery(None)
def free_bytes():
    free, total = C.c_size_t(), C.c_size_t()
    need("cuMemGetInfo_v2", C.byref(free), C.byref(total))
    return free.value
def kernel(us):
    module, function = C.c_void_p(), C.c_void_p()
    text = f".version 6.0\\n.target sm_50\\n.address_size 64\\n.visible .entry spin_{us}us() {{ ret; }}\\n"
    need("cuModuleLoadData", C.byref(module), text.encode())
    need("cuModuleGetFunction", C.byref(function), module, f"spin_{us}us".encode())
    return kept.append(function)
def launch(): return L.cuLaunchKernel(kept[-1], 1, 1, 1, 1, 1, 1, 0, None, None, None)
def wait():
    def run():
        need("cuCtxSetCurrent", kept[0])
        need("cuCtxSynchronize")
    threading.Thread(target=run, daemon=True).start()
def managed(size):
    pointer = C.c_uint64()
    return L.cuMemAllocManaged(C.byref(pointer), C.c_size_t(size), 1)
def fork():
    child = os.fork()
    if not child:
        time.sleep(1000)
        os._exit(0)
    return child
def execute(): os.execv("/bin/sleep", ["sleep", "1000"])
print("ready", flush=True)
for line in sys.stdin: print(repr(eval(line)), flush=True)
"""


class Holder(Program):
    """A program with a context, and HELD bytes of a pattern."""

    def __init__(self, tenant: Tenant, name: str) -> None:
        script = tenant.folder / "holder.py"
        script.write_text(SCRIPT)
        super().__init__(tenant, name, f"{sys.executable} {script}")
        assert self.receive(30) == "ready"
        self.pid = self.do("begin()")
        error, self.pointer = self.do(f"alloc({HELD})")
        assert (error, self.do(f"write({self.pointer}, {HELD})")) == (0, 0)

    def do(self, line: str, seconds: float = 30) -> Any:
        """Run a line, and return its value."""
        self.send(line)
        return ast.literal_eval(self.receive(seconds))

    def is_intact(self) -> bool:
        """Return whether its memory has the pattern. The call wakes it."""
        return bool(self.do(f"intact({self.pointer}, {HELD})"))


class Parker:
    """The process `fgpu-parker`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it. Returns when it listens."""
        with open(self._log, "ab") as log:
            command = [Path(FGPU[0]).with_name("fgpu-parker"), "--driver-root", DRIVER_ROOT]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=host.ENVIRONMENT)
        eventually(listens, 20, "the parker")

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        if self._process:
            self._process.kill()
            self._process.wait(30)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop it meanwhile. It takes requests, and does not answer them."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)


def listens() -> bool:
    """Return whether a parker accepts connections."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(RUN_DIR / "parker.sock")) == 0


@contextlib.contextmanager
def parking(service: Service, work: Path, overcommit: str = "allow") -> Iterator[Parker]:
    """Run a parker, and an agent that parks. Both are as before at the end."""
    said = service.config.read_text()
    text = said.replace("overcommit: allow", f"overcommit: {overcommit}")
    service.config.write_text(f"{text}parking: on\n")
    service.kill_agent()
    service.start_agent()
    parker = Parker(work / "parker.log")
    parker.start()
    try:
        yield parker
    finally:
        parker.kill()
        service.config.write_text(said)
        service.stand()
        service.kill_agent()
        service.start_agent()


def state(tenant: Tenant) -> str:
    """Return the state of the tenant's parking."""
    parking = tenant.view()["parking"]
    return parking["state"] if parking else "running"


def becomes(tenant: Tenant, wanted: str, seconds: float = 10) -> None:
    eventually(lambda: state(tenant) == wanted, seconds, f"{tenant.name} {wanted}: {tenant.view()['parking']}")


def refusal(*arguments: str) -> str:
    """Return the error of a command that must exit with 1."""
    done = fgpu(*arguments, check=False)
    assert done.returncode == 1, done
    return done.stderr


def parked_bytes(tenant: Tenant) -> int:
    return int(tenant.memory()["parked_bytes"])


def device_bytes() -> int:
    """Return what the simulated device has in use, as NVML shows it."""
    return int(ask(verb="snapshot")["devices"][0]["used_bytes"])
