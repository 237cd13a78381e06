/* Managed memory is on the device from its first use there. */
#define _GNU_SOURCE
#include "conformance_code.h"

#include <string.h>

static const CUmemLocation host = {.type = CU_MEM_LOCATION_TYPE_HOST}, there = {.type = CU_MEM_LOCATION_TYPE_DEVICE};

static CUdeviceptr allocate(size_t size)
{
    CUdeviceptr at = 0;
    CALL(cuMemAllocManaged, &at, size, CU_MEM_ATTACH_GLOBAL);
    return at;
}

static void wait_and_say(const char *what)
{
    CALL(cuCtxSynchronize);
    say(what, taken_mib());
}

static void fill(const char *what, CUdeviceptr at, size_t size)
{
    CALL(cuMemsetD8_v2, at, 1, size);
    wait_and_say(what);
}

static void check_touches(CUdeviceptr at)
{
    static char bytes[4096];
    fill("byte.mib", at, 1);
    fill("block.mib", at, 2 * MIB);
    fill("apart.mib", at + 10 * MIB, 1);
    fill("quarter.mib", at, 64 * MIB);
    CALL(cuMemcpyHtoD_v2, at + 100 * MIB, bytes, sizeof bytes);
    wait_and_say("copied.mib");
    memset((void *)(uintptr_t)(at + 128 * MIB), 1, 8 * MIB);
    say("host.mib", taken_mib());
}

static void check_moves(CUdeviceptr at)
{
    TRY("prefetch", cuMemPrefetchAsync_v2, at + 128 * MIB, 128 * MIB, there, 0, NULL);
    wait_and_say("prefetch.mib");
    TRY("back", cuMemPrefetchAsync_v2, at, 256 * MIB, host, 0, NULL);
    wait_and_say("back.mib");
    memset((void *)(uintptr_t)at, 1, 256 * MIB);
    say("back.touched.mib", taken_mib());
}

static void check_frees(CUdeviceptr at)
{
    CUdeviceptr plain = 0, other = allocate(64 * MIB);
    fill("other.mib", other, 64 * MIB);
    TRY("free", cuMemFree_v2, at);
    say("freed.mib", taken_mib());
    TRY("free.async", cuMemFreeAsync, other, NULL);
    wait_and_say("freed.async.mib");
    CALL(cuMemAlloc_v2, &plain, 64 * MIB);
    say("plain.mib", taken_mib());
    TRY("plain.free.async", cuMemFreeAsync, plain, NULL);
    wait_and_say("plain.freed.mib");
}

void check_resident(void)
{
    section("resident");
    CUcontext context = own_context();
    CUdeviceptr at = allocate(256 * MIB);
    say("made.mib", taken_mib());
    check_touches(at);
    check_moves(at);
    check_frees(at);
    fill("left.mib", allocate(64 * MIB), 64 * MIB);
    CALL(cuCtxDestroy_v2, context);
    use_primary();
    mark();
    at = allocate(8 * MIB);
    CALL(cuMemPrefetchAsync_v2, at, 8 * MIB, there, 0, NULL);
    wait_and_say("small.mib");
    CALL(cuMemFree_v2, at);
    say("small.freed.mib", taken_mib());
}
