/* The time for which the kernels of each process ran on a device in the last second: NVML's utilization. */
#include "server/state.h"

#include <string.h>

#define SLOT_NS 100000000u
#define SLOTS 10 /* complete slots, which are shown; one more is being filled */

struct meter {
    uint64_t slot[SLOTS + 1]; /* the number of the slot, counted since the host's boot */
    uint32_t ns[SLOTS + 1];
};

static struct meter meters[SIM_MAX_DEVICES][SIM_MAX_CLIENTS];

static struct meter *meter_of(uint32_t device, const struct client *client)
{
    return &meters[device][client - server.clients];
}

void meter_ran(uint32_t device, const struct client *client, uint64_t from_ns, uint64_t until_ns)
{
    struct meter *meter = meter_of(device, client);
    uint64_t last = until_ns / SLOT_NS, slot = from_ns / SLOT_NS;
    if (slot + SLOTS < last) slot = last - SLOTS;
    for (; slot <= last; slot++) {
        uint64_t begin = slot * SLOT_NS, end = begin + SLOT_NS;
        uint32_t at = (uint32_t)(slot % (SLOTS + 1));
        if (meter->slot[at] != slot) meter->ns[at] = 0;
        meter->slot[at] = slot;
        meter->ns[at] += (uint32_t)((until_ns < end ? until_ns : end) - (from_ns > begin ? from_ns : begin));
    }
}

uint32_t meter_busy_us(uint32_t device, const struct client *client)
{
    const struct meter *meter = meter_of(device, client);
    uint64_t now = now_ns() / SLOT_NS, sum = 0;
    for (uint32_t i = 0; i <= SLOTS; i++)
        if (meter->slot[i] < now && meter->slot[i] + SLOTS >= now) sum += meter->ns[i];
    return (uint32_t)(sum / 1000);
}

void meter_leave(const struct client *client)
{
    for (uint32_t device = 0; device < SIM_MAX_DEVICES; device++)
        memset(meter_of(device, client), 0, sizeof(struct meter));
}
