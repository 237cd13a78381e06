/* cuCheckpointProcess*: what this process does with another. The server decides and waits. No call takes the lock of
 * this process, because a call may last for seconds. */
#include "cuda/core/driver.h"

#include <errno.h>
#include <signal.h>
#include <string.h>

static CUresult ask_with(struct sim_request request, int pid, uint32_t *result)
{
    if (!sim_is_ready()) return CUDA_ERROR_NOT_INITIALIZED;
    if (pid <= 0) return CUDA_ERROR_OPERATING_SYSTEM;
    request.requested = (uint64_t)pid;
    uint32_t unread;
    switch (sim_ask(SIM_CHECKPOINT, request, result ? result : &unread, sizeof unread)) {
    case SIM_OK:
        return CUDA_SUCCESS;
    case SIM_NO_PROCESS: /* a process that has not called cuInit, or none */
        return !kill(pid, 0) || errno == EPERM ? CUDA_ERROR_NOT_INITIALIZED : CUDA_ERROR_OPERATING_SYSTEM;
    case SIM_NO_MEMORY:
        return CUDA_ERROR_OUT_OF_MEMORY;
    case SIM_NO_DEVICE:
        return CUDA_ERROR_INVALID_VALUE;
    case SIM_ILLEGAL_STATE:
        return CUDA_ERROR_ILLEGAL_STATE;
    case SIM_NOT_READY:
        return CUDA_ERROR_NOT_READY;
    case SIM_NOT_SUPPORTED:
        return CUDA_ERROR_NOT_SUPPORTED;
    default:
        return CUDA_ERROR_OPERATING_SYSTEM;
    }
}

static CUresult ask(enum sim_checkpoint call, int pid, unsigned milliseconds, uint32_t *result)
{
    return ask_with((struct sim_request){.kind = call, .bytes = milliseconds}, pid, result);
}

static bool is_zero(const void *bytes, size_t size)
{
    for (size_t i = 0; i < size; i++)
        if (((const char *)bytes)[i]) return false;
    return true;
}

API cuCheckpointProcessGetState(int pid, CUprocessState *state)
{
    uint32_t value;
    if (!sim_is_ready()) return CUDA_ERROR_NOT_INITIALIZED;
    CUresult result = state ? ask(SIM_GET_STATE, pid, 0, &value) : CUDA_ERROR_INVALID_VALUE;
    if (!result) *state = (CUprocessState)value;
    return result;
}

API cuCheckpointProcessGetRestoreThreadId(int pid, int *tid)
{
    uint32_t value;
    if (!sim_is_ready()) return CUDA_ERROR_NOT_INITIALIZED;
    CUresult result = tid ? ask(SIM_GET_THREAD, pid, 0, &value) : CUDA_ERROR_INVALID_VALUE;
    if (!result) *tid = (int)value;
    return result;
}

API cuCheckpointProcessLock(int pid, CUcheckpointLockArgs *args)
{
    if (!sim_is_ready()) return CUDA_ERROR_NOT_INITIALIZED;
    if (args && (args->reserved0 || !is_zero(args->reserved1, sizeof args->reserved1))) return CUDA_ERROR_INVALID_VALUE;
    return ask(SIM_LOCK, pid, args ? args->timeoutMs : 0, NULL);
}

API cuCheckpointProcessCheckpoint(int pid, CUcheckpointCheckpointArgs *args)
{
    if (!sim_is_ready()) return CUDA_ERROR_NOT_INITIALIZED;
    if (args && !is_zero(args, sizeof *args)) return CUDA_ERROR_INVALID_VALUE;
    return ask(SIM_PARK, pid, 0, NULL);
}

/* Returns the index of a device; n_devices: there is none with this UUID. */
static uint32_t device_of(const CUuuid *uuid)
{
    uint32_t i = 0;
    while (i < driver.n_devices && memcmp(uuid->bytes, driver.devices[i].uuid_bytes, sizeof uuid->bytes)) i++;
    return i;
}

/* The pairs have to name each device once as the old one and once as the new one, also devices that are hidden by
 * CUDA_VISIBLE_DEVICES, and those that stay (driver 580). */
API cuCheckpointProcessRestore(int pid, CUcheckpointRestoreArgs *args)
{
    struct sim_request request = {.kind = SIM_RESTORE};
    uint32_t left = 0, taken = 0;
    if (!sim_is_ready()) return CUDA_ERROR_NOT_INITIALIZED;
    if (args && (args->reserved1 || !is_zero(args->reserved, sizeof args->reserved) ||
                 (args->gpuPairsCount && !args->gpuPairs)))
        return CUDA_ERROR_INVALID_VALUE;
    request.parties = args ? args->gpuPairsCount : 0;
    if (request.parties && request.parties != driver.n_devices) return CUDA_ERROR_INVALID_VALUE;
    for (uint32_t i = 0; i < request.parties; i++) {
        uint32_t from = device_of(&args->gpuPairs[i].oldUuid), to = device_of(&args->gpuPairs[i].newUuid);
        left |= 1u << from;
        taken |= 1u << to;
        if (from < driver.n_devices) request.key |= (uint64_t)to << SIM_PLACE_BITS * from;
    }
    if (request.parties && (left & taken) != (1u << driver.n_devices) - 1) return CUDA_ERROR_INVALID_VALUE;
    return ask_with(request, pid, NULL);
}

API cuCheckpointProcessUnlock(int pid, CUcheckpointUnlockArgs *args)
{
    if (!sim_is_ready()) return CUDA_ERROR_NOT_INITIALIZED;
    if (args && !is_zero(args, sizeof *args)) return CUDA_ERROR_INVALID_VALUE;
    return ask(SIM_UNLOCK, pid, 0, NULL);
}
