/* The information about other processes that a process may read: NVML's process lists, and the dump for tests. */
#include "server/state.h"

/* In a pid namespace, its own processes and those of inner namespaces are visible. Both identities list the namespaces
 * from the server's own downwards. If the asker's namespace contains the other process, both lists therefore have this
 * namespace at the last level of the asker's list. */
pid_t view_pid(const struct client *of, const struct client *asker)
{
    int level = asker->process.depth - 1;
    if (level < 0 || of->process.depth <= level || of->process.ns[level] != asker->process.ns[level]) return 0;
    return of->process.pid[level];
}

static uint64_t listed(const struct holding *holding)
{
    uint64_t sum = 0;
    for (uint32_t kind = 0; kind < SIM_KINDS; kind++)
        if (ledger_is_listed(kind)) sum += holding->bytes[kind];
    return sum;
}

uint64_t view_bytes(const struct client *client, uint32_t device)
{
    uint64_t sum = listed(&client->own[device]);
    for (uint32_t i = 0; i < client->n_contexts; i++)
        if (client->contexts[i].device == device) sum += listed(&client->contexts[i].holding);
    return sum;
}

static bool has_context(const struct client *client, uint32_t device)
{
    for (uint32_t i = 0; i < client->n_contexts; i++)
        if (client->contexts[i].device == device) return true;
    return false;
}

/* Drops the rows of processes that have no context on the device, whatever they hold there. */
static uint32_t drop_rows(struct sim_process *rows, const bool *kept, uint32_t n)
{
    uint32_t left = 0;
    for (uint32_t i = 0; i < n; i++)
        if (kept[i]) rows[left++] = rows[i];
    return left;
}

uint32_t view_processes(const struct client *asker, uint32_t device, struct sim_process *out, uint32_t room)
{
    static bool computes[SIM_MAX_CLIENTS];
    uint32_t n = 0;
    turns_catch_up(device);
    for (const struct client *c = server.clients; c < server.clients + SIM_MAX_CLIENTS; c++) {
        pid_t pid = c->state == CLIENT_FREE || c->is_parked ? 0 : view_pid(c, asker);
        uint64_t bytes = pid ? view_bytes(c, device) : 0;
        if (!bytes) continue;
        /* Two connections of one process (a second copy of the library) are one row. */
        uint32_t i = 0;
        while (i < n && out[i].pid != (uint32_t)pid) i++;
        if (i == room) break;
        if (i == n) {
            computes[n] = false;
            out[n++] = (struct sim_process){.pid = (uint32_t)pid};
        }
        out[i].bytes += bytes;
        out[i].busy_us += meter_busy_us(device, c);
        computes[i] = computes[i] || has_context(c, device);
    }
    return drop_rows(out, computes, n);
}

static void add_holding(struct sim_record *record, const struct holding *holding)
{
    for (int kind = 0; kind < SIM_KINDS; kind++) record->bytes[kind] += holding->bytes[kind];
    for (int kind = 0; kind < SIM_ASKED; kind++) record->requested[kind] += holding->requested[kind];
}

static bool is_empty(const struct sim_record *record)
{
    for (int kind = 0; kind < SIM_KINDS; kind++)
        if (record->bytes[kind] || (kind < SIM_ASKED && record->requested[kind])) return false;
    return !record->contexts && !record->resident;
}

/* Devices come first, so that they are listed even if there is no room for all processes. */
uint32_t view_dump(struct sim_record *out, uint32_t room)
{
    uint32_t n = 0;
    for (uint32_t device = 0; device < server.n_gpus && n < room; device++) {
        const struct gpu *gpu = &server.gpus[device];
        out[n++] = (struct sim_record){.device = device,
                                       .total = gpu->info.memory_total,
                                       .reserved = gpu->info.memory_reserved,
                                       .used = gpu->used,
                                       .driver = gpu->driver,
                                       .exported = gpu->exported,
                                       .managed = managed_bytes(device),
                                       .resident = gpu->resident};
    }
    for (const struct client *c = server.clients; c < server.clients + SIM_MAX_CLIENTS; c++) {
        for (uint32_t device = 0; c->state != CLIENT_FREE && !c->is_parked && device < server.n_gpus; device++) {
            if (n == room) return n;
            struct sim_record *record = &out[n];
            *record = (struct sim_record){.pid = (uint32_t)c->process.pid[0],
                                          .device = device,
                                          .has_ended = c->has_ended,
                                          .freed_after_ns = c->free_at_ns - c->closed_at_ns,
                                          .resident = c->resident[device]};
            add_holding(record, &c->own[device]);
            for (uint32_t i = 0; i < c->n_contexts; i++) {
                if (c->contexts[i].device != device) continue;
                record->contexts++;
                add_holding(record, &c->contexts[i].holding);
            }
            n += !is_empty(record);
        }
    }
    return n;
}

uint64_t view_busy_us(uint32_t device)
{
    uint64_t sum = 0;
    turns_catch_up(device);
    for (const struct client *c = server.clients; c < server.clients + SIM_MAX_CLIENTS; c++)
        if (c->state == CLIENT_OPEN) sum += meter_busy_us(device, c);
    return sum < 1000000 ? sum : 1000000; /* two contexts may have shared the last slot */
}
