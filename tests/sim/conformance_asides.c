/* What a library beside the program asks while the program's thread captures, in the mode that forbids most: which of
 * it would harm the capture? */
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

static const struct {
    const char *name;
    CUresult (*run)(void);
} asides[] = {{"device.other", ask_other},   {"device.capturing", ask_capturing},
              {"device.legacy", ask_legacy}, {"device.own", ask_own},
              {"device", ask_device},        {"current", ask_current},
              {"primary", ask_primary},      {"pool", ask_pool},
              {"graphs", ask_graphs},        {"push", push}};

/* Each with a capture of its own: its result, and how the capture ends. */
static void each(const char *how, unsigned flags)
{
    for (size_t i = 0; i < sizeof asides / sizeof *asides; i++) {
        CUgraph captured = NULL;
        CALL(cuStreamCreate, &stream, flags);
        CALL(cuStreamBeginCapture_v2, stream, CU_STREAM_CAPTURE_MODE_GLOBAL);
        CUresult result = asides[i].run(), end = CALL(cuStreamEndCapture, stream, &captured);
        printf("asides.%s.%s %d %d\n", how, asides[i].name, (int)result, (int)end);
        fflush(stdout);
        if (captured) CALL(cuGraphDestroy, captured);
        CALL(cuStreamDestroy_v2, stream);
    }
}

void check_asides(void)
{
    section("asides");
    use_primary();
    CALL(cuCtxGetCurrent, &context);
    CALL(cuStreamCreate, &other, CU_STREAM_NON_BLOCKING);
    each("aside", CU_STREAM_NON_BLOCKING);
    each("blocking", 0);
    CALL(cuStreamDestroy_v2, other);
}
