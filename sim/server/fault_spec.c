/* Specifications of faults, for `fgpu-simd --fault` and FGPU_SIM_FAULT. */
#include "server/state.h"
#include "wire/link.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_STALL_MS 3600000u
#define MAX_XID 1023u

/* Parses `60s` or `500ms` to milliseconds; 0: it is neither. */
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

/* Parses `79`, of the first device, or `79:1`; number 0: it is neither. */
static struct fault_order parse_xid(const char *text)
{
    unsigned xid = 0, device = 0;
    int alone = 0, with_device = 0;
    int n = sscanf(text, "%4u%n:%2u%n", &xid, &alone, &device, &with_device);
    bool is_right = n > 0 && !text[n == 2 ? with_device : alone] && xid <= MAX_XID && device < SIM_MAX_DEVICES;
    return (struct fault_order){SIM_FAULT_XID, is_right ? xid : 0, device};
}

/* Parses the number of a device after the name of a fault. */
static bool parse_device(const char *text, struct fault_order *order)
{
    int n = 0;
    bool is_right = sscanf(text, "%2u%n", &order->device, &n) == 1 && !text[n] && text[0] != '-';
    return is_right && order->device < SIM_MAX_DEVICES;
}

/* Parses `lock`, or `lock:2` for the second call from now on, after the name of a fault of cuCheckpointProcess*. */
static bool parse_call(const char *text, enum sim_fault fault, struct fault_order *order)
{
    static const char *const names[SIM_CHECKPOINTS] = {"state", "thread", "lock", "checkpoint", "restore", "unlock"};
    const char *colon = strchrnul(text, ':');
    *order = (struct fault_order){.fault = fault, .number = *colon ? parse_count(colon + 1) : UINT64_MAX};
    for (; order->device < SIM_CHECKPOINTS; order->device++) {
        const char *name = names[order->device];
        if (strlen(name) == (size_t)(colon - text) && !strncmp(name, text, strlen(name))) return order->number > 0;
    }
    return false;
}

static bool parse_one(const char *word, struct fault_order *order)
{
    *order = (struct fault_order){.number = 1};
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
    } else if (!strcmp(word, "nvml-cut")) {
        order->fault = SIM_FAULT_NVML_CUT;
    } else if (!strncmp(word, "nvml-stall:", 11)) {
        *order = (struct fault_order){.fault = SIM_FAULT_NVML_STALL, .number = parse_time(word + 11)};
    } else if (!strncmp(word, "slow-end:", 9)) {
        *order = (struct fault_order){.fault = SIM_FAULT_SLOW_END, .number = parse_time(word + 9)};
    } else if (!strncmp(word, "alloc-fail:", 11)) {
        *order = (struct fault_order){.fault = SIM_FAULT_ALLOC_FAIL, .number = parse_count(word + 11)};
    } else if (!strncmp(word, "call-fails:", 11)) {
        return parse_call(word + 11, SIM_FAULT_CALL_FAILS, order);
    } else if (!strncmp(word, "call-hangs:", 11)) {
        return parse_call(word + 11, SIM_FAULT_CALL_HANGS, order);
    } else if (!strncmp(word, "call-loses:", 11)) {
        return parse_call(word + 11, SIM_FAULT_CALL_LOSES, order);
    } else if (!strncmp(word, "xid=", 4)) {
        *order = parse_xid(word + 4);
    } else {
        return false;
    }
    return order->number > 0;
}

/* Orders are separated by commas. */
unsigned fault_parse(const char *spec, struct fault_order *orders)
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
                "fgpu-simd: fault is none of nvml-stall:60s, nvml-na, nvml-gone, nvml-cut, mig, alloc-fail:N, "
                "slow-end:3s, device-reset, device-lost[:DEVICE], ecc, xid=79[:DEVICE], call-fails:lock[:N], "
                "call-hangs:lock, call-loses:lock (or state, thread, checkpoint, restore, unlock), reset: %s\n",
                spec);
    return n;
}

/* `fgpu-simd --fault SPEC` */
int fault_send(const char *dir, const char *spec)
{
    struct fault_order orders[MAX_FAULTS];
    struct link link = LINK_INIT;
    unsigned n = fault_parse(spec, orders);
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
