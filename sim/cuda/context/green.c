/* Green contexts: parts of a device's multiprocessors, inside its primary context. They take no memory, and run no work
 * here. */
#include "cuda/context/context.h"

#include <stdlib.h>
#include <string.h>

#define PART 8u /* multiprocessors: the smallest part of a Hopper, and the unit of larger parts */

struct description { /* never freed: CUDA has no call for that */
    struct description *next;
};

struct green {
    int device;
    struct green *next;
};

static struct description *descriptions;
static struct green *greens;

static CUdevResource resource(unsigned count)
{
    CUdevResource made;
    memset(&made, 0, sizeof made);
    made.type = CU_DEV_RESOURCE_TYPE_SM;
    made.sm = (CUdevSmResource){.smCount = count, .minSmPartitionSize = PART, .smCoscheduledAlignment = PART};
    return made;
}

API cuDeviceGetDevResource(CUdevice device, CUdevResource *out, CUdevResourceType type)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!out) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!sim_is_device(device)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    if (type != CU_DEV_RESOURCE_TYPE_SM) return sim_leave(CUDA_ERROR_INVALID_RESOURCE_TYPE);
    *out = resource((unsigned)driver.devices[device].attributes[CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT]);
    return sim_leave(CUDA_SUCCESS);
}

/* Without an array for the groups, returns how many there could be. */
API cuDevSmResourceSplitByCount(CUdevResource *groups, unsigned int *n, const CUdevResource *input,
                                CUdevResource *remaining, unsigned int flags, unsigned int least)
{
    if (!n || !input || flags & ~3u) return CUDA_ERROR_INVALID_VALUE;
    if (input->type != CU_DEV_RESOURCE_TYPE_SM) return CUDA_ERROR_INVALID_RESOURCE_TYPE;
    unsigned each = least ? (least + PART - 1) / PART * PART : PART, most = input->sm.smCount / each;
    if (!most) return CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION;
    if (groups && *n < most) most = *n;
    for (unsigned i = 0; groups && i < most; i++) groups[i] = resource(each);
    if (remaining) *remaining = resource(input->sm.smCount - most * each);
    *n = most;
    return CUDA_SUCCESS;
}

API cuDevResourceGenerateDesc(CUdevResourceDesc *out, CUdevResource *resources, unsigned int n)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!out || !resources || !n) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    for (unsigned i = 0; i < n; i++)
        if (resources[i].type != CU_DEV_RESOURCE_TYPE_SM) return sim_leave(CUDA_ERROR_INVALID_RESOURCE_TYPE);
    struct description *description = calloc(1, sizeof *description);
    if (!description) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    description->next = descriptions;
    descriptions = description;
    *out = (CUdevResourceDesc)description;
    return sim_leave(CUDA_SUCCESS);
}

static bool is_description(const void *handle)
{
    for (const struct description *d = descriptions; d; d = d->next)
        if (d == handle) return true;
    return false;
}

API cuGreenCtxCreate(CUgreenCtx *out, CUdevResourceDesc desc, CUdevice dev, unsigned int flags)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!out || !is_description(desc) || flags != CU_GREEN_CTX_DEFAULT_STREAM)
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!sim_is_device(dev)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    struct green *green = calloc(1, sizeof *green);
    result = green ? primary_retain(dev) : CUDA_ERROR_OUT_OF_MEMORY;
    if (result) {
        free(green);
        return sim_leave(result);
    }
    *green = (struct green){dev, greens};
    greens = green;
    *out = (CUgreenCtx)green;
    return sim_leave(CUDA_SUCCESS);
}

API cuGreenCtxDestroy(CUgreenCtx handle)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct green **at = &greens;
    while (*at && *at != (struct green *)handle) at = &(*at)->next;
    struct green *green = *at;
    if (!green) return sim_leave(CUDA_ERROR_INVALID_CONTEXT);
    *at = green->next;
    primary_leave(green->device);
    free(green);
    return sim_leave(CUDA_SUCCESS);
}
