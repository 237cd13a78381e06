/* Local memory: one area for each context, with room for the same number of bytes of every thread that the device can
 * run at a time. The area of a new context is part of the context's own size. */
#include "server/state.h"

#include <cuda.h>

#define MIB (1ull << 20)
#define STEP (2 * MIB)        /* the area is rounded to the nearest multiple */
#define FIRST_BYTES 1024u     /* per thread, in a new context */
#define MOST_BYTES (1u << 19) /* per thread, on any device */

static uint64_t area_of(const struct sim_device *device, uint64_t bytes)
{
    const int32_t *a = device->attributes;
    uint64_t threads = (uint64_t)a[CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT] *
                       (uint64_t)a[CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR];
    return (bytes * threads + STEP / 2) / STEP * STEP;
}

/* An area smaller than the first area makes the context itself smaller. */
enum sim_status local_set(struct client *client, const struct sim_request *request)
{
    struct gpu *gpu = &server.gpus[request->device];
    struct holding *holding = ledger_holding(client, request->device, SIM_LOCAL, request->context);
    if (!holding || request->bytes > MOST_BYTES) return SIM_NOT_ALLOWED;
    uint64_t first = area_of(&gpu->info, FIRST_BYTES), wanted = area_of(&gpu->info, request->bytes);
    uint64_t local = wanted > first ? wanted - first : 0;
    uint64_t own = gpu->info.context_bytes - (wanted < first ? first - wanted : 0);
    uint64_t before = holding->bytes[SIM_CONTEXT] + holding->bytes[SIM_LOCAL];
    uint64_t more = own + local > before ? own + local - before : 0;
    if (more && !(ledger_fits(request->device, more) && limits_allow(client, request->device, more)))
        return SIM_NO_MEMORY;
    gpu->used += own + local - before;
    holding->bytes[SIM_CONTEXT] = own;
    holding->bytes[SIM_LOCAL] = local;
    return SIM_OK;
}
