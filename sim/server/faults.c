/* Faults on request, so that tests can check how programs react to a failing driver. The server's environment sets them
 * at its start, or root sets them on a running server. */
#include "server/state.h"

#include <string.h>

static uint64_t nvml_stalls_until_ns, fails_every, n_allocations, end_takes_ns;
static bool nvml_is_blind, nvml_is_gone, devices_are_lost;
static uint32_t lost_devices;                                          /* one bit each */
static uint64_t call_fails[SIM_CHECKPOINTS], n_calls[SIM_CHECKPOINTS]; /* call_fails: 0: never; UINT64_MAX: each time */
static uint32_t calls_that_hang, calls_that_lose;                      /* one bit each */

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

void fault_record(uint32_t fault, uint32_t device, uint64_t number)
{
    switch (fault) {
    case SIM_FAULT_RESET:
        nvml_stalls_until_ns = fails_every = end_takes_ns = 0;
        nvml_is_blind = nvml_is_gone = devices_are_lost = false;
        lost_devices = calls_that_hang = calls_that_lose = 0;
        memset(call_fails, 0, sizeof call_fails);
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
        break;
    case SIM_FAULT_ONE_LOST:
        lost_devices |= 1u << device;
        break;
    case SIM_FAULT_XID:
        report_xid(&server.gpus[device], (uint32_t)number);
        break;
    case SIM_FAULT_NVML_GONE:
        nvml_is_gone = true;
        break;
    case SIM_FAULT_CALL_FAILS:
        call_fails[device] = number;
        n_calls[device] = 0;
        break;
    case SIM_FAULT_CALL_HANGS:
        calls_that_hang |= 1u << device;
        break;
    case SIM_FAULT_CALL_LOSES:
        calls_that_lose |= 1u << device;
        break;
    }
}

uint64_t fault_end_takes_ns(void) { return end_takes_ns; }

uint64_t fault_nvml_until_ns(void) { return nvml_stalls_until_ns; }

bool fault_nvml_is_blind(void) { return nvml_is_blind; }

bool fault_nvml_is_gone(void) { return nvml_is_gone; }

bool fault_devices_are_lost(void) { return devices_are_lost; }

bool fault_is_lost(uint32_t device) { return devices_are_lost || lost_devices >> device & 1; }

bool fault_call_fails(uint32_t call) { return call_fails[call] == UINT64_MAX || ++n_calls[call] == call_fails[call]; }

bool fault_call_hangs(uint32_t call) { return calls_that_hang >> call & 1; }

bool fault_call_loses(uint32_t call) { return calls_that_lose >> call & 1; }

/* Counts only requests of the program, because a test in which the third allocation fails means the program's own
 * allocations. */
bool fault_fails(uint32_t kind)
{
    if (!fails_every || kind == SIM_CONTEXT || kind == SIM_MODULE || kind >= SIM_ASKED) return false;
    return ++n_allocations % fails_every == 0;
}
