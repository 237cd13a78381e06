/* The bytes that each client holds on each device. Every byte is counted for one context or one process. A device's
 * total is the sum. */
#include "server/state.h"

#include <stdlib.h>
#include <string.h>

/* The client chooses the ids, which are valid for this client alone. */
static struct context *find_context(struct client *client, uint64_t id)
{
    for (uint32_t i = 0; i < client->n_contexts; i++)
        if (client->contexts[i].id == id) return &client->contexts[i];
    return NULL;
}

static bool belongs_to_process(uint32_t kind)
{
    return kind == SIM_VMM || kind == SIM_POOL || kind == SIM_GRAPH || kind == SIM_TILES;
}

struct holding *ledger_holding(struct client *client, uint32_t device, uint32_t kind, uint64_t id)
{
    if (belongs_to_process(kind)) return id ? NULL : &client->own[device];
    struct context *context = find_context(client, id);
    return context && context->device == device ? &context->holding : NULL;
}

static struct holding *find_holding(struct client *client, const struct sim_request *request)
{
    return ledger_holding(client, request->device, request->kind, request->context);
}

/* Returns what CUDA calls the total of a device. */
static uint64_t usable(const struct gpu *gpu) { return gpu->info.memory_total - gpu->info.memory_reserved; }

static bool fits(const struct gpu *gpu, uint64_t bytes) { return bytes <= usable(gpu) - gpu->used; }

bool ledger_fits(uint32_t device, uint64_t bytes) { return fits(&server.gpus[device], bytes); }

bool ledger_is_listed(uint32_t kind) { return kind != SIM_PAGES && kind != SIM_TILES; }

/* Counts memory of the driver itself, which is taken from the device and is in no process's row. */
static void keep(struct gpu *gpu, uint64_t bytes)
{
    gpu->used += bytes;
    gpu->driver += bytes;
}

static void let_go(struct gpu *gpu, uint64_t bytes)
{
    gpu->used -= bytes;
    gpu->driver -= bytes;
}

static void take(struct gpu *gpu, uint32_t kind, uint64_t bytes)
{
    if (!ledger_is_listed(kind)) gpu->driver += bytes;
    gpu->used += bytes;
}

static void give(struct gpu *gpu, uint32_t kind, uint64_t bytes)
{
    if (!ledger_is_listed(kind)) gpu->driver -= bytes;
    gpu->used -= bytes;
}

void ledger_unname(uint32_t device, uint64_t bytes)
{
    server.gpus[device].driver += bytes;
    server.gpus[device].exported += bytes;
}

void ledger_name(uint32_t device, uint64_t bytes)
{
    server.gpus[device].driver -= bytes;
    server.gpus[device].exported -= bytes;
}

bool ledger_take_unnamed(uint32_t device, uint64_t bytes)
{
    if (!fits(&server.gpus[device], bytes)) return false;
    server.gpus[device].used += bytes;
    ledger_unname(device, bytes);
    return true;
}

void ledger_free_unnamed(uint32_t device, uint64_t bytes)
{
    server.gpus[device].used -= bytes;
    ledger_name(device, bytes);
}

static enum sim_status open_context(struct client *client, const struct sim_request *request)
{
    struct gpu *gpu = &server.gpus[request->device];
    if (!request->context || find_context(client, request->context) || client->n_contexts >= SIM_MAX_CONTEXTS)
        return SIM_NOT_ALLOWED;
    if (!fits(gpu, gpu->info.context_bytes + gpu->info.context_overhead)) return SIM_NO_MEMORY;
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
    keep(gpu, gpu->info.context_overhead);
    return SIM_OK;
}

/* The driver takes memory for itself while any process is initialised. That memory belongs to no process, and is
 * counted once. */
enum sim_status ledger_attach(struct client *client)
{
    if (client->attached) return SIM_OK;
    for (uint32_t device = 0; device < server.n_gpus && !server.n_attached; device++)
        keep(&server.gpus[device], server.gpus[device].info.overhead);
    server.n_attached++;
    client->attached = true;
    return SIM_OK;
}

static void detach(struct client *client)
{
    if (!client->attached) return;
    client->attached = false;
    server.n_attached--;
    for (uint32_t device = 0; device < server.n_gpus && !server.n_attached; device++)
        let_go(&server.gpus[device], server.gpus[device].info.overhead);
}

enum sim_status ledger_take(struct client *client, const struct sim_request *request)
{
    if (request->kind == SIM_CONTEXT) return open_context(client, request);
    struct holding *holding = find_holding(client, request);
    /* Requested sizes may exceed the device, because managed memory may. This bound prevents an overflow of their sum.
     */
    if (!holding || request->requested > (1ull << 62) || holding->requested[request->kind] > (1ull << 62))
        return SIM_NOT_ALLOWED;
    struct gpu *gpu = &server.gpus[request->device];
    if (fault_fails(request->kind) || !fits(gpu, request->bytes)) return SIM_NO_MEMORY;
    take(gpu, request->kind, request->bytes);
    holding->bytes[request->kind] += request->bytes;
    holding->requested[request->kind] += request->requested;
    return SIM_OK;
}

/* A client that releases more than it holds is defective or hostile. It loses its connection, and so all its memory. */
bool ledger_give(struct client *client, const struct sim_request *request)
{
    struct holding *holding = request->kind == SIM_CONTEXT ? NULL : find_holding(client, request);
    if (!holding || holding->bytes[request->kind] - holding->shared[request->kind] < request->bytes ||
        holding->requested[request->kind] < request->requested)
        return false;
    give(&server.gpus[request->device], request->kind, request->bytes);
    holding->bytes[request->kind] -= request->bytes;
    holding->requested[request->kind] -= request->requested;
    return true;
}

bool ledger_unlist(struct client *client, const struct sim_request *request)
{
    if (request->kind != SIM_VMM || !ledger_give(client, request)) return false;
    take(&server.gpus[request->device], SIM_TILES, request->bytes);
    client->own[request->device].bytes[SIM_TILES] += request->bytes;
    return true;
}

static void release(uint32_t device, const struct holding *holding)
{
    for (uint32_t kind = 0; kind < SIM_KINDS; kind++) give(&server.gpus[device], kind, holding->bytes[kind]);
}

static void release_context(const struct context *context)
{
    release(context->device, &context->holding);
    let_go(&server.gpus[context->device], server.gpus[context->device].info.context_overhead);
}

static uint64_t bytes_of(const struct holding *holding)
{
    uint64_t sum = 0;
    for (uint32_t kind = 0; kind < SIM_KINDS; kind++) sum += holding->bytes[kind];
    return sum;
}

static uint64_t bytes_on(const struct client *client, uint32_t device)
{
    uint64_t sum = bytes_of(&client->own[device]);
    for (uint32_t i = 0; i < client->n_contexts; i++)
        if (client->contexts[i].device == device)
            sum += bytes_of(&client->contexts[i].holding) + server.gpus[device].info.context_overhead;
    return sum;
}

uint64_t ledger_bytes(const struct client *client)
{
    uint64_t sum = 0;
    for (uint32_t device = 0; device < server.n_gpus; device++) sum += bytes_on(client, device);
    return sum;
}

bool ledger_has_managed(const struct client *client)
{
    for (uint32_t i = 0; i < client->n_contexts; i++)
        if (client->contexts[i].holding.requested[SIM_MANAGED]) return true;
    return false;
}

static void release_all(struct client *client)
{
    for (uint32_t i = 0; i < client->n_contexts; i++) release_context(&client->contexts[i]);
    for (uint32_t device = 0; device < server.n_gpus; device++) release(device, &client->own[device]);
    detach(client);
}

void ledger_park(struct client *client)
{
    release_all(client);
    client->is_parked = true;
}

bool ledger_unpark(struct client *client)
{
    for (uint32_t device = 0; device < server.n_gpus; device++) {
        uint64_t overhead = server.n_attached ? 0 : server.gpus[device].info.overhead;
        if (!fits(&server.gpus[device], bytes_on(client, device) + overhead)) return false;
    }
    ledger_attach(client);
    for (uint32_t i = 0; i < client->n_contexts; i++) {
        const struct context *context = &client->contexts[i];
        struct gpu *gpu = &server.gpus[context->device];
        for (uint32_t kind = 0; kind < SIM_KINDS; kind++) take(gpu, kind, context->holding.bytes[kind]);
        keep(gpu, gpu->info.context_overhead);
    }
    for (uint32_t device = 0; device < server.n_gpus; device++)
        for (uint32_t kind = 0; kind < SIM_KINDS; kind++)
            take(&server.gpus[device], kind, client->own[device].bytes[kind]);
    client->is_parked = false;
    return true;
}

void ledger_move(struct client *client, const uint32_t *to)
{
    struct holding own[SIM_MAX_DEVICES];
    memcpy(own, client->own, sizeof own);
    for (uint32_t i = 0; i < server.n_gpus; i++) client->own[to[i]] = own[i];
    for (uint32_t i = 0; i < client->n_contexts; i++) client->contexts[i].device = to[client->contexts[i].device];
    for (uint32_t i = 0; i < server.n_gpus; i++) client->devices[i] = to[client->devices[i]];
}

bool ledger_has_context(struct client *client, const struct sim_request *request)
{
    const struct context *context = find_context(client, request->context);
    return context && context->device == request->device;
}

void ledger_close(struct client *client, uint64_t id)
{
    struct context *context = find_context(client, id);
    release_context(context);
    *context = client->contexts[--client->n_contexts];
}

void ledger_forget(struct client *client)
{
    if (!client->is_parked) release_all(client);
    free(client->contexts);
    client->contexts = NULL;
    client->n_contexts = client->room = 0;
    memset(client->own, 0, sizeof client->own);
}
