/* One cooperative kernel on several devices, in one call. The call launches it on all of them or on none. */
#include "cuda/async/async.h"

static struct stream *find_anywhere(CUstream handle)
{
    for (struct context *c = driver.contexts; c; c = c->next)
        for (struct stream *s = c->streams; s; s = s->next)
            if (c->alive && s == (struct stream *)handle) return s;
    return NULL;
}

/* Checks that each kernel can be launched, on its own device. CUDA also requires equal shapes, which is not checked. */
static CUresult check(const CUDA_LAUNCH_PARAMS *list, unsigned n, struct stream **streams, struct kernel_run *runs)
{
    for (unsigned i = 0; i < n; i++) {
        const CUDA_LAUNCH_PARAMS *p = &list[i];
        struct shape shape = {
            {p->gridDimX, p->gridDimY, p->gridDimZ}, {p->blockDimX, p->blockDimY, p->blockDimZ}, p->sharedMemBytes};
        streams[i] = find_anywhere(p->hStream);
        if (!streams[i]) return CUDA_ERROR_INVALID_HANDLE;
        for (unsigned k = 0; k < i; k++)
            if (streams[k]->context->device == streams[i]->context->device) return CUDA_ERROR_INVALID_DEVICE;
        if (streams[i]->capture) {
            capture_break(streams[i]->capture);
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
        CUresult result = kernel_check(streams[i]->context, p->function, &shape, true, &runs[i]);
        if (result) return result;
        runs[i].party = (struct party){0}; /* the kernels are launched together by this call */
    }
    return CUDA_SUCCESS;
}

/* Makes every stream wait until the last of them is ready. */
static void meet(struct stream *const *streams, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        for (unsigned k = 0; k < n; k++) {
            const struct context *other = streams[k]->context;
            uint64_t ready = context_translate(other, streams[i]->context, stream_ready(other, streams[k]));
            if (ready > streams[i]->done_ns) streams[i]->done_ns = ready;
        }
    }
}

API cuLaunchCooperativeKernelMultiDevice(CUDA_LAUNCH_PARAMS *launchParamsList, unsigned int numDevices,
                                         unsigned int flags)
{
    struct stream *streams[SIM_MAX_DEVICES];
    struct kernel_run runs[SIM_MAX_DEVICES];
    if (!__atomic_load_n(&driver.ready, __ATOMIC_ACQUIRE)) return CUDA_ERROR_NOT_INITIALIZED;
    if (!launchParamsList || !numDevices || numDevices > driver.n_devices || flags & ~3u)
        return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; i < numDevices; i++) /* the real driver makes this check before it detects a forked child */
        if (!launchParamsList[i].hStream) return CUDA_ERROR_INVALID_HANDLE;
    CUresult result = sim_enter_init();
    if (result) return result;
    result = check(launchParamsList, numDevices, streams, runs);
    if (!result) meet(streams, numDevices);
    for (unsigned i = 0; i < numDevices && !result; i++)
        result = kernel_begin(streams[i]->context, streams[i], &runs[i]);
    return sim_leave(result);
}
