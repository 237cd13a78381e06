"""Allocate memory of device 0 by one kind of call, in steps of 2 MiB, until a call fails.

Prints how much was allocated, and the driver's error.

The program is called as `fill_calls.py API KIND LIMIT_BYTES [LIBCUDART]`, in a tenant. It requests at most three
times the limit. It imports the standard library only. API selects how the program finds the call:

    driver           the driver's exports, by dlsym
    thread           the driver's functions for a per-thread default stream, by cuGetProcAddress with that flag
    runtime          libcudart
    runtime_thread   libcudart for a per-thread default stream: the name with _ptsz if the call has one
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable

STEP = 2 << 20
FLOAT, PINNED, DEVICE, READ_WRITE, GLOBAL = 0x20, 1, 1, 3, 1
PER_THREAD, SINCE_CUDA = 2, 12000
u64, u32, size_t, pointer = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_size_t, ctypes.c_void_p
Take = Callable[[], int]


class Flat(ctypes.Structure):
    """The driver's struct CUDA_ARRAY_DESCRIPTOR."""

    _fields_ = (("width", u64), ("height", u64), ("format", u32), ("channels", u32))


class Shape(ctypes.Structure):
    """The driver's struct CUDA_ARRAY3D_DESCRIPTOR."""

    _fields_ = (
        ("width", u64), ("height", u64), ("depth", u64),
        ("format", u32), ("channels", u32), ("flags", u32),
    )  # fmt: skip


class Extent(ctypes.Structure):
    """The runtime's struct cudaExtent."""

    _fields_ = (("width", size_t), ("height", size_t), ("depth", size_t))


class PoolProps(ctypes.Structure):
    """The structs CUmemPoolProps and cudaMemPoolProps."""

    _fields_ = (
        ("type", u32), ("handles", u32), ("where", u32), ("device", u32),
        ("security", pointer), ("most", size_t), ("rest", ctypes.c_ubyte * 56),
    )  # fmt: skip


class Access(ctypes.Structure):
    """The structs CUmemAccessDesc and cudaMemAccessDesc."""

    _fields_ = (("where", u32), ("device", u32), ("flags", u32))


class Node(ctypes.Structure):
    """The structs CUDA_MEM_ALLOC_NODE_PARAMS and cudaMemAllocNodeParams."""

    _fields_ = (
        ("props", PoolProps), ("access", ctypes.POINTER(Access)), ("accesses", size_t),
        ("bytes", size_t), ("at", u64),
    )  # fmt: skip


RESERVED_CURRENT = 2
CHANNEL = (ctypes.c_int * 5)(32, 0, 0, 0, 2)  # cudaChannelFormatDesc: one float
PROPS = PoolProps(PINNED, 0, DEVICE, 0)
Calls = Callable[[str], Callable[..., int]]


def graph(call: Calls, prefix: str) -> Take:
    """Return a function that runs a graph with one allocation node once. The memory stays allocated."""
    access = Access(DEVICE, 0, READ_WRITE)

    def take() -> int:
        made, node, ready = pointer(), pointer(), pointer()
        params = Node(PROPS, ctypes.pointer(access), 1, STEP)
        return (
            call(f"{prefix}GraphCreate")(ctypes.byref(made), 0)
            or call(f"{prefix}GraphAddMemAllocNode")(ctypes.byref(node), made, None, size_t(0), ctypes.byref(params))
            or call(f"{prefix}GraphInstantiateWithFlags")(ctypes.byref(ready), made, u64(0))
            or call(f"{prefix}GraphLaunch")(ready, None)
        )

    return take


def from_pool(call: Calls, prefix: str) -> Take:
    """Return a function that allocates from a separate pool, which it creates at the first call."""
    pool = pointer()
    made: list[int] = []

    def take() -> int:
        code = 0 if made else call(f"{prefix}MemPoolCreate")(ctypes.byref(pool), ctypes.byref(PROPS))
        made.append(code)
        name = "cuMemAllocFromPoolAsync" if prefix == "cu" else "cudaMallocFromPoolAsync"
        return code or call(name)(ctypes.byref(u64()), size_t(STEP), pool, None)

    return take


def take(call: Calls, name: str, *arguments: object) -> Take:
    """Return a function that makes a call. The first argument of the call receives the result."""
    return lambda: call(name)(ctypes.byref(u64()), *arguments)


def of_driver(call: Calls) -> dict[str, Take]:
    """Return, for each kind of allocation, a function that makes the driver's call."""
    rows = ctypes.byref(u64()), u64(4096), u64(STEP // 4096), 4
    handle = (u32 * 8)(PINNED, 0, DEVICE, 0)
    return {
        "alloc": take(call, "cuMemAlloc", u64(STEP)),
        "pitch": take(call, "cuMemAllocPitch", *rows),
        "managed": take(call, "cuMemAllocManaged", u64(STEP), GLOBAL),
        "create": take(call, "cuMemCreate", u64(STEP), handle, u64(0)),
        "array": take(call, "cuArrayCreate", ctypes.byref(Flat(512, 1024, FLOAT, 1))),
        "array3d": take(call, "cuArray3DCreate", ctypes.byref(Shape(128, 64, 64, FLOAT, 1, 0))),
        "mipmapped": take(call, "cuMipmappedArrayCreate", ctypes.byref(Shape(512, 1024, 0, FLOAT, 1, 0)), 1),
        "async": take(call, "cuMemAllocAsync", u64(STEP), None),
        "from_pool": from_pool(call, "cu"),
        "graph": graph(call, "cu"),
    }


def of_runtime(call: Calls) -> dict[str, Take]:
    """Return, for each kind of allocation, a function that makes the runtime's call. None is like cuMemCreate."""
    flat, cube = Extent(512, 1024, 0), Extent(128, 64, 64)
    rows = ctypes.byref(u64()), size_t(4096), size_t(STEP // 4096)
    return {
        "alloc": take(call, "cudaMalloc", size_t(STEP)),
        "pitch": take(call, "cudaMallocPitch", *rows),
        "managed": take(call, "cudaMallocManaged", size_t(STEP), GLOBAL),
        "array": take(call, "cudaMallocArray", ctypes.byref(CHANNEL), size_t(512), size_t(1024), 0),
        "array3d": take(call, "cudaMalloc3DArray", ctypes.byref(CHANNEL), cube, 0),
        "mipmapped": take(call, "cudaMallocMipmappedArray", ctypes.byref(CHANNEL), flat, 1, 0),
        "async": take(call, "cudaMallocAsync", size_t(STEP), None),
        "from_pool": from_pool(call, "cuda"),
        "graph": graph(call, "cuda"),
    }


# The name of a function in the driver's headers -> the name that the driver exports.
EXPORTS = {
    "cuMemAlloc": "cuMemAlloc_v2",
    "cuMemAllocPitch": "cuMemAllocPitch_v2",
    "cuArrayCreate": "cuArrayCreate_v2",
    "cuArray3DCreate": "cuArray3DCreate_v2",
    "cuMemGetInfo": "cuMemGetInfo_v2",
}
THREADED = ("async", "from_pool", "graph")  # kinds whose runtime function also has a name with _ptsz
DRIVER_KINDS = list(of_driver(lambda name: int))
COMBINATIONS = (
    *(("driver", kind) for kind in DRIVER_KINDS),
    *(("thread", kind) for kind in DRIVER_KINDS),
    *(("runtime", kind) for kind in of_runtime(lambda name: int)),
    *(("runtime_thread", kind) for kind in THREADED),
)


def calls_of(api: str, runtime: str) -> Calls:
    """Return a function that finds a call of this API by its name in the headers."""
    library = ctypes.CDLL(runtime if api.startswith("runtime") else "libcuda.so.1")

    def by_lookup(name: str) -> Callable[..., int]:
        found, status = pointer(), ctypes.c_int()
        where = ctypes.byref(found), SINCE_CUDA, u64(PER_THREAD), ctypes.byref(status)
        code = library.cuGetProcAddress_v2(name.encode(), *where)
        if code or not found.value:
            raise OSError(f"cuGetProcAddress({name}): {code}")
        return ctypes.CFUNCTYPE(ctypes.c_int)(found.value)

    def by_export(name: str) -> Callable[..., int]:
        function: Callable[..., int] = getattr(library, EXPORTS.get(name, name))
        return function

    def per_thread(name: str) -> Callable[..., int]:
        function: Callable[..., int] = getattr(library, name + "_ptsz", None) or getattr(library, name)
        return function

    return {"thread": by_lookup, "runtime_thread": per_thread}.get(api, by_export)


def begin(call: Calls, prefix: str) -> int:
    """Create a context and make it current. Return the error code."""
    if prefix == "cuda":
        return call("cudaFree")(None)
    context = pointer()
    return (
        call("cuInit")(0)
        or call("cuDevicePrimaryCtxRetain")(ctypes.byref(context), 0)
        or call("cuCtxSetCurrent")(context)
    )


def graph_bytes() -> int:
    """Return the bytes that the driver has reserved for graphs. It reserves whole blocks of 32 MiB for each graph."""
    found = u64()
    code = ctypes.CDLL("libcuda.so.1").cuDeviceGetGraphMemAttribute(0, RESERVED_CURRENT, ctypes.byref(found))
    return 0 if code else found.value


def main() -> int:
    """Allocate, print the result as one line of JSON, and wait for a line of stdin before the exit."""
    api, kind, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
    call, prefix = calls_of(api, sys.argv[4] if len(sys.argv) > 4 else ""), "cuda" if "runtime" in api else "cu"
    free, total, got = size_t(), size_t(), 0
    code = begin(call, prefix) or call(f"{prefix}MemGetInfo")(ctypes.byref(free), ctypes.byref(total))
    if code:
        print(json.dumps({"error": code}))
        return 1
    taken = (of_runtime if prefix == "cuda" else of_driver)(call)[kind]
    for _ in range(3 * limit // STEP):
        code = taken()
        if code:
            break
        got += STEP
    said = {"usable_bytes": free.value, "got_bytes": got, "code": code}
    if kind == "graph":
        said["taken_bytes"] = graph_bytes()
    print(json.dumps(said), flush=True)
    sys.stdin.readline()
    return 0


if __name__ == "__main__":
    sys.exit(main())
