/*
 * shim.h: what the shim's files share. Owns no state.
 *
 * The library is loaded into every program of a container. So: the hot paths allocate nothing, nothing here ends,
 * blocks or signals the host program, no descriptor outlives a call, errno is the program's own again when a hook calls
 * the driver.
 */
#ifndef FGPU_SHIM_H
#define FGPU_SHIM_H

/* All versions of every function under its own name; the driver's short names would silently become the newest version.
 */
#define __CUDA_API_VERSION_INTERNAL
#define NVML_NO_UNVERSIONED_FUNC_DEFS
#include <cuda.h>
#include <nvml.h>

#include <stdbool.h>
#include <stdint.h>

#include "fgpu.h"

#define EXPORT __attribute__((visibility("default")))
#define HIDDEN __attribute__((visibility("hidden")))
#define LIKELY(x) __builtin_expect(!!(x), 1)

/* Newer than the headers that we build against. */
typedef struct CUstreamCigCaptureParams_st CUstreamCigCaptureParams;
CUresult cuStreamBeginCaptureToCig(CUstream hStream, CUstreamCigCaptureParams *streamCigCaptureParams);
#if CUDA_VERSION < 13030
typedef void *CUgraphRecaptureCallback;
CUresult cuStreamBeginRecaptureToGraph(CUstream hStream, CUstreamCaptureMode mode, CUgraph hGraph,
                                       CUgraphRecaptureCallback callbackFunc, void *userData);
#endif

/* The driver exports these, the header has them as macros alone: the same for a thread's own default stream. */
#define FGPU_PER_THREAD(name) __typeof__(name) name##_ptsz
FGPU_PER_THREAD(cuMemAllocAsync);
FGPU_PER_THREAD(cuMemAllocFromPoolAsync);
FGPU_PER_THREAD(cuMemFreeAsync);
FGPU_PER_THREAD(cuStreamBeginCapture_v2);
FGPU_PER_THREAD(cuStreamBeginCaptureToGraph);
FGPU_PER_THREAD(cuStreamBeginRecaptureToGraph);
FGPU_PER_THREAD(cuStreamBeginCaptureToCig);
FGPU_PER_THREAD(cuStreamIsCapturing);
FGPU_PER_THREAD(cuStreamSynchronize);
FGPU_PER_THREAD(cuStreamGetDevice);
FGPU_PER_THREAD(cuGraphInstantiateWithParams);
FGPU_PER_THREAD(cuGraphUpload);
FGPU_PER_THREAD(cuGraphLaunch);
FGPU_PER_THREAD(cuLaunchKernel);
FGPU_PER_THREAD(cuLaunchKernelEx);
FGPU_PER_THREAD(cuLaunchCooperativeKernel);
FGPU_PER_THREAD(cuStreamQuery);

/* Newer than the headers that we build against; those that have it will make the compiler say so. */
typedef struct {
    unsigned int pid, isRunning, gpuUtilization, memoryUtilization;
    unsigned long long maxMemoryUsage;
    unsigned int sampleCount;
    unsigned long long sumGpuUtil, sumFbUtil, time, startTime;
} nvmlAccountingStats_v2_t;
nvmlReturn_t nvmlDeviceGetAccountingStats_v2(nvmlDevice_t device, nvmlAccountingStats_v2_t *stats);

/*
 * THE table. HOOK: exported by us and handed out in place of the driver's. ASK: a hook whose mere lookup says hello, so
 * that probes are in place before the first call. NEED: the driver's, for our own use.
 */
#define FGPU_DRIVER_TABLE(HOOK, NEED)                                                                                  \
    HOOK(cuInit)                                                                                                       \
    HOOK(cuGetProcAddress)                                                                                             \
    HOOK(cuGetProcAddress_v2)                                                                                          \
    HOOK(cuMemAlloc_v2)                                                                                                \
    HOOK(cuMemAllocPitch_v2)                                                                                           \
    HOOK(cuMemAllocManaged)                                                                                            \
    HOOK(cuMemCreate)                                                                                                  \
    HOOK(cuMemFree_v2)                                                                                                 \
    HOOK(cuMemRelease)                                                                                                 \
    HOOK(cuMemMap)                                                                                                     \
    HOOK(cuMemUnmap)                                                                                                   \
    HOOK(cuMemRetainAllocationHandle)                                                                                  \
    HOOK(cuArrayDestroy)                                                                                               \
    HOOK(cuMipmappedArrayDestroy)                                                                                      \
    HOOK(cuMemAlloc)                                                                                                   \
    HOOK(cuMemAllocPitch)                                                                                              \
    HOOK(cuArrayCreate)                                                                                                \
    HOOK(cuArrayCreate_v2)                                                                                             \
    HOOK(cuArray3DCreate)                                                                                              \
    HOOK(cuArray3DCreate_v2)                                                                                           \
    HOOK(cuMipmappedArrayCreate)                                                                                       \
    HOOK(cuMemGetInfo)                                                                                                 \
    HOOK(cuDeviceTotalMem)                                                                                             \
    HOOK(cuMemGetInfo_v2)                                                                                              \
    HOOK(cuDeviceTotalMem_v2)                                                                                          \
    HOOK(cuDevicePrimaryCtxRetain)                                                                                     \
    HOOK(cuCtxCreate)                                                                                                  \
    HOOK(cuCtxCreate_v2)                                                                                               \
    HOOK(cuCtxCreate_v3)                                                                                               \
    HOOK(cuCtxCreate_v4)                                                                                               \
    HOOK(cuMemAllocAsync)                                                                                              \
    HOOK(cuMemAllocAsync_ptsz)                                                                                         \
    HOOK(cuMemAllocFromPoolAsync)                                                                                      \
    HOOK(cuMemAllocFromPoolAsync_ptsz)                                                                                 \
    HOOK(cuMemFreeAsync)                                                                                               \
    HOOK(cuMemFreeAsync_ptsz)                                                                                          \
    HOOK(cuCtxSynchronize)                                                                                             \
    HOOK(cuCtxSynchronize_v2)                                                                                          \
    HOOK(cuStreamSynchronize)                                                                                          \
    HOOK(cuStreamSynchronize_ptsz)                                                                                     \
    HOOK(cuEventSynchronize)                                                                                           \
    HOOK(cuMemPoolCreate)                                                                                              \
    HOOK(cuMemPoolDestroy)                                                                                             \
    HOOK(cuMemPoolTrimTo)                                                                                              \
    HOOK(cuDeviceSetMemPool)                                                                                           \
    HOOK(cuMemSetMemPool)                                                                                              \
    HOOK(cuStreamBeginCapture)                                                                                         \
    HOOK(cuStreamBeginCapture_ptsz)                                                                                    \
    HOOK(cuStreamBeginCapture_v2)                                                                                      \
    HOOK(cuStreamBeginCapture_v2_ptsz)                                                                                 \
    HOOK(cuStreamBeginCaptureToGraph)                                                                                  \
    HOOK(cuStreamBeginCaptureToGraph_ptsz)                                                                             \
    HOOK(cuStreamBeginRecaptureToGraph)                                                                                \
    HOOK(cuStreamBeginRecaptureToGraph_ptsz)                                                                           \
    HOOK(cuStreamBeginCaptureToCig)                                                                                    \
    HOOK(cuStreamBeginCaptureToCig_ptsz)                                                                               \
    HOOK(cuGraphInstantiate)                                                                                           \
    HOOK(cuGraphInstantiate_v2)                                                                                        \
    HOOK(cuGraphInstantiateWithFlags)                                                                                  \
    HOOK(cuGraphInstantiateWithParams)                                                                                 \
    HOOK(cuGraphInstantiateWithParams_ptsz)                                                                            \
    HOOK(cuGraphUpload)                                                                                                \
    HOOK(cuGraphUpload_ptsz)                                                                                           \
    HOOK(cuGraphLaunch)                                                                                                \
    HOOK(cuGraphLaunch_ptsz)                                                                                           \
    HOOK(cuGraphExecDestroy)                                                                                           \
    HOOK(cuDeviceGraphMemTrim)                                                                                         \
    HOOK(cuGreenCtxCreate)                                                                                             \
    HOOK(cuDevicePrimaryCtxRelease)                                                                                    \
    HOOK(cuDevicePrimaryCtxRelease_v2)                                                                                 \
    HOOK(cuDevicePrimaryCtxReset)                                                                                      \
    HOOK(cuDevicePrimaryCtxReset_v2)                                                                                   \
    HOOK(cuCtxDestroy)                                                                                                 \
    HOOK(cuCtxDestroy_v2)                                                                                              \
    HOOK(cuGreenCtxDestroy)                                                                                            \
    HOOK(cuLaunchKernel)                                                                                               \
    HOOK(cuLaunchKernel_ptsz)                                                                                          \
    HOOK(cuLaunchKernelEx)                                                                                             \
    HOOK(cuLaunchKernelEx_ptsz)                                                                                        \
    HOOK(cuLaunchCooperativeKernel)                                                                                    \
    HOOK(cuLaunchCooperativeKernel_ptsz)                                                                               \
    HOOK(cuLaunchCooperativeKernelMultiDevice)                                                                         \
    HOOK(cuLaunch)                                                                                                     \
    HOOK(cuLaunchGrid)                                                                                                 \
    HOOK(cuLaunchGridAsync)                                                                                            \
    HOOK(cuGraphAddKernelNode)                                                                                         \
    HOOK(cuGraphAddKernelNode_v2)                                                                                      \
    HOOK(cuGraphAddNode)                                                                                               \
    HOOK(cuGraphAddNode_v2)                                                                                            \
    HOOK(cuGraphKernelNodeSetParams)                                                                                   \
    HOOK(cuGraphKernelNodeSetParams_v2)                                                                                \
    HOOK(cuGraphNodeSetParams)                                                                                         \
    HOOK(cuGraphExecKernelNodeSetParams)                                                                               \
    HOOK(cuGraphExecKernelNodeSetParams_v2)                                                                            \
    HOOK(cuGraphExecNodeSetParams)                                                                                     \
    HOOK(cuCtxSetLimit)                                                                                                \
    HOOK(cuModuleLoad)                                                                                                 \
    HOOK(cuModuleLoadData)                                                                                             \
    HOOK(cuModuleLoadDataEx)                                                                                           \
    HOOK(cuModuleLoadFatBinary)                                                                                        \
    HOOK(cuLibraryLoadData)                                                                                            \
    HOOK(cuLibraryLoadFromFile)                                                                                        \
    HOOK(cuLibraryGetModule)                                                                                           \
    HOOK(cuLibraryGetGlobal)                                                                                           \
    HOOK(cuKernelGetFunction)                                                                                          \
    HOOK(cuModuleUnload)                                                                                               \
    HOOK(cuLibraryUnload)                                                                                              \
    HOOK(cuStreamQuery)                                                                                                \
    HOOK(cuStreamQuery_ptsz)                                                                                           \
    HOOK(cuEventQuery)                                                                                                 \
    HOOK(cuStreamDestroy)                                                                                              \
    HOOK(cuStreamDestroy_v2)                                                                                           \
    NEED(cuDeviceGetAttribute)                                                                                         \
    NEED(cuFuncGetAttribute)                                                                                           \
    NEED(cuKernelGetAttribute)                                                                                         \
    NEED(cuFuncGetModule)                                                                                              \
    NEED(cuKernelGetLibrary)                                                                                           \
    NEED(cuCtxGetDevice)                                                                                               \
    NEED(cuDeviceGetUuid)                                                                                              \
    NEED(cuDeviceGetUuid_v2)                                                                                           \
    NEED(cuDevicePrimaryCtxGetState)                                                                                   \
    NEED(cuMemGetAllocationGranularity)                                                                                \
    NEED(cuDeviceGetDefaultMemPool)                                                                                    \
    NEED(cuDeviceGetMemPool)                                                                                           \
    NEED(cuMemPoolGetAttribute)                                                                                        \
    NEED(cuThreadExchangeStreamCaptureMode)                                                                            \
    NEED(cuStreamIsCapturing)                                                                                          \
    NEED(cuStreamIsCapturing_ptsz)                                                                                     \
    NEED(cuStreamGetDevice)                                                                                            \
    NEED(cuStreamGetDevice_ptsz)                                                                                       \
    NEED(cuGraphGetNodes)                                                                                              \
    NEED(cuGraphNodeGetType)                                                                                           \
    NEED(cuGraphMemAllocNodeGetParams)                                                                                 \
    NEED(cuGraphMemFreeNodeGetParams)                                                                                  \
    NEED(cuGraphChildGraphNodeGetGraph)                                                                                \
    NEED(cuCtxFromGreenCtx)                                                                                            \
    NEED(cuPointerGetAttribute)                                                                                        \
    NEED(cuCtxGetCurrent)                                                                                              \
    NEED(cuCtxPushCurrent_v2)                                                                                          \
    NEED(cuCtxPopCurrent_v2)                                                                                           \
    NEED(cuEventCreate)                                                                                                \
    NEED(cuEventRecord)                                                                                                \
    NEED(cuEventDestroy_v2)                                                                                            \
    NEED(cuDeviceGetGraphMemAttribute)

#define FGPU_NVML_TABLE(HOOK, NEED)                                                                                    \
    HOOK(nvmlInit)                                                                                                     \
    HOOK(nvmlInit_v2)                                                                                                  \
    HOOK(nvmlInitWithFlags)                                                                                            \
    HOOK(nvmlDeviceGetMemoryInfo)                                                                                      \
    HOOK(nvmlDeviceGetMemoryInfo_v2)                                                                                   \
    HOOK(nvmlDeviceGetConfComputeProtectedMemoryUsage)                                                                 \
    HOOK(nvmlDeviceGetComputeRunningProcesses)                                                                         \
    HOOK(nvmlDeviceGetComputeRunningProcesses_v2)                                                                      \
    HOOK(nvmlDeviceGetComputeRunningProcesses_v3)                                                                      \
    HOOK(nvmlDeviceGetGraphicsRunningProcesses)                                                                        \
    HOOK(nvmlDeviceGetGraphicsRunningProcesses_v2)                                                                     \
    HOOK(nvmlDeviceGetGraphicsRunningProcesses_v3)                                                                     \
    HOOK(nvmlDeviceGetMPSComputeRunningProcesses)                                                                      \
    HOOK(nvmlDeviceGetMPSComputeRunningProcesses_v2)                                                                   \
    HOOK(nvmlDeviceGetMPSComputeRunningProcesses_v3)                                                                   \
    HOOK(nvmlDeviceGetProcessUtilization)                                                                              \
    HOOK(nvmlDeviceGetProcessesUtilizationInfo)                                                                        \
    HOOK(nvmlDeviceGetRunningProcessDetailList)                                                                        \
    HOOK(nvmlDeviceGetEncoderSessions)                                                                                 \
    HOOK(nvmlDeviceGetFBCSessions)                                                                                     \
    HOOK(nvmlDeviceGetAccountingPids)                                                                                  \
    HOOK(nvmlDeviceGetAccountingStats)                                                                                 \
    HOOK(nvmlDeviceGetAccountingStats_v2)                                                                              \
    NEED(nvmlDeviceGetUUID)

#define FGPU_ENUM(name) FGPU_AT_##name,
enum fgpu_name { FGPU_DRIVER_TABLE(FGPU_ENUM, FGPU_ENUM) FGPU_NVML_TABLE(FGPU_ENUM, FGPU_ENUM) FGPU_NAMES };
#undef FGPU_ENUM

/* The driver's own function, typed; NULL when this driver lacks it. */
#define REAL(name) ((__typeof__(&name))fgpu_real(FGPU_AT_##name))

/* -- hooks.c */
HIDDEN void *fgpu_real(enum fgpu_name at);
HIDDEN void *fgpu_symbol(void *library, enum fgpu_name at);
HIDDEN void *fgpu_open_loaded(const char *path); /* NULL: it is not loaded */
HIDDEN void fgpu_close(void *library);
extern HIDDEN void *(*fgpu_real_dlsym)(void *, const char *);

/* -- beside.c: a further driver in the same process */
extern HIDDEN __thread bool fgpu_beside __attribute__((tls_model("initial-exec"))); /* it is called, not the first */
HIDDEN void *fgpu_real_beside(enum fgpu_name at);
HIDDEN void *fgpu_entry_beside(enum fgpu_name at);             /* NULL: left to the driver */
HIDDEN void *fgpu_hook_beside(enum fgpu_name at, void *found); /* NULL: likewise, or it is not the driver's */

/* -- link.c: hello, pages, state */
enum fgpu_link { FGPU_FRESH, FGPU_OPEN, FGPU_CLOSED, FGPU_UNMANAGED, FGPU_HELD }; /* HELD: managed */
struct fgpu_view {
    enum fgpu_link link;
    unsigned levels;
    bool cooperative;                        /* by the books of this container; the pages are made from them */
    const struct fgpu_control_page *control; /* NULL unless FREE or HELD */
    const struct fgpu_usage_page *usage;     /* levels of them, leaf first; NULL unless HELD */
    struct fgpu_status_page *status;         /* NULL unless HELD */
};
HIDDEN int fgpu_announce(void);            /* hello, not waited for: what fgpu_arrive wants, as it is */
HIDDEN void fgpu_arrive(int announced);    /* waits for its answer */
HIDDEN struct fgpu_view fgpu_look(void);   /* hello if nobody has or it is due; says once when nothing is enforced */
HIDDEN struct fgpu_view fgpu_glance(void); /* what is known: says nothing to anybody, reads no clock */
HIDDEN struct fgpu_view fgpu_insist(void); /* hello again: the probes did not answer */
HIDDEN uint64_t fgpu_ticket(void);
HIDDEN uint64_t fgpu_clock(int which); /* a clock of Linux, in ns */
HIDDEN uint64_t fgpu_now(void);

/* -- verdict.c. A verdict, or -1: the kernel does not answer. */
HIDDEN int fgpu_ask(struct fgpu_view view, unsigned device, uint64_t bytes, unsigned kind, uint64_t ticket);

/* -- admit.c */
HIDDEN int fgpu_index(const struct fgpu_control_page *control, CUdevice device); /* the ledger's, or -1 */
HIDDEN bool fgpu_current(CUdevice *device);                                      /* that of the current context */
HIDDEN int fgpu_index_of_uuid(const struct fgpu_control_page *control, const uint8_t uuid[16]);

HIDDEN bool fgpu_is_limited(struct fgpu_view view); /* a limit may be in force: asked is then what will be taken */

/* -- view.c */
HIDDEN int fgpu_nvml_index(struct fgpu_view view, nvmlDevice_t device);
/* A level that only counts: nothing may look other than without it. */
static inline bool fgpu_observes(const struct fgpu_usage_page *page)
{
    return __atomic_load_n(&page->flags, __ATOMIC_RELAXED) & FGPU_OBSERVE;
}

/* One bit for each of the ledger's devices: some level's limit does not count against it yet, so it cannot be had. */
static inline uint64_t fgpu_uncommitted(struct fgpu_view view)
{
    uint64_t flags = 0;
    for (unsigned level = 0; level < view.levels; level++)
        flags |= __atomic_load_n(&view.usage[level].flags, __ATOMIC_RELAXED);
    return flags >> FGPU_UNCOMMITTED_SHIFT;
}

/* -- probe.S: the same addresses as the exported symbols, under names that nobody can interpose */
HIDDEN void fgpu_admit_here(unsigned device, uint64_t bytes, unsigned kind, uint64_t ticket);
HIDDEN void fgpu_release_here(unsigned device, uint64_t bytes, unsigned kind, uint64_t ticket);
HIDDEN void fgpu_settle_here(uint64_t handle, uint64_t bytes, unsigned result, uint64_t ticket);

#endif
