"""Allocate and free device memory with one framework, in phases: `phases.py FRAMEWORK`, in a tenant.

For every line of stdin, the program runs the next phase and prints a line of JSON: {"phase": name, "least": bytes that
it certainly holds after the phase, "is_pool": the memory is new in a pool}. After the last phase it prints
{"end": true}, and {"absent": why} if the framework is not installed. `pool` and `vmm` use the driver itself and need
the standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterator

MIB = 1 << 20
SIZES = [1000, 300 << 10, MIB + 1, 5 * MIB, 33 * MIB, 130 * MIB, 257 * MIB]  # small, odd and large
Phases = Iterator[tuple[str, int]]


def torch() -> Phases:
    """Use torch's caching allocator. Modules of cuBLAS and of torch's kernels are loaded too."""
    import torch

    kept = [torch.empty(1, device="cuda")]
    yield "start", 0
    kept += [torch.empty(size, dtype=torch.uint8, device="cuda") for size in SIZES]
    yield "grow", sum(SIZES)
    weights = torch.randn(2048, 2048, device="cuda", requires_grad=True)
    (weights @ weights).softmax(0).square().mean().backward()
    torch.cuda.synchronize()
    yield "compute", sum(SIZES)
    del kept[4:], weights
    torch.cuda.empty_cache()
    yield "shrink", 0


def cupy() -> Phases:
    """Use cupy's pool of cudaMalloc, then its pool of cudaMallocAsync."""
    import cupy

    pool = cupy.get_default_memory_pool()
    kept = [cupy.zeros(size, dtype=cupy.uint8) for size in SIZES]
    yield "grow", sum(SIZES)
    square = cupy.random.rand(2048, 2048)
    print(float((square @ square).sum()), file=sys.stderr)
    yield "compute", sum(SIZES)
    del kept[:], square
    pool.free_all_blocks()
    yield "shrink", 0
    cupy.cuda.set_allocator(cupy.cuda.MemoryAsyncPool().malloc)
    kept += [cupy.zeros(size, dtype=cupy.uint8) for size in SIZES]
    cupy.cuda.Device().synchronize()
    yield "async", sum(SIZES)


def jax() -> Phases:
    """Use jax, which calls cuMemCreate or cuMemAlloc, depending on its version. XLA's modules are loaded too."""
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax
    import jax.numpy as jnp

    kept = [jnp.ones(size // 4 + 1).block_until_ready() for size in SIZES]
    yield "grow", sum(SIZES)
    square = jnp.ones((2048, 2048))
    print(float(jax.jit(lambda x: jax.nn.softmax(x @ x).sum())(square)), file=sys.stderr)
    yield "compute", sum(SIZES)
    for array in kept:
        array.delete()
    yield "shrink", 0


def numba() -> Phases:
    """Use numba, which calls cuMemAlloc for every array, and collects freed arrays in a list before it frees them."""
    from numba import cuda

    kept = [cuda.device_array(size, dtype="u1") for size in SIZES]
    yield "grow", sum(SIZES)
    del kept[:]
    cuda.current_context().deallocations.clear()
    yield "shrink", 0


# -- the driver itself

u64 = ctypes.c_uint64


class Driver:
    """libcuda with a context. A call that fails raises OSError with the driver's error."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        context = ctypes.c_void_p()
        self("cuInit", 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self("cuCtxSetCurrent", context)

    def __call__(self, name: str, *arguments: object) -> None:
        code = getattr(self.cuda, name)(*arguments)
        if code:
            raise OSError(f"{name}: {code}")

    def new(self, name: str, *arguments: object) -> u64:
        """Make a call whose first argument receives the result, and return the result."""
        made = u64()
        self(name, ctypes.byref(made), *arguments)
        return made


def pool() -> Phases:
    """Use the default pool and a separate pool. Freed memory stays in the default pool until it is trimmed."""
    driver = Driver()
    prop = (ctypes.c_uint32 * 24)(1, 0, 1, 0)
    own = driver.new("cuMemPoolCreate", prop)
    default = driver.new("cuDeviceGetDefaultMemPool", 0)
    kept = [driver.new("cuMemAllocAsync", u64(size), None) for size in SIZES]
    driver("cuCtxSynchronize")
    yield "grow", sum(SIZES)
    more = [driver.new("cuMemAllocFromPoolAsync", u64(3 * MIB), own, None) for _ in range(100)]
    driver("cuCtxSynchronize")
    yield "own", sum(SIZES) + 300 * MIB
    driver("cuMemPoolSetAttribute", default, 4, ctypes.byref(u64(2**64 - 1)))
    for at in kept[3:]:
        driver("cuMemFreeAsync", at, None)
    driver("cuCtxSynchronize")
    yield "kept", sum(SIZES) + 300 * MIB
    driver("cuMemPoolTrimTo", default, ctypes.c_size_t(0))
    yield "trimmed", sum(SIZES[:3]) + 300 * MIB
    for at in more:
        driver("cuMemFreeAsync", at, None)
    driver("cuCtxSynchronize")
    driver("cuMemPoolDestroy", own)
    yield "destroyed", sum(SIZES[:3])


def vmm() -> Phases:
    """Use handles and mappings. Memory is freed when its handle and its mapping are gone."""
    driver = Driver()
    prop = (ctypes.c_uint32 * 8)(1, 0, 1, 0)
    size, count = 6 * MIB, 100
    handles = [driver.new("cuMemCreate", ctypes.c_size_t(size), prop, u64(0)) for _ in range(count)]
    yield "created", count * size
    base = driver.new("cuMemAddressReserve", ctypes.c_size_t(count * size), ctypes.c_size_t(0), u64(0), u64(0))
    places = [u64(base.value + number * size) for number in range(count)]
    for at, handle in zip(places, handles, strict=True):
        driver("cuMemMap", at, ctypes.c_size_t(size), ctypes.c_size_t(0), handle, u64(0))
        driver("cuMemRelease", handle)
    yield "mapped", count * size
    for at in places[: count // 2]:
        driver("cuMemUnmap", at, ctypes.c_size_t(size))
    yield "half", count * size // 2
    driver("cuMemUnmap", places[count // 2], ctypes.c_size_t(count // 2 * size))
    yield "unmapped", 0


FRAMEWORKS: dict[str, Callable[[], Phases]] = {f.__name__: f for f in (torch, cupy, jax, numba, pool, vmm)}


POOLS = (("cupy", "async"), ("pool", "grow"), ("pool", "own"))  # (framework, phase): phases in which a pool grows


def said(framework: str, phase: str, least: int) -> dict[str, object]:
    """Return what the program prints after a phase."""
    return {"phase": phase, "least": least, "is_pool": (framework, phase) in POOLS}


def main() -> int:
    """Run one phase for each line of stdin, and print its line of JSON. Return the exit code, always 0."""
    try:
        for _, (name, least) in zip(sys.stdin, FRAMEWORKS[sys.argv[1]](), strict=False):
            print(json.dumps(said(sys.argv[1], name, least)), flush=True)
    except ImportError as error:
        print(json.dumps({"absent": str(error)}), flush=True)
        return 0
    print(json.dumps({"end": True}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
