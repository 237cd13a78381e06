/* hook_table.h: which functions of the driver and of NVML the shim hooks or calls. */
#ifndef FGPU_HOOK_TABLE_H
#define FGPU_HOOK_TABLE_H

#include "base/shim.h"

/* These functions are newer than the headers that the shim is compiled with. */
typedef struct CUstreamCigCaptureParams_st CUstreamCigCaptureParams;
CUresult cuStreamBeginCaptureToCig(CUstream hStream, CUstreamCigCaptureParams *streamCigCaptureParams);
#if CUDA_VERSION < 13030
typedef void *CUgraphRecaptureCallback;
CUresult cuStreamBeginRecaptureToGraph(CUstream hStream, CUstreamCaptureMode mode, CUgraph hGraph,
                                       CUgraphRecaptureCallback callbackFunc, void *userData);
#endif

/* The driver exports these variants, for which NULL means the default stream of the thread. The header declares them
 * only by macros. */
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
FGPU_PER_THREAD(cuEventRecord);
FGPU_PER_THREAD(cuEventRecordWithFlags);

/* This type is newer than the headers that the shim is compiled with. With a header that has it, the compiler reports a
 * redefinition. */
typedef struct {
    unsigned int pid, isRunning, gpuUtilization, memoryUtilization;
    unsigned long long maxMemoryUsage;
    unsigned int sampleCount;
    unsigned long long sumGpuUtil, sumFbUtil, time, startTime;
} nvmlAccountingStats_v2_t;
nvmlReturn_t nvmlDeviceGetAccountingStats_v2(nvmlDevice_t device, nvmlAccountingStats_v2_t *stats);

/*
 * The table. HOOK: the shim exports the function and returns it to programs instead of the driver's. NEED: a function
 * of the driver that the shim calls.
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
    HOOK(cuMemImportFromShareableHandle)                                                                               \
    HOOK(cuIpcCloseMemHandle)                                                                                          \
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
    HOOK(cuEventElapsedTime)                                                                                           \
    HOOK(cuEventElapsedTime_v2)                                                                                        \
    HOOK(cuDeviceGetName)                                                                                              \
    HOOK(cuEventRecord)                                                                                                \
    HOOK(cuEventRecord_ptsz)                                                                                           \
    HOOK(cuEventRecordWithFlags)                                                                                       \
    HOOK(cuEventRecordWithFlags_ptsz)                                                                                  \
    HOOK(cuEventCreate)                                                                                                \
    HOOK(cuIpcOpenEventHandle)                                                                                         \
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

/* The driver's own function, typed; NULL if this driver lacks it. */
#define REAL(name) ((__typeof__(&name))fgpu_real(FGPU_AT_##name))

/* -- driver.c */
HIDDEN void *fgpu_real(enum fgpu_name at);

/* -- second_driver.c: whether this thread calls the second driver of the process instead of the first */
extern HIDDEN __thread bool fgpu_calls_second __attribute__((tls_model("initial-exec")));

#endif
