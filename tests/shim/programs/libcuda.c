/* A stand-in for the driver, with the functions that tests call. Counts calls. With -DOLD it lacks later functions. */
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <errno.h>
#include <string.h>

static int calls;
static int context = 1, active;
static CUresult next_result;
static int changes_errno;

int fake_calls(void) { return calls; }
void fake_context(int device) { context = device; }
int fake_device(void) { return context > 0 ? context - 1 : 0; }
void fake_active(int on) { active = on; }
void fake_result(int result) { next_result = (CUresult)result; }
void fake_errno(int e) { changes_errno = e; }

static CUresult count(void)
{
    calls++;
    if (changes_errno) errno = changes_errno;
    return next_result;
}

static const size_t total = 16ull << 30, available = 10ull << 30;

static void (*during_init)(void);
void fake_during_init(void (*what)(void)) { during_init = what; }
CUresult cuInit(unsigned flags)
{
    if (during_init) during_init();
    return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice *device)
{
    errno = 33; /* must not reach the program, because the shim makes this call for itself */
    if (context <= 0) return CUDA_ERROR_INVALID_CONTEXT;
    *device = context - 1;
    return CUDA_SUCCESS;
}
#ifdef OLD
#define cuDeviceGetUuid_v2 cuDeviceGetUuid
#endif
static int last_device = 2;
void fake_last_device(int device) { last_device = device; }
CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device)
{
    errno = 34;
    if (device < 0 || device > last_device) return CUDA_ERROR_INVALID_DEVICE;
    memset(uuid, 0x10 + device, sizeof *uuid);
    return CUDA_SUCCESS;
}
#ifndef OLD
CUresult cuMemGetAllocationGranularity(size_t *g, const CUmemAllocationProp *prop, CUmemAllocationGranularity_flags o)
{
    if (prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE || o != CU_MEM_ALLOC_GRANULARITY_MINIMUM)
        return CUDA_ERROR_INVALID_VALUE;
    *g = 2 << 20;
    errno = 35;
    return CUDA_SUCCESS;
}
#endif
CUresult cuMemAlloc_v2(CUdeviceptr *p, size_t n) { return *p = 0xd00000, n ? count() : CUDA_ERROR_INVALID_VALUE; }
#ifdef OLD
CUresult cuMemFree_v2(CUdeviceptr p) { return (void)p, next_result; }
#else
extern CUresult cuMemFreeAsync(CUdeviceptr p, CUstream stream);
CUresult cuMemFree_v2(CUdeviceptr p) /* memory of a pool has a higher address than other memory */
{
    return next_result || p < 0x700000000000ull ? next_result : cuMemFreeAsync(p, (CUstream)14);
}
#endif
CUresult cuMemAlloc(CUdeviceptr_v1 *p, unsigned n) { return *p = 0xd0, n ? count() : CUDA_ERROR_INVALID_VALUE; }
CUresult cuMemAllocPitch(CUdeviceptr_v1 *p, unsigned *pitch, unsigned w, unsigned h, unsigned e)
{
    return *p = 0xd0, *pitch = w, (void)h, (void)e, count();
}
CUresult cuMemGetInfo(unsigned *f, unsigned *t) { return *f = 3u << 30, *t = 0xffffffff, CUDA_SUCCESS; }
CUresult cuDeviceTotalMem(unsigned *t, CUdevice d) { return (void)d, *t = 0xffffffff, CUDA_SUCCESS; }
CUresult cuArrayCreate(CUarray *a, const CUDA_ARRAY_DESCRIPTOR_v1 *d) { return *a = (CUarray)0xa1, (void)d, count(); }
CUresult cuArrayCreate_v2(CUarray *a, const CUDA_ARRAY_DESCRIPTOR *d) { return *a = (CUarray)0xa2, (void)d, count(); }
CUresult cuArray3DCreate(CUarray *a, const CUDA_ARRAY3D_DESCRIPTOR_v1 *d)
{
    return *a = (CUarray)0xa3, (void)d, count();
}
CUresult cuArray3DCreate_v2(CUarray *a, const CUDA_ARRAY3D_DESCRIPTOR *d)
{
    return *a = (CUarray)0xa4, (void)d, count();
}
CUresult cuMipmappedArrayCreate(CUmipmappedArray *a, const CUDA_ARRAY3D_DESCRIPTOR *d, unsigned n)
{
    return *a = (CUmipmappedArray)0xa5, (void)d, (void)n, count();
}
CUresult cuMemAllocPitch_v2(CUdeviceptr *p, size_t *pitch, size_t w, size_t h, unsigned e)
{
    return *p = 0xd00000, *pitch = w, (void)h, (void)e, count();
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *h, size_t n, const CUmemAllocationProp *prop, unsigned long long f)
{
    return *h = 0x77, (void)n, (void)prop, (void)f, count();
}
CUresult cuMemGetInfo_v2(size_t *f, size_t *t)
{
    return *f = available, *t = total, context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
CUresult cuDeviceTotalMem_v2(size_t *t, CUdevice d)
{
    return *t = total, d < 0 || d > 2 ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *f, int *a)
{
    return (void)d, *f = 0, *a = active, CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d)
{
    return active = 1, *c = (CUcontext)0x99, (void)d, count();
}
CUresult cuCtxCreate_v2(CUcontext *c, unsigned f, CUdevice d)
{
    return *c = (CUcontext)0x98, (void)f, (void)d, count();
}
CUresult cuCtxCreate_v3(CUcontext *c, CUexecAffinityParam *a, int n, unsigned f, CUdevice d)
{
    return *c = (CUcontext)0x97, (void)a, (void)n, (void)f, (void)d, count();
}
#ifndef OLD
CUresult cuMemAllocManaged(CUdeviceptr *p, size_t n, unsigned f) { return *p = 0xe00000, (void)n, (void)f, count(); }
CUresult cuCtxCreate_v4(CUcontext *c, CUctxCreateParams *a, unsigned f, CUdevice d)
{
    return *c = (CUcontext)0x96, (void)a, (void)f, (void)d, count();
}
#endif
CUresult cuLaunchKernel_fake(void) { return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { return *c = (CUcontext)0x99, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d)
{
    errno = 36;
    return *v = a == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 2 : 1024, (void)d, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f)
{
    errno = 37;
    return *v = 2048, (void)a, (void)f, CUDA_SUCCESS;
}
CUresult cuGraphKernelNodeSetParams(CUgraphNode n, const CUDA_KERNEL_NODE_PARAMS_v1 *p) { return (void)n, count(); }
CUresult cuGraphKernelNodeSetParams_v2(CUgraphNode n, const CUDA_KERNEL_NODE_PARAMS_v2 *p) { return (void)n, count(); }
CUresult cuGraphExecKernelNodeSetParams(CUgraphExec e, CUgraphNode n, const CUDA_KERNEL_NODE_PARAMS_v1 *p)
{
    return (void)n, count();
}
CUresult cuGraphExecKernelNodeSetParams_v2(CUgraphExec e, CUgraphNode n, const CUDA_KERNEL_NODE_PARAMS_v2 *p)
{
    return (void)n, count();
}
#ifndef OLD
CUresult cuGraphNodeSetParams(CUgraphNode n, CUgraphNodeParams *p) { return (void)n, count(); }
CUresult cuGraphExecNodeSetParams(CUgraphExec e, CUgraphNode n, CUgraphNodeParams *p) { return (void)n, count(); }
#endif
CUresult cuCtxSetLimit(CUlimit l, size_t n) { return (void)l, (void)n, count(); }
CUresult cuEventCreate(CUevent *e, unsigned flags) { return *e = (CUevent)0x98, (void)flags, CUDA_SUCCESS; }
CUresult cuEventRecord(CUevent e, CUstream s) { return (void)e, (void)s, CUDA_SUCCESS; }
CUresult cuEventQuery(CUevent e) { return (void)e, CUDA_SUCCESS; }
CUresult cuEventDestroy_v2(CUevent e) { return (void)e, CUDA_SUCCESS; }
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream s, void **params, void **extra)
{
    (void)f, (void)gx, (void)gy, (void)gz, (void)bx, (void)by, (void)bz, (void)shared, (void)s, (void)params;
    return (void)extra, CUDA_SUCCESS;
}

CUresult cuGetProcAddress_v2(const char *name, void **fn, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status)
{
    (void)flags;
    if (status) *status = CU_GET_PROC_ADDRESS_SUCCESS;
    if (!strcmp(name, "cuMemAlloc"))
        *fn = version < 3020 ? (void *)cuMemAlloc : (void *)cuMemAlloc_v2;
    else if (!strcmp(name, "cuMemCreate"))
        *fn = (void *)cuMemCreate;
    else if (!strcmp(name, "cuMem"))
        *fn = (void *)cuMemCreate; /* a name of no function: the shim must not return its hook of cuMemCreate */
    else if (!strcmp(name, "cuCtxCreate"))
        *fn = version < 11040 ? (void *)cuCtxCreate_v2 : (void *)cuCtxCreate_v3;
    else if (!strcmp(name, "cuGetProcAddress"))
        *fn = (void *)cuGetProcAddress_v2;
    else if (!strcmp(name, "cuLaunchKernel"))
        *fn = (void *)cuLaunchKernel_fake;
    else
        return *fn = NULL, CUDA_ERROR_NOT_FOUND;
    return CUDA_SUCCESS;
}
