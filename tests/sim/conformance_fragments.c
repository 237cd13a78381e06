/* A pool with free pieces between pieces in use: for which requests does it take more of the device? */
#include "conformance.h"

#include <stdio.h>

static CUmemoryPool pool;
static CUstream stream;

static void say_reserved(const char *size, const char *when)
{
    char name[64];
    cuuint64_t bytes = 0;
    CALL(cuMemPoolGetAttribute, pool, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, &bytes);
    snprintf(name, sizeof name, "%s.%s.mib", size, when);
    say(name, (long long)(bytes / MIB));
}

/* Allocates `count` pieces, frees every other one, and requests `large` bytes. */
static void fragment(const char *size, size_t piece, int count, size_t large)
{
    CUdeviceptr at[512] = {0}, more = 0;
    char name[64];
    CALL(cuMemPoolTrimTo, pool, 0);
    for (int i = 0; i < count; i++) CALL(cuMemAllocFromPoolAsync, &at[i], piece, pool, stream);
    say_reserved(size, "full");
    for (int i = 0; i < count; i += 2) CALL(cuMemFreeAsync, at[i], stream);
    CALL(cuStreamSynchronize, stream);
    say_reserved(size, "freed");
    CALL(cuMemAllocFromPoolAsync, &at[0], piece, pool, stream);
    say_reserved(size, "again");
    snprintf(name, sizeof name, "%s.large", size);
    TRY(name, cuMemAllocFromPoolAsync, &more, large, pool, stream);
    say_reserved(size, "large");
    CALL(cuMemFreeAsync, more, stream);
    CALL(cuMemFreeAsync, at[0], stream);
    for (int i = 1; i < count; i += 2) CALL(cuMemFreeAsync, at[i], stream);
    CALL(cuStreamSynchronize, stream);
    CALL(cuMemPoolTrimTo, pool, 0);
    say_reserved(size, "end");
}

void check_fragments(void)
{
    CUmemPoolProps kind = {.allocType = CU_MEM_ALLOCATION_TYPE_PINNED, .location = {CU_MEM_LOCATION_TYPE_DEVICE, 0}};
    cuuint64_t all = ~(cuuint64_t)0;
    section("fragments");
    use_primary();
    CALL(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    CALL(cuMemPoolCreate, &pool, &kind);
    CALL(cuMemPoolSetAttribute, pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &all);
    fragment("half", MIB / 2, 512, 96 * MIB);
    fragment("three_halves", 3 * MIB / 2, 256, 96 * MIB);
    fragment("eight", 8 * MIB, 128, 96 * MIB);
    fragment("block", 32 * MIB, 32, 96 * MIB);
    fragment("odd", 33 * MIB, 32, 256 * MIB);
    TRY("destroy", cuMemPoolDestroy, pool);
    CALL(cuStreamDestroy_v2, stream);
}
