"""Programs of `bench/opens.py` that call libcuda and libnvidia-ml by ctypes: `python3 open_driver.py KIND [SECONDS]`.

Kinds: `driver` (all ways of allocation), `nvml`, `client` (an allocation), `hold` (an allocation that is kept for
SECONDS). They print one line `CALL STATUS` for each call, and continue after failures.

The kinds `refused-cuda` and `refused-nvml` make their calls once, print one line with all results, and repeat this
after each line of stdin.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p

MIB = 1 << 20
ABSENT = -1  # no status of a call
POSIX_FD, FABRIC = 1, 8  # types of shareable handles
PTX = b".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry empty() { ret; }\n"


class Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", Location),
        ("security", c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", Location), ("flags", c_int))


class Library:
    """A library. Each call prints the function and its status."""

    def __init__(self, name: str) -> None:
        self._library = ctypes.CDLL(name)

    def __call__(self, function: str, *arguments: object) -> int:
        status = self.quiet(function, *arguments)
        print(f"{function} {'absent' if status == ABSENT else status}", flush=True)
        return status

    def quiet(self, function: str, *arguments: object) -> int:
        """Call without a line. Return ABSENT if the library does not have this function."""
        try:
            return int(getattr(self._library, function)(*arguments))
        except AttributeError:
            return ABSENT

    def text(self, function: str, *arguments: object) -> str:
        """Call a function that returns a string."""
        called = self._library[function]  # a new object, because `restype` is changed
        called.restype = c_char_p
        return (called(*arguments) or b"").decode()


def context(cuda: Library) -> None:
    """Make the primary context of device 0 current."""
    device, primary, count = c_int(), c_void_p(), c_int()
    cuda("cuInit", 0)
    cuda("cuDeviceGetCount", byref(count))
    cuda("cuDeviceGet", byref(device), 0)
    cuda("cuDevicePrimaryCtxRetain", byref(primary), device)
    cuda("cuCtxSetCurrent", primary)


def allocation(cuda: Library) -> None:
    """Allocate and free."""
    at = c_void_p()
    cuda("cuMemAlloc_v2", byref(at), c_size_t(MIB))
    cuda("cuMemFree_v2", at)


def ordered(cuda: Library) -> None:
    """Allocate in the order of a stream."""
    at, stream = c_void_p(), c_void_p()
    cuda("cuStreamCreate", byref(stream), 0)
    cuda("cuMemAllocAsync", byref(at), c_size_t(MIB), stream)
    cuda("cuMemFreeAsync", at, stream)
    cuda("cuStreamSynchronize", stream)
    cuda("cuStreamDestroy_v2", stream)


def shared(cuda: Library, handle_type: int) -> None:
    """Create memory with a handle of this type, map it, export and import it."""
    wanted = Properties(type=1, handle_types=handle_type, location=Location(1, 0))
    size, handle, imported, at = c_size_t(), ctypes.c_uint64(), ctypes.c_uint64(), c_void_p()
    if cuda("cuMemGetAllocationGranularity", byref(size), byref(wanted), 0):
        return
    if cuda("cuMemCreate", byref(handle), size, byref(wanted), ctypes.c_uint64(0)):
        return
    cuda("cuMemAddressReserve", byref(at), size, c_size_t(0), c_void_p(), ctypes.c_uint64(0))
    cuda("cuMemMap", at, size, c_size_t(0), handle, ctypes.c_uint64(0))
    cuda("cuMemSetAccess", at, size, byref(Access(Location(1, 0), 3)), c_size_t(1))
    exported = (ctypes.c_uint64 * 8)()  # a descriptor, or the 64 bytes of a fabric handle
    if not cuda("cuMemExportToShareableHandle", byref(exported), handle, handle_type, ctypes.c_uint64(0)):
        given = c_void_p(exported[0]) if handle_type == POSIX_FD else byref(exported)
        if not cuda("cuMemImportFromShareableHandle", byref(imported), given, handle_type):
            cuda("cuMemRelease", imported)
    cuda("cuMemUnmap", at, size)
    cuda("cuMemAddressFree", at, size)
    cuda("cuMemRelease", handle)


def others(cuda: Library) -> None:
    """Allocate managed and host memory, and use IPC, an event, a module and a second context."""
    at, host, event, module, second = c_void_p(), c_void_p(), c_void_p(), c_void_p(), c_void_p()
    cuda("cuMemAllocManaged", byref(at), c_size_t(MIB), 1)
    cuda("cuMemFree_v2", at)
    cuda("cuMemHostAlloc", byref(host), c_size_t(MIB), 0)
    cuda("cuMemFreeHost", host)
    cuda("cuMemAlloc_v2", byref(at), c_size_t(MIB))
    cuda("cuIpcGetMemHandle", byref(ctypes.create_string_buffer(64)), at)
    cuda("cuMemFree_v2", at)
    cuda("cuEventCreate", byref(event), 0)
    cuda("cuEventDestroy_v2", event)
    cuda("cuModuleLoadData", byref(module), c_char_p(PTX))
    cuda("cuCtxCreate_v2", byref(second), 0, 0)
    allocation(cuda)
    cuda("cuCtxDestroy_v2", second)


def peer(cuda: Library) -> None:
    """Use device 1, if it exists, and its memory from device 0."""
    count, possible, first, second, at = c_int(), c_int(), c_void_p(), c_void_p(), c_void_p()
    cuda("cuDeviceGetCount", byref(count))
    if count.value < 2:
        return
    cuda("cuDevicePrimaryCtxRetain", byref(second), 1)
    cuda("cuCtxSetCurrent", second)
    cuda("cuMemAlloc_v2", byref(at), c_size_t(MIB))
    cuda("cuDevicePrimaryCtxRetain", byref(first), 0)
    cuda("cuCtxSetCurrent", first)
    cuda("cuDeviceCanAccessPeer", byref(possible), 0, 1)
    cuda("cuCtxEnablePeerAccess", second, 0)


def driver(_: float) -> None:
    """Allocate in all ways, in the main thread and in a second thread."""
    cuda, current = Library("libcuda.so.1"), c_void_p()
    context(cuda)
    allocation(cuda)
    ordered(cuda)
    shared(cuda, POSIX_FD)
    shared(cuda, FABRIC)
    others(cuda)
    cuda("cuCtxGetCurrent", byref(current))

    def second() -> None:
        cuda("cuCtxSetCurrent", current)
        allocation(cuda)

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    peer(cuda)
    cuda("cuDevicePrimaryCtxRelease_v2", 0)


def nvml(_: float) -> None:
    """Query a device, and initialise a second time after the end."""
    library, device, count = Library("libnvidia-ml.so.1"), c_void_p(), ctypes.c_uint()
    memory, buffer = (ctypes.c_uint64 * 8)(), ctypes.create_string_buffer(1 << 16)
    library("nvmlInit_v2")
    library("nvmlDeviceGetCount_v2", byref(count))
    library("nvmlDeviceGetHandleByIndex_v2", 0, byref(device))
    library("nvmlDeviceGetMemoryInfo", device, byref(memory))
    library("nvmlDeviceGetUtilizationRates", device, byref(memory))
    library("nvmlDeviceGetName", device, buffer, 96)
    library("nvmlDeviceGetMigMode", device, byref(memory), byref(buffer))
    size = ctypes.c_uint(64)
    library("nvmlDeviceGetComputeRunningProcesses_v3", device, byref(size), buffer)
    library("nvmlShutdown")
    library("nvmlInitWithFlags", 1)  # NVML_INIT_FLAG_NO_GPUS
    library("nvmlShutdown")
    library("nvmlInit_v2")
    library("nvmlShutdown")


def client(seconds: float) -> None:
    """Allocate, and keep the context for some time."""
    cuda = Library("libcuda.so.1")
    context(cuda)
    allocation(cuda)
    time.sleep(seconds)


def refused_cuda() -> str:
    """Return the results of cuInit and, if it succeeds, of a context and an allocation."""
    cuda, primary, at, name = Library("libcuda.so.1"), c_void_p(), c_void_p(), c_char_p()
    steps = (
        ("cuInit", (0,)),
        ("cuDeviceGetCount", (byref(c_int()),)),
        ("cuDevicePrimaryCtxRetain", (byref(primary), 0)),
        ("cuCtxSetCurrent", (primary,)),
        ("cuMemAlloc_v2", (byref(at), c_size_t(MIB))),
        ("cuMemAllocManaged", (byref(at), c_size_t(MIB), 1)),
    )
    found = []
    for function, arguments in steps:
        status = cuda.quiet(function, *arguments)
        cuda.quiet("cuGetErrorName", status, byref(name))
        found.append(f"{function} {status} {(name.value or b'').decode()}")
        if status:
            break
    return ", ".join(found)


def refused_nvml() -> str:
    """Return the results of nvmlInit_v2 and, if it succeeds, of a count and a handle."""
    library, device, count = Library("libnvidia-ml.so.1"), c_void_p(), ctypes.c_uint()
    steps = (
        ("nvmlInit_v2", ()),
        ("nvmlDeviceGetCount_v2", (byref(count),)),
        ("nvmlDeviceGetHandleByIndex_v2", (0, byref(device))),
        ("nvmlDeviceGetMemoryInfo", (device, byref((ctypes.c_uint64 * 8)()))),
    )
    found = []
    for function, arguments in steps:
        status = library.quiet(function, *arguments)
        found.append(f"{function} {status} {library.text('nvmlErrorString', status)}")
        if status:
            break
    if not found[0].startswith("nvmlInit_v2 0 "):
        return found[0]
    library.quiet("nvmlShutdown")
    return ", ".join(found)


def repeated(results: Callable[[], str]) -> None:
    """Print the results now, and after each line of stdin."""
    print(results(), flush=True)
    for _ in sys.stdin:
        print(results(), flush=True)


def main() -> None:
    """Run the kind of the first argument."""
    kind = sys.argv[1]
    if kind.startswith("refused-"):
        repeated(refused_cuda if kind == "refused-cuda" else refused_nvml)
        os._exit(0)
    kinds = {"driver": driver, "nvml": nvml, "client": client, "hold": client}
    kinds[kind](float(sys.argv[2]) if len(sys.argv) > 2 else 0)


if __name__ == "__main__":
    main()
