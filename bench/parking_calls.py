"""Record which driver calls block while a process is locked and checkpointed by `cuCheckpointProcess*`, and how.

A child process makes a context, memory, a stream and a graph, and prepares one thread for each call. The parent locks
it and lets each thread make its call, first while the process is locked, then while it is checkpointed. After each call
it prints a row:

    STATE CALL returned|blocked RESULT SYSCALL WCHAN FRAMES

FRAMES is the number of words on the thread's stack that point into libcuda. After the unlock the parent prints which
calls have returned, with their results, and whether the data is intact. With `--kinds` it prints instead what the four
functions return for processes with each kind of memory, one line each. Needs root and driver 570 or later.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path
from typing import Any

from bench.lib.open_driver import POSIX_FD, Location, Properties

MIB = 1 << 20
PATTERN = 0xA5
NOT_FOUND = 500  # CUDA_ERROR_NOT_FOUND
SPIN = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry spin(.param .u64 ns)
{
.reg .u64 %a, %b, %c, %n;
.reg .pred %p;
ld.param.u64 %n, [ns];
mov.u64 %a, %globaltimer;
again:
mov.u64 %b, %globaltimer;
sub.u64 %c, %b, %a;
setp.lt.u64 %p, %c, %n;
@%p bra again;
ret;
}
"""
WAIT = 0.3  # seconds after which a call counts as blocked
KINDS = (
    "none",
    "plain",
    "pinned",
    "registered",
    "managed",
    "vmm",
    "exported",
    "ipc",
    "pool",
    "child",
    "busy",
    "second",
)


class Driver:
    """libcuda with a context on device 0."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libcuda.so.1")
        self.kept: object = None

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function. Raises RuntimeError with its name and result if it fails."""
        result = getattr(self.lib, name)(*arguments)
        if result:
            raise RuntimeError(f"{name}: {result}")

    def start(self) -> c_void_p:
        """Initialise, and return the primary context of device 0, which is current."""
        context = c_void_p()
        self.call("cuInit", 0)
        self.call("cuDevicePrimaryCtxRetain", byref(context), 0)
        self.call("cuCtxSetCurrent", context)
        return context

    def alloc(self, size: int) -> c_void_p:
        at = c_void_p()
        self.call("cuMemAlloc_v2", byref(at), c_size_t(size))
        return at


def _calls(d: Driver) -> dict[str, Callable[[], int]]:
    """Return the calls by name. All objects that they need exist."""
    lib, host = d.lib, (ctypes.c_ubyte * MIB)()
    at, freed, other, more = d.alloc(64 * MIB), d.alloc(2 * MIB), d.alloc(2 * MIB), c_void_p()
    d.call("cuMemsetD8_v2", at, c_uint(PATTERN), c_size_t(64 * MIB))
    stream, event, module, function, graph, run = (c_void_p() for _ in range(6))
    d.call("cuStreamCreate", byref(stream), 1)
    d.call("cuEventCreate", byref(event), 0)
    d.call("cuEventRecord", event, stream)
    d.call("cuModuleLoadData", byref(module), c_char_p(SPIN))
    d.call("cuModuleGetFunction", byref(function), module, c_char_p(b"spin"))
    ns = ctypes.c_uint64(1000)
    arguments = (c_void_p * 1)(ctypes.cast(byref(ns), c_void_p))
    d.call("cuStreamBeginCapture_v2", stream, 2)
    d.call("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, stream, arguments, None)
    d.call("cuStreamEndCapture", stream, byref(graph))
    d.call("cuGraphInstantiateWithFlags", byref(run), graph, ctypes.c_uint64(0))
    d.call("cuCtxSynchronize")
    number, size, text, pointer = c_int(), c_size_t(), (ctypes.c_char * 256)(), c_void_p()
    page = c_void_p()
    d.call("cuMemAllocHost_v2", byref(page), c_size_t(MIB))
    unused_stream, unused_event, unused_run, unused_module, pool = (c_void_p() for _ in range(5))
    d.call("cuStreamCreate", byref(unused_stream), 1)
    d.call("cuEventCreate", byref(unused_event), 0)
    d.call("cuGraphInstantiateWithFlags", byref(unused_run), graph, ctypes.c_uint64(0))
    d.call("cuModuleLoadData", byref(unused_module), c_char_p(SPIN))
    d.call("cuDeviceGetDefaultMemPool", byref(pool), 0)
    callback = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_void_p)(lambda *_: None)
    on_host = ctypes.CFUNCTYPE(None, c_void_p)(lambda _: None)
    keep = (
        callback,
        on_host,
        host,
        at,
        freed,
        other,
        more,
        stream,
        event,
        module,
        function,
        graph,
        run,
        ns,
        arguments,
        page,
    )
    lib.keep, lib.kept_at = keep, at
    one = c_size_t(MIB)
    return {
        "cuDriverGetVersion": lambda: lib.cuDriverGetVersion(byref(number)),
        "cuGetErrorString": lambda: lib.cuGetErrorString(2, byref(pointer)),
        "cuGetProcAddress_v2": lambda: lib.cuGetProcAddress_v2(
            c_char_p(b"cuMemAlloc"), byref(pointer), 12000, ctypes.c_uint64(0), None
        ),
        "cuInit": lambda: lib.cuInit(0),
        "cuDeviceGet": lambda: lib.cuDeviceGet(byref(number), 0),
        "cuDeviceGetCount": lambda: lib.cuDeviceGetCount(byref(number)),
        "cuDeviceGetAttribute": lambda: lib.cuDeviceGetAttribute(byref(number), 16, 0),
        "cuDeviceGetName": lambda: lib.cuDeviceGetName(text, 256, 0),
        "cuDeviceTotalMem_v2": lambda: lib.cuDeviceTotalMem_v2(byref(size), 0),
        "cuDevicePrimaryCtxRetain": lambda: lib.cuDevicePrimaryCtxRetain(byref(pointer), 0),
        "cuDevicePrimaryCtxGetState": lambda: lib.cuDevicePrimaryCtxGetState(0, byref(number), byref(number)),
        "cuCtxGetCurrent": lambda: lib.cuCtxGetCurrent(byref(pointer)),
        "cuCtxGetDevice": lambda: lib.cuCtxGetDevice(byref(number)),
        "cuCtxSetCurrent": lambda: lib.cuCtxSetCurrent(lib.context),
        "cuCtxSynchronize": lambda: lib.cuCtxSynchronize(),
        "cuCtxGetStreamPriorityRange": lambda: lib.cuCtxGetStreamPriorityRange(byref(number), byref(number)),
        "cuMemGetInfo_v2": lambda: lib.cuMemGetInfo_v2(byref(size), byref(size)),
        "cuMemAlloc_v2": lambda: lib.cuMemAlloc_v2(byref(more), c_size_t(2 * MIB)),
        "cuMemFree_v2": lambda: lib.cuMemFree_v2(freed),
        "cuMemAllocAsync": lambda: lib.cuMemAllocAsync(byref(pointer), c_size_t(2 * MIB), stream),
        "cuMemAllocHost_v2": lambda: lib.cuMemAllocHost_v2(byref(pointer), c_size_t(MIB)),
        "cuMemFreeHost": lambda: lib.cuMemFreeHost(page),
        "cuMemcpyHtoD_v2": lambda: lib.cuMemcpyHtoD_v2(other, host, one),
        "cuMemcpyDtoH_v2": lambda: lib.cuMemcpyDtoH_v2(host, at, one),
        "cuMemcpyDtoHAsync_v2": lambda: lib.cuMemcpyDtoHAsync_v2(host, at, one, stream),
        "cuMemsetD8_v2": lambda: lib.cuMemsetD8_v2(at, c_uint(PATTERN), one),
        "cuMemsetD8Async": lambda: lib.cuMemsetD8Async(at, c_uint(PATTERN), one, stream),
        "cuPointerGetAttribute": lambda: lib.cuPointerGetAttribute(byref(pointer), 2, at),
        "cuMemGetAddressRange_v2": lambda: lib.cuMemGetAddressRange_v2(byref(pointer), byref(size), at),
        "cuMemHostGetDevicePointer_v2": lambda: lib.cuMemHostGetDevicePointer_v2(byref(pointer), page, 0),
        "cuLaunchKernel": lambda: lib.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, arguments, None),
        "cuGraphLaunch": lambda: lib.cuGraphLaunch(run, stream),
        "cuGraphGetNodes": lambda: lib.cuGraphGetNodes(graph, None, byref(size)),
        "cuStreamCreate": lambda: lib.cuStreamCreate(byref(pointer), 1),
        "cuStreamQuery": lambda: lib.cuStreamQuery(stream),
        "cuStreamSynchronize": lambda: lib.cuStreamSynchronize(stream),
        "cuStreamIsCapturing": lambda: lib.cuStreamIsCapturing(stream, byref(number)),
        "cuStreamGetCtx": lambda: lib.cuStreamGetCtx(stream, byref(pointer)),
        "cuStreamWaitEvent": lambda: lib.cuStreamWaitEvent(stream, event, 0),
        "cuEventCreate": lambda: lib.cuEventCreate(byref(pointer), 0),
        "cuEventRecord": lambda: lib.cuEventRecord(event, stream),
        "cuEventQuery": lambda: lib.cuEventQuery(event),
        "cuEventSynchronize": lambda: lib.cuEventSynchronize(event),
        "cuModuleLoadData": lambda: lib.cuModuleLoadData(byref(pointer), c_char_p(SPIN)),
        "cuModuleGetFunction": lambda: lib.cuModuleGetFunction(byref(pointer), module, c_char_p(b"spin")),
        "cuFuncGetAttribute": lambda: lib.cuFuncGetAttribute(byref(number), 0, function),
        "cuOccupancyMaxActiveBlocksPerMultiprocessor": lambda: lib.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            byref(number), function, 32, c_size_t(0)
        ),
        "cuMemAddressReserve": lambda: lib.cuMemAddressReserve(
            byref(pointer), c_size_t(2 * MIB), c_size_t(0), c_void_p(), ctypes.c_uint64(0)
        ),
        "cuThreadExchangeStreamCaptureMode": lambda: lib.cuThreadExchangeStreamCaptureMode(byref(c_int(2))),
        "cuEventElapsedTime": lambda: lib.cuEventElapsedTime(byref(ctypes.c_float()), event, event),
        "cuStreamGetPriority": lambda: lib.cuStreamGetPriority(stream, byref(number)),
        "cuStreamGetCaptureInfo_v2": lambda: lib.cuStreamGetCaptureInfo_v2(
            stream, byref(number), None, None, None, None
        ),
        "cuStreamAddCallback": lambda: lib.cuStreamAddCallback(stream, callback, None, 0),
        "cuLaunchHostFunc": lambda: lib.cuLaunchHostFunc(stream, on_host, None),
        "cuStreamDestroy_v2": lambda: lib.cuStreamDestroy_v2(unused_stream),
        "cuEventDestroy_v2": lambda: lib.cuEventDestroy_v2(unused_event),
        "cuGraphExecDestroy": lambda: lib.cuGraphExecDestroy(unused_run),
        "cuModuleUnload": lambda: lib.cuModuleUnload(unused_module),
        "cuModuleGetLoadingMode": lambda: lib.cuModuleGetLoadingMode(byref(number)),
        "cuDeviceGetUuid": lambda: lib.cuDeviceGetUuid(text, 0),
        "cuDeviceGetPCIBusId": lambda: lib.cuDeviceGetPCIBusId(text, 64, 0),
        "cuDeviceGetByPCIBusId": lambda: lib.cuDeviceGetByPCIBusId(byref(number), c_char_p(b"0000:00:00.0")),
        "cuDeviceCanAccessPeer": lambda: lib.cuDeviceCanAccessPeer(byref(number), 0, 0),
        "cuDeviceGetDefaultMemPool": lambda: lib.cuDeviceGetDefaultMemPool(byref(pointer), 0),
        "cuMemPoolGetAttribute": lambda: lib.cuMemPoolGetAttribute(pool, 5, byref(ctypes.c_uint64())),
        "cuMemPoolSetAttribute": lambda: lib.cuMemPoolSetAttribute(pool, 4, byref(ctypes.c_uint64(1 << 30))),
        "cuMemPoolTrimTo": lambda: lib.cuMemPoolTrimTo(pool, c_size_t(0)),
        "cuMemGetAllocationGranularity": lambda: lib.cuMemGetAllocationGranularity(
            byref(size), byref(Properties(1, 0, Location(1, 0))), 0
        ),
        "cuCtxGetLimit": lambda: lib.cuCtxGetLimit(byref(size), 0),
        "cuCtxGetApiVersion": lambda: lib.cuCtxGetApiVersion(lib.context, byref(number)),
        "cuCtxGetFlags": lambda: lib.cuCtxGetFlags(byref(number)),
        "cuIpcGetMemHandle": lambda: lib.cuIpcGetMemHandle(text, at),
        "cuPointerGetAttributes": lambda: lib.cuPointerGetAttributes(
            1, (c_int * 1)(9), (c_void_p * 1)(ctypes.cast(byref(number), c_void_p)), at
        ),
        "cuFuncGetModule": lambda: lib.cuFuncGetModule(byref(pointer), function),
        "cuFuncSetAttribute": lambda: lib.cuFuncSetAttribute(function, 8, 1024),
        "cuGraphInstantiateWithFlags": lambda: lib.cuGraphInstantiateWithFlags(
            byref(pointer), graph, ctypes.c_uint64(0)
        ),
        "cuCtxCreate_v2": lambda: lib.cuCtxCreate_v2(byref(pointer), 0, 0),
    }


def target() -> None:
    """Prepare two threads for each call. Each line of stdin, a name, starts one; report each return on stdout."""
    d = Driver()
    d.lib.context = d.start()
    calls, lock, ready = _calls(d), threading.Lock(), threading.Semaphore(0)
    starts: dict[str, list[tuple[threading.Event, int]]] = {name: [] for name in calls}

    def say(*words: object) -> None:
        with lock:
            print(*words, flush=True)

    def one(name: str) -> None:
        start = threading.Event()
        d.lib.cuCtxSetCurrent(d.lib.context)
        starts[name].append((start, threading.get_native_id()))
        ready.release()
        start.wait()
        try:
            result = calls[name]()
        except AttributeError:  # this driver does not have the function
            result = NOT_FOUND
        say("returned", threading.get_native_id(), result)

    for name in calls:
        for _ in range(2):
            threading.Thread(target=one, args=(name,), daemon=True).start()
    for _ in range(2 * len(calls)):
        ready.acquire()
    say("ready", *calls)
    for line in sys.stdin:
        if line.strip() == "check":
            data = (ctypes.c_ubyte * (64 * MIB))()
            d.call("cuMemcpyDtoH_v2", data, d.lib.kept_at, c_size_t(64 * MIB))
            say("checked", bytes(data) == bytes([PATTERN]) * (64 * MIB))
            continue
        start, tid = starts[line.strip()].pop(0)
        say("starts", tid)
        start.set()


def _pinned(d: Driver) -> None:
    d.call("cuMemAllocHost_v2", byref(c_void_p()), c_size_t(1024 * MIB))


def _registered(d: Driver) -> None:
    d.kept = (ctypes.c_ubyte * (64 * MIB))()
    d.call("cuMemHostRegister_v2", d.kept, c_size_t(64 * MIB), 0)


def _managed(d: Driver) -> None:
    d.call("cuMemAllocManaged", byref(c_void_p()), c_size_t(64 * MIB), 1)


def _created(d: Driver, handle_types: int = 0) -> ctypes.c_uint64:
    handle, of = ctypes.c_uint64(), Properties(1, handle_types, Location(1, 0))
    d.call("cuMemCreate", byref(handle), c_size_t(64 * MIB), byref(of), ctypes.c_uint64(0))
    return handle


def _exported(d: Driver) -> None:
    d.call("cuMemExportToShareableHandle", byref(c_int()), _created(d, POSIX_FD), POSIX_FD, ctypes.c_uint64(0))


def _ipc(d: Driver) -> None:
    d.call("cuIpcGetMemHandle", (ctypes.c_ubyte * 64)(), d.alloc(64 * MIB))


def _pool(d: Driver) -> None:
    d.call("cuMemAllocAsync", byref(c_void_p()), c_size_t(64 * MIB), None)


def _second(d: Driver) -> None:
    d.call("cuCtxCreate_v2", byref(c_void_p()), 0, 0)
    d.alloc(64 * MIB)


def _child(d: Driver) -> None:
    if not os.fork():
        time.sleep(60)
        os._exit(0)


def _busy(d: Driver) -> None:
    module, function, ns = c_void_p(), c_void_p(), ctypes.c_uint64(2_000_000_000)
    d.call("cuModuleLoadData", byref(module), c_char_p(SPIN))
    d.call("cuModuleGetFunction", byref(function), module, c_char_p(b"spin"))
    words = (c_void_p * 1)(ctypes.cast(byref(ns), c_void_p))
    d.call("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, None, words, None)


KINDS: dict[str, Callable[[Driver], object]] = {
    "plain": lambda d: None,
    "pinned": _pinned,
    "registered": _registered,
    "managed": _managed,
    "vmm": _created,
    "exported": _exported,
    "ipc": _ipc,
    "pool": _pool,
    "second": _second,
    "child": _child,
    "busy": _busy,
}


def kind(name: str) -> None:
    """Make memory of a kind, print `ready`, and wait for a line of stdin. Then use the device, and print the result."""
    d = Driver()
    d.start()
    d.alloc(64 * MIB)
    KINDS[name](d)
    print("ready", flush=True)
    sys.stdin.readline()
    print("after", d.lib.cuCtxSynchronize(), flush=True)
    sys.stdin.readline()


class Target:
    """A child process, and the functions of the checkpoint for it. Calls time out after 20 s."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.parking_calls", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.returned: dict[int, int] = {}
        self.said: list[list[str]] = []
        self._has = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self._has:
                words = line.split()
                if words[:1] == ["returned"]:
                    self.returned[int(words[1])] = int(words[2])
                else:
                    self.said.append(words)
                self._has.notify_all()

    def wait(self, seconds: float = 60) -> list[str]:
        """Return the next line that is not the return of a call; empty: none came."""
        with self._has:
            self._has.wait_for(lambda: self.said, seconds)
            return self.said.pop(0) if self.said else []

    def tell(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def blocked(self, tid: int) -> str:
        """Return where a thread sleeps: its system call, its wait channel, and the frames of libcuda on its stack."""
        pid, task = self.process.pid, f"/proc/{self.process.pid}/task/{tid}"
        words = Path(task, "syscall").read_text().split()
        channel = Path(task, "wchan").read_text()
        if words[0] == "running":
            return "running"
        ranges = [
            (int(m[1], 16), int(m[2], 16))
            for m in re.finditer(
                r"(?m)^([0-9a-f]+)-([0-9a-f]+) r-xp .*libcuda\.so", Path(f"/proc/{pid}/maps").read_text()
            )
        ]
        sp = int(words[-2], 16)
        with open(f"/proc/{pid}/mem", "rb") as memory:
            memory.seek(sp)
            try:
                stack = memory.read(16384)
            except OSError:
                memory.seek(sp)
                stack = memory.read(4096 - sp % 4096)
        values = memoryview(stack[: len(stack) // 8 * 8]).cast("Q")
        first = next((i for i, v in enumerate(values) if any(a <= v < b for a, b in ranges)), -1)
        inside = sum(any(a <= v < b for a, b in ranges) for v in values)
        return f"syscall {words[0]} {channel} frames {inside} first at {first * 8}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def _job(name: str, pid: int, seconds: float = 20) -> str:
    """Make one call for a process in a child of its own, which may hang. Return the result and the duration."""
    program = (
        "import ctypes,sys,time\nl=ctypes.CDLL('libcuda.so.1')\nl.cuInit(0)\na=(ctypes.c_uint64*8)()\n"
        "n,p=sys.argv[1],int(sys.argv[2])\n"
        "if n.endswith('Lock') and 'Un' not in n: a[0]=5000\n"
        "s=ctypes.c_int(-1)\nt=time.time()\n"
        "r=l.cuCheckpointProcessGetState(p,ctypes.byref(s)) if n.endswith('State') else getattr(l,n)(p,a)\n"
        "took=time.time()-t\nl.cuCheckpointProcessGetState(p,ctypes.byref(s))\nprint(r,f'{took:.3f}s','state',s.value)"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", program, f"cuCheckpointProcess{name}", str(pid)],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    return done.stdout.strip() or done.stderr.strip()[-200:]


def _threads(t: Target) -> None:
    """Print where the threads sleep that the driver has made, and one of the prepared threads."""
    for tid in sorted(os.listdir(f"/proc/{t.process.pid}/task"), key=int):
        name = Path(f"/proc/{t.process.pid}/task/{tid}/comm").read_text().strip()
        where = t.blocked(int(tid))
        if "frames 0" not in where:
            print("thread", name, where, flush=True)


def _prepared(state: str) -> tuple[Target, list[str]]:
    """Return a target in a state, with the names of its calls."""
    t = Target("target")
    calls = t.wait()[1:]
    print("Lock", _job("Lock", t.process.pid))
    if state == "checkpointed":
        print("Checkpoint", _job("Checkpoint", t.process.pid), flush=True)
    return t, calls


def _ended(t: Target, tid: int) -> str:
    """Wait until a call returns, blocks or ends the process. Return what it did."""
    end = time.monotonic() + WAIT
    while tid not in t.returned and time.monotonic() < end:
        time.sleep(0.002)
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread or the process has ended
        where = "" if tid in t.returned else t.blocked(tid)
        if where:
            return f"blocked {where}"
    with contextlib.suppress(subprocess.TimeoutExpired):
        return f"ends the process: {t.process.wait(0 if tid in t.returned else 1)}"
    return f"returned {t.returned.get(tid)}"


def _release(t: Target, state: str, blocked: dict[str, int]) -> None:
    """Unlock the target, and print what the blocked calls return, and whether the data is intact."""
    before = _ticks(t)
    time.sleep(1)
    print(len(blocked), "blocked calls use", _ticks(t) - before, "ticks of 10 ms in 1 s")
    if state == "checkpointed":
        print("Restore", _job("Restore", t.process.pid))
    print("Unlock", _job("Unlock", t.process.pid))
    time.sleep(1)
    print("after the unlock:", {name: t.returned.get(tid) for name, tid in blocked.items()}, flush=True)
    t.tell("check")
    print("data", t.wait(), flush=True)
    t.end()


def _ticks(t: Target) -> int:
    fields = Path(f"/proc/{t.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def record() -> None:
    """Print the rows of all calls in both states. A call that ends the process is followed by another process."""
    for state in ("locked", "checkpointed"):
        (t, calls), blocked = _prepared(state), dict[str, int]()
        _threads(t)
        for name in calls:
            if t.process.poll() is not None:
                (t, _), blocked = _prepared(state), {}
            t.tell(name)
            tid = int(t.wait()[1])
            said = _ended(t, tid)
            print(state, name, said, flush=True)
            if said.startswith("blocked"):
                blocked[name] = tid
        _release(t, state, blocked)


def kinds() -> None:
    """Print what the functions return for each kind of memory."""
    for name in KINDS:
        t = Target("kind", name)
        if t.wait() != ["ready"]:
            print(name, "could not be made")
            t.end()
            continue
        if name != "busy":
            time.sleep(0.1)
        said = [f"{step} {_job(step, t.process.pid)}" for step in ("Lock", "Checkpoint", "Restore", "Unlock")]
        t.tell("")
        print(name, "|", " | ".join(said), "|", *t.wait(10), flush=True)
        t.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--kinds", action="store_true", help="print the results for each kind of memory")
    given = parser.parse_args()
    if given.what[:1] == ["target"]:
        target()
    elif given.what[:1] == ["kind"]:
        kind(given.what[1])
    elif given.kinds:
        kinds()
    else:
        record()


if __name__ == "__main__":
    main()
