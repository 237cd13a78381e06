/* Managed memory that is on a device. The device allocates it in chunks that all processes share, and no process's row
 * shows it. */
#include "server/state.h"

#define CHUNK (128ull << 20)

static uint64_t in_chunks(uint64_t bytes) { return (bytes + CHUNK - 1) / CHUNK * CHUNK; }

uint64_t managed_bytes(uint32_t device) { return in_chunks(server.gpus[device].resident); }

/* Changes everything or nothing. The real driver would move as much as there is room for. */
enum sim_status managed_set(struct client *client, uint32_t device, uint64_t bytes)
{
    struct gpu *gpu = &server.gpus[device];
    if (bytes > gpu->info.memory_total) return SIM_NO_MEMORY;
    uint64_t resident = gpu->resident - client->resident[device] + bytes;
    uint64_t before = in_chunks(gpu->resident), after = in_chunks(resident);
    if (after > before && !ledger_fits(device, after - before)) return SIM_NO_MEMORY;
    gpu->used = gpu->used - before + after;
    gpu->driver = gpu->driver - before + after;
    gpu->resident = resident;
    client->resident[device] = bytes;
    return SIM_OK;
}

void managed_leave(struct client *client)
{
    for (uint32_t device = 0; device < server.n_gpus; device++) managed_set(client, device, 0);
}
