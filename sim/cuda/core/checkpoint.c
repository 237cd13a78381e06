/* cuCheckpointProcess*: what this process does with another. The server decides and waits. No call takes the lock of
 * this process, because a call may last for seconds. */
#include "cuda/core/driver.h"

#include <errno.h>
#include <signal.h>
#include <string.h>

static CUresult ask(enum sim_checkpoint call, int pid, unsigned milliseconds, uint32_t *result)
{
    if (!sim_is_ready()) return CUDA_ERROR_NOT_INITIALIZED;
    if (pid <= 0) return CUDA_ERROR_OPERATING_SYSTEM;
    struct sim_request request = {.kind = call, .requested = (uint64_t)pid, .bytes = milliseconds};
    uint32_t unread;
    switch (sim_ask(SIM_CHECKPOINT, request, result ? result : &unread, sizeof unread)) {
    case SIM_OK:
        return CUDA_SUCCESS;
    case SIM_NO_PROCESS: /* a process that has not called cuInit, or none */
        return !kill(pid, 0) || errno == EPERM ? CUDA_ERROR_NOT_INITIALIZED : CUDA_ERROR_OPERATING_SYSTEM;
    case SIM_NO_MEMORY:
        return CUDA_ERROR_OUT_OF_MEMORY;
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

/* The simulated driver restores a process only to the devices that it had. */
API cuCheckpointProcessRestore(int pid, CUcheckpointRestoreArgs *args)
{
    if (!sim_is_ready()) return CUDA_ERROR_NOT_INITIALIZED;
    if (args && (args->reserved1 || !is_zero(args->reserved, sizeof args->reserved) ||
                 (args->gpuPairsCount && !args->gpuPairs)))
        return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; args && i < args->gpuPairsCount; i++)
        if (memcmp(&args->gpuPairs[i].oldUuid, &args->gpuPairs[i].newUuid, sizeof(CUuuid)))
            return CUDA_ERROR_NOT_SUPPORTED;
    return ask(SIM_RESTORE, pid, 0, NULL);
}

API cuCheckpointProcessUnlock(int pid, CUcheckpointUnlockArgs *args)
{
    if (!sim_is_ready()) return CUDA_ERROR_NOT_INITIALIZED;
    if (args && !is_zero(args, sizeof *args)) return CUDA_ERROR_INVALID_VALUE;
    return ask(SIM_UNLOCK, pid, 0, NULL);
}
