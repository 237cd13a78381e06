/* Faults on demand: what a driver does on a bad day, so that tests can see what others make of it. Set by the server's
 * own environment at its start, or by root on a running server. */
#include "link.h"
#include "simd.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_FAULTS 8
#define MAX_STALL_MS 3600000u
#define MAX_XID 1023u

struct order {
    enum sim_fault fault;
    uint64_t number;
    uint32_t device;
};

static uint64_t nvml_stalls_until_ns, fails_every, n_allocations, end_takes_ns;
static bool nvml_is_blind, nvml_is_gone, devices_are_lost;
static uint32_t lost_devices; /* a bit each */

/* `60s` or `500ms`, in milliseconds; 0: neither. */
static uint64_t parse_time(const char *text)
{
    char *unit;
    errno = 0;
    unsigned long long n = strtoull(text, &unit, 10);
    uint64_t scale = !strcmp(unit, "s") ? 1000 : !strcmp(unit, "ms") ? 1 : 0;
    return errno || unit == text || !scale || n > MAX_STALL_MS / scale ? 0 : n * scale;
}

static uint64_t parse_count(const char *text)
{
    char *end;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    return errno || *end || text[0] < '0' || text[0] > '9' ? 0 : n;
}

/* `79`, of the first device, or `79:1`; number 0: neither. */
static struct order parse_xid(const char *text)
{
    unsigned xid = 0, device = 0;
    int alone = 0, with_device = 0;
    int n = sscanf(text, "%4u%n:%2u%n", &xid, &alone, &device, &with_device);
    bool is_right = n > 0 && !text[n == 2 ? with_device : alone] && xid <= MAX_XID && device < SIM_MAX_DEVICES;
    return (struct order){SIM_FAULT_XID, is_right ? xid : 0, device};
}

/* The number of a device, behind the name of a fault. */
static bool parse_device(const char *text, struct order *order)
{
    int n = 0;
    bool is_right = sscanf(text, "%2u%n", &order->device, &n) == 1 && !text[n] && text[0] != '-';
    return is_right && order->device < SIM_MAX_DEVICES;
}

static bool parse_one(const char *word, struct order *order)
{
    *order = (struct order){.number = 1};
    if (!strcmp(word, "reset")) {
        order->fault = SIM_FAULT_RESET;
    } else if (!strcmp(word, "nvml-na")) {
        order->fault = SIM_FAULT_NVML_NA;
    } else if (!strcmp(word, "mig")) {
        order->fault = SIM_FAULT_MIG;
    } else if (!strcmp(word, "device-reset")) {
        order->fault = SIM_FAULT_DEVICE_RESET;
    } else if (!strcmp(word, "device-lost")) {
        order->fault = SIM_FAULT_DEVICE_LOST;
    } else if (!strncmp(word, "device-lost:", 12)) {
        order->fault = SIM_FAULT_ONE_LOST;
        return parse_device(word + 12, order);
    } else if (!strcmp(word, "ecc")) {
        order->fault = SIM_FAULT_ECC;
    } else if (!strcmp(word, "nvml-gone")) {
        order->fault = SIM_FAULT_NVML_GONE;
    } else if (!strncmp(word, "nvml-stall:", 11)) {
        *order = (struct order){.fault = SIM_FAULT_NVML_STALL, .number = parse_time(word + 11)};
    } else if (!strncmp(word, "slow-end:", 9)) {
        *order = (struct order){.fault = SIM_FAULT_SLOW_END, .number = parse_time(word + 9)};
    } else if (!strncmp(word, "alloc-fail:", 11)) {
        *order = (struct order){.fault = SIM_FAULT_ALLOC_FAIL, .number = parse_count(word + 11)};
    } else if (!strncmp(word, "xid=", 4)) {
        *order = parse_xid(word + 4);
    } else {
        return false;
    }
    return order->number > 0;
}

/* One or several, separated by commas; 0 with one line to say what is wrong. */
static unsigned parse(const char *spec, struct order *orders)
{
    char text[256];
    unsigned n = 0;
    if (snprintf(text, sizeof text, "%s", spec) < (int)sizeof text)
        for (char *rest = text, *word; (word = strsep(&rest, ",")) && n < MAX_FAULTS; n++) {
            if (parse_one(word, &orders[n])) continue;
            n = 0;
            break;
        }
    if (!n)
        fprintf(stderr,
                "fgpu-simd: fault is none of nvml-stall:60s, nvml-na, nvml-gone, mig, alloc-fail:N, slow-end:3s, "
                "device-reset, device-lost[:DEVICE], ecc, xid=79[:DEVICE], reset: %s\n",
                spec);
    return n;
}

static void set_mig(bool is_on)
{
    for (uint32_t i = 0; i < server.n_gpus; i++) {
        uint32_t *mig = &server.gpus[i].info.mig;
        if (*mig) *mig = is_on ? 2 : 1;
    }
}

static void report_xid(struct gpu *gpu, uint32_t xid) { gpu->xids[gpu->n_xids++ % SIM_KEPT_XIDS] = xid; }

struct sim_xid fault_xid(uint32_t device, uint64_t known)
{
    const struct gpu *gpu = &server.gpus[device];
    uint64_t oldest = gpu->n_xids < SIM_KEPT_XIDS ? 0 : gpu->n_xids - SIM_KEPT_XIDS;
    uint64_t next = known < oldest ? oldest : known;
    if (next >= gpu->n_xids) return (struct sim_xid){.count = gpu->n_xids};
    return (struct sim_xid){gpu->n_xids, next + 1, gpu->xids[next % SIM_KEPT_XIDS]};
}

void fault_set(uint32_t fault, uint32_t device, uint64_t number)
{
    switch (fault) {
    case SIM_FAULT_RESET:
        nvml_stalls_until_ns = fails_every = end_takes_ns = 0;
        nvml_is_blind = nvml_is_gone = devices_are_lost = false;
        lost_devices = 0;
        set_mig(false);
        break;
    case SIM_FAULT_NVML_STALL:
        nvml_stalls_until_ns = now_ns() + number * 1000000u;
        break;
    case SIM_FAULT_NVML_NA:
        nvml_is_blind = true;
        break;
    case SIM_FAULT_MIG:
        set_mig(true);
        break;
    case SIM_FAULT_ALLOC_FAIL:
        fails_every = number;
        n_allocations = 0;
        break;
    case SIM_FAULT_SLOW_END:
        end_takes_ns = number * 1000000u;
        break;
    case SIM_FAULT_DEVICE_LOST:
        devices_are_lost = true;
        clients_lose_devices();
        break;
    case SIM_FAULT_ONE_LOST:
        lost_devices |= 1u << device;
        clients_lose_device(device);
        break;
    case SIM_FAULT_DEVICE_RESET:
        clients_lose_devices();
        break;
    case SIM_FAULT_XID:
        report_xid(&server.gpus[device], (uint32_t)number);
        break;
    case SIM_FAULT_ECC:
        clients_meet_ecc();
        break;
    case SIM_FAULT_NVML_GONE:
        nvml_is_gone = true;
        clients_lose_nvml();
        break;
    }
}

int fault_start(const char *spec)
{
    struct order orders[MAX_FAULTS];
    unsigned n = spec ? parse(spec, orders) : 0;
    if (spec && !n) return -1;
    for (unsigned i = 0; i < n; i++) fault_set(orders[i].fault, orders[i].device, orders[i].number);
    return 0;
}

uint64_t fault_end_takes_ns(void) { return end_takes_ns; }

uint64_t fault_nvml_until_ns(void) { return nvml_stalls_until_ns; }

bool fault_nvml_is_blind(void) { return nvml_is_blind; }

bool fault_nvml_is_gone(void) { return nvml_is_gone; }

bool fault_devices_are_lost(void) { return devices_are_lost; }

bool fault_is_lost(uint32_t device) { return devices_are_lost || lost_devices >> device & 1; }

/* Only what a program asks for is counted: a test that fails the third allocation means one of the program's own. */
bool fault_fails(uint32_t kind)
{
    if (!fails_every || kind == SIM_CONTEXT || kind == SIM_MODULE || kind >= SIM_ASKED) return false;
    return ++n_allocations % fails_every == 0;
}

/* `fgpu-simd --fault SPEC` */
int fault_send(const char *dir, const char *spec)
{
    struct order orders[MAX_FAULTS];
    struct link link = LINK_INIT;
    unsigned n = parse(spec, orders);
    uint32_t n_devices;
    int rc = 0;
    if (!n) return 2;
    if (link_open(&link, dir, &n_devices)) {
        fprintf(stderr, "fgpu-simd: %s: no server is running here\n", dir);
        return 1;
    }
    for (unsigned i = 0; i < n && !rc; i++) {
        struct sim_request request = {
            .op = SIM_FAULT, .kind = orders[i].fault, .device = orders[i].device, .bytes = orders[i].number};
        int status = link_call(&link, request, NULL, NULL, 0);
        if (status == SIM_OK) continue;
        const char *why = status == SIM_NO_DEVICE ? "there is no such device"
                                                  : "faults are for root, in the server's own pid namespace";
        fprintf(stderr, "fgpu-simd: %s: %s\n", dir, why);
        rc = 1;
    }
    link_close(&link);
    return rc;
}
