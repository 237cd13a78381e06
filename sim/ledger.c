/* Who holds how much of which device. Every byte is entered against one context or one process; a device's total is the
 * sum. */
#include "simd.h"

#include <stdlib.h>
#include <string.h>

static struct context *find_context(struct client *client, uint64_t id)
{
    for (uint32_t i = 0; i < client->n_contexts; i++)
        if (client->contexts[i].id == id) return &client->contexts[i];
    return NULL;
}

static bool belongs_to_process(uint32_t kind) { return kind == SIM_VMM || kind == SIM_POOL; }

/* Where a block of this kind is entered; NULL where client and request do not fit together. */
static struct holding *find_holding(struct client *client, const struct sim_request *request)
{
    if (belongs_to_process(request->kind)) return request->context ? NULL : &client->own[request->device];
    struct context *context = find_context(client, request->context);
    return context && context->device == request->device ? &context->holding : NULL;
}

static uint64_t usable(const struct gpu *gpu) { return gpu->info.memory_total - gpu->info.memory_reserved; }

static bool fits(const struct gpu *gpu, uint64_t bytes) { return bytes <= usable(gpu) - gpu->used; }

static enum sim_status open_context(struct client *client, const struct sim_request *request)
{
    struct gpu *gpu = &server.gpus[request->device];
    if (!request->context || find_context(client, request->context) || client->n_contexts >= SIM_MAX_CONTEXTS)
        return SIM_NOT_ALLOWED;
    if (!fits(gpu, gpu->info.context_bytes)) return SIM_NO_MEMORY;
    if (client->n_contexts == client->room) {
        uint32_t room = client->room ? client->room * 2 : 2;
        struct context *grown = realloc(client->contexts, room * sizeof *grown);
        if (!grown) return SIM_NO_MEMORY;
        client->contexts = grown;
        client->room = room;
    }
    struct context *context = &client->contexts[client->n_contexts++];
    *context = (struct context){.id = request->context, .device = request->device};
    context->holding.bytes[SIM_CONTEXT] = gpu->info.context_bytes;
    gpu->used += gpu->info.context_bytes;
    return SIM_OK;
}

enum sim_status ledger_take(struct client *client, const struct sim_request *request)
{
    if (request->kind == SIM_CONTEXT) return open_context(client, request);
    struct holding *holding = find_holding(client, request);
    /* Requested sizes are not bounded by the device (managed memory is not), so their sum must be kept from wrapping.
     */
    if (!holding || request->requested > (1ull << 62) || holding->requested[request->kind] > (1ull << 62))
        return SIM_NOT_ALLOWED;
    struct gpu *gpu = &server.gpus[request->device];
    if (!fits(gpu, request->bytes)) return SIM_NO_MEMORY;
    gpu->used += request->bytes;
    holding->bytes[request->kind] += request->bytes;
    holding->requested[request->kind] += request->requested;
    return SIM_OK;
}

bool ledger_give(struct client *client, const struct sim_request *request)
{
    struct holding *holding = request->kind == SIM_CONTEXT ? NULL : find_holding(client, request);
    if (!holding || holding->bytes[request->kind] < request->bytes ||
        holding->requested[request->kind] < request->requested)
        return false;
    server.gpus[request->device].used -= request->bytes;
    holding->bytes[request->kind] -= request->bytes;
    holding->requested[request->kind] -= request->requested;
    return true;
}

static void release(uint32_t device, const struct holding *holding)
{
    for (int kind = 0; kind < SIM_KINDS; kind++) server.gpus[device].used -= holding->bytes[kind];
}

bool ledger_close(struct client *client, const struct sim_request *request)
{
    struct context *context = find_context(client, request->context);
    if (!context || context->device != request->device) return false;
    release(context->device, &context->holding);
    *context = client->contexts[--client->n_contexts];
    return true;
}

void ledger_forget(struct client *client)
{
    for (uint32_t i = 0; i < client->n_contexts; i++) release(client->contexts[i].device, &client->contexts[i].holding);
    for (uint32_t device = 0; device < server.n_gpus; device++) release(device, &client->own[device]);
    free(client->contexts);
    client->contexts = NULL;
    client->n_contexts = client->room = 0;
    memset(client->own, 0, sizeof client->own);
}
