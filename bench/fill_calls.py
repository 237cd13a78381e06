"""Takes all it can get of device 0 by one kind of call, in steps of 2 MiB: prints how much, and the driver's word.

`fill_calls.py KIND LIMIT_BYTES`: run as a tenant. It asks for three times the limit. Standard library alone.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable

STEP = 2 << 20
FLOAT = 0x20
cuda = ctypes.CDLL("libcuda.so.1")
u64 = ctypes.c_uint64


class Flat(ctypes.Structure):
    """CUDA_ARRAY_DESCRIPTOR."""

    _fields_ = (("width", u64), ("height", u64), ("format", ctypes.c_uint), ("channels", ctypes.c_uint))


class Shape(ctypes.Structure):
    """CUDA_ARRAY3D_DESCRIPTOR."""

    _fields_ = (
        ("width", u64), ("height", u64), ("depth", u64),
        ("format", ctypes.c_uint), ("channels", ctypes.c_uint), ("flags", ctypes.c_uint),
    )  # fmt: skip


def take(name: str, *arguments: object) -> Callable[[], int]:
    """A call whose first argument is where it puts what it gives."""
    return lambda: int(getattr(cuda, name)(ctypes.byref(u64()), *arguments))


def create() -> int:
    """cuMemCreate on device 0."""
    prop = (ctypes.c_uint32 * 8)(1, 0, 1, 0)
    return int(cuda.cuMemCreate(ctypes.byref(u64()), u64(STEP), prop, u64(0)))


def pitched() -> int:
    """Rows of 4 KiB."""
    return int(cuda.cuMemAllocPitch_v2(ctypes.byref(u64()), ctypes.byref(u64()), u64(4096), u64(STEP // 4096), 4))


KINDS: dict[str, Callable[[], int]] = {
    "alloc": take("cuMemAlloc_v2", u64(STEP)),
    "pitch": pitched,
    "managed": take("cuMemAllocManaged", u64(STEP), 1),
    "create": create,
    "array": take("cuArrayCreate_v2", ctypes.byref(Flat(512, 1024, FLOAT, 1))),
    "array3d": take("cuArray3DCreate_v2", ctypes.byref(Shape(128, 64, 64, FLOAT, 1, 0))),
    "mipmapped": take("cuMipmappedArrayCreate", ctypes.byref(Shape(512, 1024, 0, FLOAT, 1, 0)), 1),
    "async": take("cuMemAllocAsync", u64(STEP), None),
    "async_ptsz": take("cuMemAllocAsync_ptsz", u64(STEP), None),
}


def main() -> int:
    """One line of JSON."""
    context, free, total = ctypes.c_void_p(), u64(), u64()
    code = cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) or cuda.cuCtxSetCurrent(context)
    if code:
        print(json.dumps({"error": code}))
        return 1
    cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    usable, got = free.value, 0
    for _ in range(3 * int(sys.argv[2]) // STEP):
        code = KINDS[sys.argv[1]]()
        if code:
            break
        got += STEP
    print(json.dumps({"usable_bytes": usable, "got_bytes": got, "code": code}), flush=True)
    sys.stdin.readline()
    return 0


if __name__ == "__main__":
    sys.exit(main())
