/* `fgpu-simd --dump`: the server's ledger as JSON, for tests that compare another ledger with it. */
#include "server/state.h"
#include "wire/link.h"

#include <inttypes.h>
#include <stdio.h>

#define MAX_RECORDS (SIM_MAX_CLIENTS + SIM_MAX_DEVICES)

static const char *const kinds[SIM_KINDS] = {"context", "block", "vmm",     "managed", "pool",  "module",
                                             "graph",   "local", "runtime", "launch",  "pages", "tiles"};

static void print_device(const struct sim_record *r, const struct sim_device *device, const char *before)
{
    printf("%s\n    {\"index\": %u, \"uuid\": \"%s\", \"name\": \"%s\", \"total_bytes\": %" PRIu64
           ", \"reserved_bytes\": %" PRIu64 ", \"used_bytes\": %" PRIu64 ", \"driver_bytes\": %" PRIu64
           ", \"exported_bytes\": %" PRIu64 ", \"managed_resident_bytes\": %" PRIu64
           ", \"managed_chunk_bytes\": %" PRIu64 ", \"free_bytes\": %" PRIu64 ", \"context_bytes\": %" PRIu64 "}",
           before, r->device, device->uuid, device->name, r->total, r->reserved, r->used, r->driver, r->exported,
           r->resident, r->managed, r->total - r->reserved - r->used, device->context_bytes);
}

/* Prints the memory that NVML shows for the process. The other kinds are in the device's driver_bytes. */
static void print_process(const struct sim_record *r, const char *before)
{
    uint64_t bytes = 0, requested = 0;
    for (uint32_t kind = 0; kind < SIM_KINDS; kind++) {
        if (ledger_is_listed(kind)) bytes += r->bytes[kind];
        if (kind < SIM_ASKED) requested += r->requested[kind];
    }
    printf("%s\n    {\"pid\": %u, \"device\": %u, \"ended\": %s, \"freed_after_us\": %" PRIu64
           ", \"contexts\": %u, \"bytes\": %" PRIu64 ", \"requested_bytes\": %" PRIu64,
           before, r->pid, r->device, r->has_ended ? "true" : "false", r->freed_after_ns / 1000, r->contexts, bytes,
           requested);
    for (int kind = 0; kind < SIM_KINDS; kind++) {
        /* For managed memory, prints the requested bytes. The bytes on the device follow below. */
        printf(", \"%s_bytes\": %" PRIu64, kinds[kind], kind == SIM_MANAGED ? r->requested[kind] : r->bytes[kind]);
        if (kind != SIM_CONTEXT && kind != SIM_MANAGED && kind < SIM_ASKED)
            printf(", \"%s_requested_bytes\": %" PRIu64, kinds[kind], r->requested[kind]);
    }
    printf(", \"managed_resident_bytes\": %" PRIu64 "}", r->resident);
}

static int print_all(struct link *link, const struct sim_record *records, uint32_t n)
{
    const char *before = "";
    struct sim_device device;
    printf("{\n  \"devices\": [");
    for (uint32_t i = 0; i < n; i++) {
        if (records[i].pid) continue;
        struct sim_request ask = {.op = SIM_DEVICE, .device = records[i].device};
        if (link_call(link, ask, NULL, &device, sizeof device) != SIM_OK) return 1;
        print_device(&records[i], &device, before);
        before = ",";
    }
    printf("\n  ],\n  \"processes\": [");
    before = "";
    for (uint32_t i = 0; i < n; i++) {
        if (!records[i].pid) continue;
        print_process(&records[i], before);
        before = ",";
    }
    printf("\n  ]\n}\n");
    return 0;
}

int dump_print(const char *dir)
{
    static struct sim_record records[MAX_RECORDS];
    struct link link = LINK_INIT;
    struct sim_reply reply;
    uint32_t n_devices;
    if (link_open(&link, dir, &n_devices)) {
        fprintf(stderr, "fgpu-simd: %s: no server is running here\n", dir);
        return 1;
    }
    if (link_call(&link, (struct sim_request){.op = SIM_DUMP}, &reply, records, sizeof records) != SIM_OK) {
        fprintf(stderr, "fgpu-simd: %s: the dump is for the server's own user, in its own pid namespace\n", dir);
        return 1;
    }
    int rc = print_all(&link, records, reply.count < MAX_RECORDS ? reply.count : MAX_RECORDS);
    link_close(&link);
    return rc;
}
