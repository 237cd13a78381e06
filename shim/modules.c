/*
 * modules.c: code that is unloaded. Owns nothing. Handles of its functions may be those of other code next.
 */
#include "local_memory.h"

EXPORT CUresult cuModuleUnload(CUmodule hmod)
{
    __typeof__(&cuModuleUnload) driver = REAL(cuModuleUnload);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(hmod);
    fgpu_functions_forget();
    return result;
}

EXPORT CUresult cuLibraryUnload(CUlibrary library)
{
    __typeof__(&cuLibraryUnload) driver = REAL(cuLibraryUnload);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(library);
    fgpu_functions_forget();
    return result;
}
