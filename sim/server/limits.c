/* The limits that nvmlDeviceSetMemoryLimits_v1 sets on the memory of a cgroup's processes, as driver r615 has them.
 * They follow NVIDIA's documentation of NVML, and were compared with no real driver. The soft limit has no effect: it
 * keeps memory from others only when a device is nearly full. Managed memory is not limited. */
#include "server/state.h"

#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

struct limit {
    uint32_t device;
    int folder; /* stays open, so that the server detects when the cgroup is removed */
    ino_t inode;
    uint64_t soft, hard;
};

static struct limit limits[SIM_MAX_LIMITS];
static uint32_t n_limits;

static struct limit *find(uint32_t device, ino_t inode)
{
    for (struct limit *l = limits; l < limits + n_limits; l++)
        if (l->device == device && l->inode == inode) return l;
    return NULL;
}

static void drop(struct limit *limit)
{
    close(limit->folder);
    *limit = limits[--n_limits];
}

static void drop_removed(void)
{
    for (uint32_t i = n_limits; i-- > 0;)
        if (!cgroup_inode(limits[i].folder)) drop(&limits[i]);
}

/* The memory of a process outlives it, and is counted where the process was. The signal checks that the process still
 * exists. Otherwise its pid may have named another process meanwhile. */
static void look(struct client *client)
{
    ino_t now[MAX_LEVELS];
    uint32_t n = client->has_ended ? 0 : cgroups_around(client->process.pid[0], now);
    if (!n || syscall(SYS_pidfd_send_signal, client->pidfd, 0, NULL, 0)) return;
    memcpy(client->cgroups, now, n * sizeof *now);
    client->n_cgroups = n;
}

static bool is_inside(const struct client *client, ino_t inode)
{
    for (uint32_t i = 0; i < client->n_cgroups; i++)
        if (client->cgroups[i] == inode) return true;
    return false;
}

static uint64_t used_inside(uint32_t device, ino_t inode)
{
    uint64_t sum = 0;
    for (struct client *c = server.clients; c < server.clients + SIM_MAX_CLIENTS; c++) {
        uint64_t bytes = c->state == CLIENT_FREE || c->is_parked ? 0 : view_bytes(c, device);
        if (!bytes) continue;
        look(c);
        if (is_inside(c, inode)) sum += bytes;
    }
    return sum;
}

enum sim_status limits_set(const struct client *client, const struct sim_request *request, int folder)
{
    ino_t inode = cgroup_inode(folder);
    if (!server.has_limits) return SIM_NOT_SUPPORTED;
    if (!client->is_root) return SIM_NOT_ALLOWED;
    if (request->requested > request->bytes) return SIM_INVALID;
    if (!inode) return SIM_NOT_FOUND;
    drop_removed();
    struct limit *limit = find(request->device, inode);
    if (!request->requested && request->bytes == UINT64_MAX) {
        if (limit) drop(limit);
        return SIM_OK;
    }
    if (!limit) {
        int kept = n_limits < SIM_MAX_LIMITS ? fcntl(folder, F_DUPFD_CLOEXEC, 0) : -1;
        if (kept < 0) return SIM_NO_MEMORY;
        limit = &limits[n_limits++];
        *limit = (struct limit){.device = request->device, .folder = kept, .inode = inode};
    }
    limit->soft = request->requested;
    limit->hard = request->bytes;
    return SIM_OK;
}

/* Needs no root: the documentation requires it of the other function alone. */
enum sim_status limits_get(uint32_t device, int folder, struct sim_limits *out)
{
    ino_t inode = cgroup_inode(folder);
    if (!server.has_limits) return SIM_NOT_SUPPORTED;
    if (!inode) return SIM_NOT_FOUND;
    const struct limit *limit = find(device, inode);
    *out = (struct sim_limits){
        .soft = limit ? limit->soft : 0, .hard = limit ? limit->hard : UINT64_MAX, .used = used_inside(device, inode)};
    return SIM_OK;
}

bool limits_allow(struct client *client, uint32_t device, uint64_t bytes)
{
    if (!n_limits || !bytes) return true;
    look(client);
    for (const struct limit *l = limits; l < limits + n_limits; l++) {
        if (l->device != device || !is_inside(client, l->inode)) continue;
        uint64_t used = used_inside(device, l->inode);
        if (used > l->hard || bytes > l->hard - used) return false;
    }
    return true;
}

bool limits_allow_return(struct client *client)
{
    for (uint32_t device = 0; device < server.n_gpus; device++)
        if (!limits_allow(client, device, view_bytes(client, device))) return false;
    return true;
}

enum sim_status limits_take(struct client *client, const struct sim_request *request)
{
    uint64_t bytes = ledger_is_listed(request->kind) ? request->bytes : 0;
    if (request->kind == SIM_CONTEXT) bytes = server.gpus[request->device].info.context_bytes;
    return limits_allow(client, request->device, bytes) ? ledger_take(client, request) : SIM_NO_MEMORY;
}
