/* Memory that is freed by a call for another kind of memory, or with its context, and when it is available again. */
#include "conformance.h"

static CUmemoryPool pool;
static CUstream own, other;

static void say_pool(const char *name, CUmemPool_attribute what)
{
    cuuint64_t value = 0;
    CALL(cuMemPoolGetAttribute, pool, what, &value);
    say(name, (long long)(value / MIB));
}

static void say_taken(const char *name) { say(name, taken_mib()); }

static void ask_pooled(void)
{
    CUdeviceptr at = 0, small = 0, beside = 0;
    cuuint64_t threshold = ~0ull;
    CALL(cuMemAllocAsync, &at, 256 * MIB, own);
    CALL(cuMemAllocAsync, &beside, 256 * MIB, own);
    CALL(cuStreamSynchronize, own);
    mark();
    TRY("pooled.free", cuMemFree_v2, at);
    say_taken("pooled.taken.mib");
    say_pool("pooled.reserved.mib", CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    say_pool("pooled.used.mib", CU_MEMPOOL_ATTR_USED_MEM_CURRENT);
    TRY("pooled.free.twice", cuMemFree_v2, at);
    CALL(cuMemFreeAsync, beside, own);
    CALL(cuStreamSynchronize, own);
    say_pool("beside.reserved.mib", CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    say_pool("beside.used.mib", CU_MEMPOOL_ATTR_USED_MEM_CURRENT);
    CALL(cuMemPoolSetAttribute, pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &threshold);
    CALL(cuMemAllocAsync, &at, 256 * MIB, own);
    TRY("kept.free", cuMemFree_v2, at);
    say_pool("kept.reserved.mib", CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    CALL(cuMemAllocAsync, &at, 256 * MIB, own);
    say_pool("kept.again.reserved.mib", CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    CALL(cuMemFreeAsync, at, own);
    CALL(cuStreamSynchronize, own);
    threshold = 0;
    CALL(cuMemPoolSetAttribute, pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &threshold);
    CALL(cuStreamSynchronize, own);
    say_pool("unkept.reserved.mib", CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    CALL(cuMemAllocAsync, &at, MIB, own);
    CALL(cuMemAllocAsync, &small, MIB, own);
    TRY("small.free", cuMemFree_v2, small);
    say_pool("small.reserved.mib", CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    TRY("small.free.last", cuMemFree_v2, at);
    say_pool("small.last.reserved.mib", CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    CALL(cuMemPoolTrimTo, pool, 0);
    say_pool("small.trimmed.reserved.mib", CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
}

static void ask_plain(void)
{
    CUdeviceptr at = 0, more = 0;
    CUevent event = NULL;
    CALL(cuCtxSynchronize);
    mark();
    CALL(cuMemAlloc_v2, &at, 256 * MIB);
    TRY("plain.free.async", cuMemFreeAsync, at, own);
    say_taken("plain.taken.mib");
    CALL(cuStreamQuery, own);
    say_taken("plain.queried.taken.mib");
    CALL(cuMemAlloc_v2, &more, 64 * MIB);
    CALL(cuMemFree_v2, more);
    say_taken("plain.beside.taken.mib");
    CALL(cuStreamSynchronize, other);
    say_taken("plain.other.taken.mib");
    CALL(cuStreamSynchronize, own);
    say_taken("plain.own.taken.mib");
    CALL(cuMemAlloc_v2, &at, 256 * MIB);
    CALL(cuMemFreeAsync, at, own);
    CALL(cuCtxSynchronize);
    say_taken("plain.context.taken.mib");
    CALL(cuMemAlloc_v2, &at, 256 * MIB);
    CALL(cuMemFreeAsync, at, own);
    CALL(cuEventCreate, &event, CU_EVENT_DISABLE_TIMING);
    CALL(cuEventRecord, event, own);
    CALL(cuEventSynchronize, event);
    say_taken("plain.event.taken.mib");
    CALL(cuEventDestroy_v2, event);
    CALL(cuMemAlloc_v2, &at, 256 * MIB);
    CALL(cuMemFreeAsync, at, NULL);
    CALL(cuStreamSynchronize, NULL);
    say_taken("plain.legacy.taken.mib");
    CALL(cuMemAlloc_v2, &at, 256 * MIB);
    CALL(cuMemFreeAsync, at, own);
    TRY("plain.free.again", cuMemFree_v2, at);
    say_taken("plain.again.taken.mib");
    CALL(cuStreamSynchronize, own);
    TRY("plain.free.gone", cuMemFree_v2, at);
    CALL(cuMemAllocPitch_v2, &at, &(size_t){0}, 1 << 20, 256, 4);
    TRY("pitched.free.async", cuMemFreeAsync, at, own);
    CALL(cuStreamSynchronize, own);
    say_taken("pitched.taken.mib");
}

static void ask_context(void)
{
    CUcontext made = NULL;
    CUdeviceptr at = 0, pooled = 0;
    CALL(cuCtxSynchronize);
    CALL(cuCtxCreate_v2, &made, 0, 0);
    mark();
    CALL(cuMemAlloc_v2, &at, 256 * MIB);
    CALL(cuMemAllocAsync, &pooled, 128 * MIB, NULL);
    CALL(cuStreamSynchronize, NULL);
    say_taken("context.taken.mib");
    say_pool("context.reserved.mib", CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    TRY("context.destroy", cuCtxDestroy_v2, made);
    use_primary();
    say("context.gone", taken_mib() < 256);
    say_pool("context.gone.reserved.mib", CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    TRY("context.pooled.free", cuMemFree_v2, pooled);
    say_pool("context.freed.reserved.mib", CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
}

void check_freed(void)
{
    section("freed");
    use_primary();
    CALL(cuDeviceGetDefaultMemPool, &pool, 0);
    CALL(cuStreamCreate, &own, CU_STREAM_NON_BLOCKING);
    CALL(cuStreamCreate, &other, CU_STREAM_NON_BLOCKING);
    ask_pooled();
    ask_plain();
    ask_context();
    CALL(cuStreamDestroy_v2, own);
    CALL(cuStreamDestroy_v2, other);
}

/* -- a free while another context of the same device is current */

/* Frees memory of the primary context in the order of a stream, while the context `made` is current, and waits for the
 * stream. At the end, frees the memory if that was refused, so that the next case begins without memory. */
static void free_afar(const char *names[3], CUcontext made, CUdeviceptr at, CUstream stream)
{
    CALL(cuCtxSetCurrent, made);
    TRY(names[0], cuMemFreeAsync, at, stream);
    TRY(names[1], cuStreamSynchronize, stream);
    say_taken(names[2]);
    use_primary();
    CALL(cuCtxSynchronize);
    CALL(cuMemFree_v2, at);
}

#define FREE_AFAR(name, ...)                                                                                           \
    free_afar((const char *[]){name ".free.async", name ".wait", name ".taken.mib"}, __VA_ARGS__)

static void ask_afar(CUcontext made)
{
    CUdeviceptr at = 0;
    CUcontext its = NULL;
    mark();
    CALL(cuMemAlloc_v2, &at, 256 * MIB);
    FREE_AFAR("plain.there", made, at, other);
    CALL(cuMemAlloc_v2, &at, 256 * MIB);
    FREE_AFAR("plain.legacy", made, at, NULL);
    CALL(cuMemAlloc_v2, &at, 256 * MIB);
    FREE_AFAR("plain.back", made, at, own);
    CALL(cuMemAllocAsync, &at, 256 * MIB, own);
    FREE_AFAR("async.there", made, at, other);
    CALL(cuMemAllocAsync, &at, 256 * MIB, own);
    FREE_AFAR("async.back", made, at, own);
    CALL(cuCtxSetCurrent, made);
    TRY("async.afar.alloc", cuMemAllocAsync, &at, 256 * MIB, own);
    FREE_AFAR("async.afar", made, at, own);
    CALL(cuCtxSetCurrent, made);
    TRY("stream.query", cuStreamQuery, own);
    TRY("stream.context", cuStreamGetCtx, own, &its);
    say("stream.context.other", its != made);
}

void check_afar(void)
{
    CUcontext made = NULL;
    section("afar");
    use_primary();
    CALL(cuStreamCreate, &own, CU_STREAM_NON_BLOCKING);
    CALL(cuCtxCreate_v2, &made, 0, 0);
    CALL(cuStreamCreate, &other, CU_STREAM_NON_BLOCKING);
    use_primary();
    ask_afar(made);
    CALL(cuCtxDestroy_v2, made);
    use_primary();
    CALL(cuStreamDestroy_v2, own);
}
