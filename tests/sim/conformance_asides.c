/* Calls that a library may make while the program's thread captures in the strictest mode: which of them would break
 * the capture? */
#include "conformance.h"

#include <stdio.h>

static CUstream stream, other;
static CUcontext context;
static CUdevice device;

static CUresult ask_other(void) { return CALL(cuStreamGetDevice, other, &device); }
static CUresult ask_capturing(void) { return CALL(cuStreamGetDevice, stream, &device); }
static CUresult ask_legacy(void) { return CALL(cuStreamGetDevice, NULL, &device); }
static CUresult ask_own(void) { return CALL(cuStreamGetDevice_ptsz, NULL, &device); }
static CUresult ask_device(void) { return CALL(cuCtxGetDevice, &device); }
static CUresult ask_current(void) { return CALL(cuCtxGetCurrent, &context); }
static CUresult ask_primary(void) { return CALL(cuDevicePrimaryCtxGetState, 0, &(unsigned){0}, &(int){0}); }

static CUresult ask_pool(void)
{
    CUmemoryPool pool = NULL;
    cuuint64_t bytes = 0;
    CUresult result = CALL(cuDeviceGetMemPool, &pool, 0);
    return result ? result : CALL(cuMemPoolGetAttribute, pool, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, &bytes);
}

static CUresult ask_graphs(void)
{
    return CALL(cuDeviceGetGraphMemAttribute, 0, CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT, &(cuuint64_t){0});
}

static CUresult push(void)
{
    CUresult result = CALL(cuCtxPushCurrent_v2, context);
    return result ? result : CALL(cuCtxPopCurrent_v2, &context);
}

struct aside {
    const char *name;
    CUresult (*run)(void);
};
static const struct aside asides[] = {{"device.other", ask_other},   {"device.capturing", ask_capturing},
                                      {"device.legacy", ask_legacy}, {"device.own", ask_own},
                                      {"device", ask_device},        {"current", ask_current},
                                      {"primary", ask_primary},      {"pool", ask_pool},
                                      {"graphs", ask_graphs},        {"push", push}};

/* Makes a call during a new capture. Prints its result, and how the capture ends. */
static void ask(const char *how, const struct aside *aside, unsigned flags, CUstreamCaptureMode thread)
{
    CUgraph captured = NULL;
    CALL(cuStreamCreate, &stream, flags);
    CALL(cuStreamBeginCapture_v2, stream, CU_STREAM_CAPTURE_MODE_GLOBAL);
    CALL(cuThreadExchangeStreamCaptureMode, &thread);
    CUresult result = aside->run();
    CALL(cuThreadExchangeStreamCaptureMode, &thread);
    CUresult end = CALL(cuStreamEndCapture, stream, &captured);
    printf("%s.%s %d %d\n", how, aside->name, (int)result, (int)end);
    fflush(stdout);
    if (captured) CALL(cuGraphDestroy, captured);
    CALL(cuStreamDestroy_v2, stream);
}

static void set_up(const char *name)
{
    section(name);
    use_primary();
    CALL(cuCtxGetCurrent, &context);
    CALL(cuStreamCreate, &other, CU_STREAM_NON_BLOCKING);
}

void check_asides(void)
{
    const CUstreamCaptureMode global = CU_STREAM_CAPTURE_MODE_GLOBAL;
    set_up("asides");
    for (size_t i = 0; i < sizeof asides / sizeof *asides; i++)
        ask("asides.aside", &asides[i], CU_STREAM_NON_BLOCKING, global);
    for (size_t i = 0; i < sizeof asides / sizeof *asides; i++) ask("asides.blocking", &asides[i], 0, global);
    CALL(cuStreamDestroy_v2, other);
}

/* -- each call by itself, also by a thread in relaxed mode */

static CUmemoryPool pool;
static CUevent event;
static CUdeviceptr memory;

static CUresult ask_current_pool(void) { return CALL(cuDeviceGetMemPool, &(CUmemoryPool){NULL}, 0); }
static CUresult ask_default_pool(void) { return CALL(cuDeviceGetDefaultMemPool, &(CUmemoryPool){NULL}, 0); }
static CUresult ask_pool_for(CUmemPool_attribute what)
{
    return CALL(cuMemPoolGetAttribute, pool, what, &(cuuint64_t){0});
}
static CUresult ask_used(void) { return ask_pool_for(CU_MEMPOOL_ATTR_USED_MEM_CURRENT); }
static CUresult ask_reserved(void) { return ask_pool_for(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT); }
static CUresult ask_uuid(void) { return CALL(cuDeviceGetUuid_v2, &(CUuuid){{0}}, 0); }
static CUresult ask_whose(void)
{
    return CALL(cuPointerGetAttribute, &(CUcontext){NULL}, CU_POINTER_ATTRIBUTE_CONTEXT, memory);
}
static CUresult ask_granularity(void)
{
    CUmemAllocationProp where = {.type = CU_MEM_ALLOCATION_TYPE_PINNED};
    where.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    return CALL(cuMemGetAllocationGranularity, &(size_t){0}, &where, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
}
static CUresult record(void) { return CALL(cuEventRecord, event, other); }
static CUresult query(void) { return CALL(cuEventQuery, event); }
static CUresult make_event(void)
{
    CUevent made = NULL;
    CUresult result = CALL(cuEventCreate, &made, CU_EVENT_DISABLE_TIMING);
    return result ? result : CALL(cuEventDestroy_v2, made);
}

static const struct aside apart[] = {{"device.capturing", ask_capturing},
                                     {"device.legacy", ask_legacy},
                                     {"pool", ask_current_pool},
                                     {"pool.default", ask_default_pool},
                                     {"pool.used", ask_used},
                                     {"pool.reserved", ask_reserved},
                                     {"uuid", ask_uuid},
                                     {"whose", ask_whose},
                                     {"granularity", ask_granularity},
                                     {"event.record", record},
                                     {"event.query", query},
                                     {"event", make_event}};

void check_apart(void)
{
    static const struct {
        const char *name;
        unsigned flags;
        CUstreamCaptureMode thread;
    } ways[] = {{"apart.aside", CU_STREAM_NON_BLOCKING, CU_STREAM_CAPTURE_MODE_GLOBAL},
                {"apart.blocking", 0, CU_STREAM_CAPTURE_MODE_GLOBAL},
                {"apart.relaxed.aside", CU_STREAM_NON_BLOCKING, CU_STREAM_CAPTURE_MODE_RELAXED},
                {"apart.relaxed.blocking", 0, CU_STREAM_CAPTURE_MODE_RELAXED}};
    set_up("apart");
    CALL(cuDeviceGetMemPool, &pool, 0);
    CALL(cuEventCreate, &event, CU_EVENT_DISABLE_TIMING);
    CALL(cuMemAlloc_v2, &memory, MIB);
    for (size_t way = 0; way < sizeof ways / sizeof *ways; way++)
        for (size_t i = 0; i < sizeof apart / sizeof *apart; i++)
            ask(ways[way].name, &apart[i], ways[way].flags, ways[way].thread);
    CALL(cuMemFree_v2, memory);
    CALL(cuEventDestroy_v2, event);
    CALL(cuStreamDestroy_v2, other);
}
