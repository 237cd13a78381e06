/* Loaded before the simulated driver, found as libcudX.so.1 (see the test): counts the events that are recorded. */
#define __CUDA_API_VERSION_INTERNAL /* each version by its own name */
#include <cuda.h>
#include <dlfcn.h>

int recorded;

CUresult cuEventRecord(CUevent event, CUstream stream)
{
    static CUresult (*driver)(CUevent, CUstream);
    if (!driver) driver = dlsym(dlopen("libcudX.so.1", RTLD_NOW), "cuEventRecord");
    __atomic_add_fetch(&recorded, 1, __ATOMIC_RELAXED);
    return driver(event, stream);
}
