/*
 * launch.c: calls that launch kernels. Owns nothing: gate.c decides whether they may proceed now.
 */
#include "code/local_memory.h"
#include "gate/gate.h"

/* Request the memory of a first launch before the launch reaches the gate: a launch that waits for memory must not hold
 * a turn. */
#define PASS(name, function, enter, ...)                                                                               \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        struct fgpu_launch launch = {.index = -1};                                                                     \
        struct fgpu_first first;                                                                                       \
        bool is_known = fgpu_function_is_known(function);                                                              \
        CUresult result = LIKELY(is_known) ? CUDA_SUCCESS : fgpu_first_begins(&first, function);                       \
        if (result) return result;                                                                                     \
        if (!LIKELY(!fgpu_is_gated())) enter;                                                                          \
        result = driver(__VA_ARGS__);                                                                                  \
        if (!LIKELY(is_known)) fgpu_first_ends(&first, result);                                                        \
        return LIKELY(launch.index < 0) ? result : fgpu_gate_leave(&launch, result);                                   \
    } while (0)

#define LAUNCH(name, function, stream, per_thread, ...)                                                                \
    PASS(name, function, fgpu_gate_enter(&launch, stream, per_thread, NULL), __VA_ARGS__)

#define KERNEL(name, per_thread)                                                                                       \
    EXPORT CUresult name(CUfunction f, unsigned int gridDimX, unsigned int gridDimY, unsigned int gridDimZ,            \
                         unsigned int blockDimX, unsigned int blockDimY, unsigned int blockDimZ,                       \
                         unsigned int sharedMemBytes, CUstream hStream, void **kernelParams, void **extra)             \
    {                                                                                                                  \
        LAUNCH(name, f, hStream, per_thread, f, gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ,         \
               sharedMemBytes, hStream, kernelParams, extra);                                                          \
    }
KERNEL(cuLaunchKernel, false)
KERNEL(cuLaunchKernel_ptsz, true)

#define KERNEL_EX(name, per_thread)                                                                                    \
    EXPORT CUresult name(const CUlaunchConfig *config, CUfunction f, void **kernelParams, void **extra)                \
    {                                                                                                                  \
        LAUNCH(name, f, config ? config->hStream : NULL, per_thread, config, f, kernelParams, extra);                  \
    }
KERNEL_EX(cuLaunchKernelEx, false)
KERNEL_EX(cuLaunchKernelEx_ptsz, true)

#pragma GCC optimize("Os") /* rarely called, from here on */

#define COOPERATIVE(name, per_thread)                                                                                  \
    EXPORT CUresult name(CUfunction f, unsigned int gridDimX, unsigned int gridDimY, unsigned int gridDimZ,            \
                         unsigned int blockDimX, unsigned int blockDimY, unsigned int blockDimZ,                       \
                         unsigned int sharedMemBytes, CUstream hStream, void **kernelParams)                           \
    {                                                                                                                  \
        LAUNCH(name, f, hStream, per_thread, f, gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ,         \
               sharedMemBytes, hStream, kernelParams);                                                                 \
    }
COOPERATIVE(cuLaunchCooperativeKernel, false)
COOPERATIVE(cuLaunchCooperativeKernel_ptsz, true)

/* Launch one kernel on several devices: wait at the gate of each in turn, and count the launch there. The tenant has
 * the turn on all of them at the same time, or on none. Local memory is not requested for this call, because only one
 * of its contexts can be current: the agent charges that memory when NVML shows it. */
EXPORT CUresult cuLaunchCooperativeKernelMultiDevice(CUDA_LAUNCH_PARAMS *launchParamsList, unsigned int numDevices,
                                                     unsigned int flags)
{
    __typeof__(&cuLaunchCooperativeKernelMultiDevice) driver = REAL(cuLaunchCooperativeKernelMultiDevice);
    struct fgpu_launch launches[FGPU_DEVICES];
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (LIKELY(!fgpu_is_gated()) || !launchParamsList || numDevices > FGPU_DEVICES)
        return driver(launchParamsList, numDevices, flags);
    for (unsigned i = 0; i < numDevices; i++) fgpu_gate_enter(&launches[i], launchParamsList[i].hStream, false, NULL);
    CUresult result = driver(launchParamsList, numDevices, flags);
    for (unsigned i = 0; i < numDevices; i++) fgpu_gate_leave(&launches[i], result);
    return result;
}

/* The oldest calls are never captured: if a capture permits them they run at once, in any stream. No event can be
 * recorded after them in a stream that captures, so they count as launches of the thread's own stream. */
static void enter_uncaptured(struct fgpu_launch *launch, CUstream stream)
{
    bool captures = fgpu_is_capturing(stream, false);
    fgpu_gate_enter(launch, captures ? CU_STREAM_PER_THREAD : stream, captures, NULL);
}

EXPORT CUresult cuLaunch(CUfunction f) { PASS(cuLaunch, f, enter_uncaptured(&launch, NULL), f); }

EXPORT CUresult cuLaunchGrid(CUfunction f, int grid_width, int grid_height)
{
    PASS(cuLaunchGrid, f, enter_uncaptured(&launch, NULL), f, grid_width, grid_height);
}

EXPORT CUresult cuLaunchGridAsync(CUfunction f, int grid_width, int grid_height, CUstream hStream)
{
    PASS(cuLaunchGridAsync, f, enter_uncaptured(&launch, hStream), f, grid_width, grid_height, hStream);
}
