/*
 * modules.c: code that is loaded into a context or a process, used there, and unloaded. Owns nothing.
 */
#include "code/local_memory.h"
#include "link/link.h"

#define LOAD(function, begins, ...)                                                                                    \
    do {                                                                                                               \
        __typeof__(function) driver = function;                                                                        \
        struct fgpu_load load;                                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        if (!module) return driver(__VA_ARGS__);                                                                       \
        CUresult refusal = begins;                                                                                     \
        if (refusal) return refusal;                                                                                   \
        CUresult result = driver(__VA_ARGS__);                                                                         \
        return fgpu_load_ends(&load, result, result ? 0 : (uint64_t)*module);                                          \
    } while (0)

static CUresult load_image(__typeof__(&cuModuleLoadData) function, CUmodule *module, const void *image)
{
    LOAD(function, fgpu_load_begins(&load, image), module, image);
}

EXPORT CUresult cuModuleLoad(CUmodule *module, const char *fname)
{
    LOAD(REAL(cuModuleLoad), fgpu_load_of_file_begins(&load, fname), module, fname);
}

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image)
{
    return load_image(REAL(cuModuleLoadData), module, image);
}

EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned int numOptions, CUjit_option *options,
                                   void **optionValues)
{
    LOAD(REAL(cuModuleLoadDataEx), fgpu_load_begins(&load, image), module, image, numOptions, options, optionValues);
}

EXPORT CUresult cuModuleLoadFatBinary(CUmodule *module, const void *fatCubin)
{
    return load_image(REAL(cuModuleLoadFatBinary), module, fatCubin);
}

#define MAKE(name, made, ...)                                                                                          \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        CUresult result = driver(__VA_ARGS__);                                                                         \
        return result == CUDA_SUCCESS && library ? made : result;                                                      \
    } while (0)

EXPORT CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *jitOptions,
                                  void **jitOptionsValues, unsigned int numJitOptions, CUlibraryOption *libraryOptions,
                                  void **libraryOptionValues, unsigned int numLibraryOptions)
{
    MAKE(cuLibraryLoadData, fgpu_library_made(*library, code), library, code, jitOptions, jitOptionsValues,
         numJitOptions, libraryOptions, libraryOptionValues, numLibraryOptions);
}

EXPORT CUresult cuLibraryLoadFromFile(CUlibrary *library, const char *fileName, CUjit_option *jitOptions,
                                      void **jitOptionsValues, unsigned int numJitOptions,
                                      CUlibraryOption *libraryOptions, void **libraryOptionValues,
                                      unsigned int numLibraryOptions)
{
    MAKE(cuLibraryLoadFromFile, fgpu_library_of_file_made(*library, fileName), library, fileName, jitOptions,
         jitOptionsValues, numJitOptions, libraryOptions, libraryOptionValues, numLibraryOptions);
}

#define USE(name, its, ...)                                                                                            \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        struct fgpu_load load;                                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        CUresult refusal = fgpu_load_of_library_begins(&load, its);                                                    \
        return refusal ? refusal : fgpu_load_ends(&load, driver(__VA_ARGS__), 0);                                      \
    } while (0)

EXPORT CUresult cuLibraryGetModule(CUmodule *pMod, CUlibrary library)
{
    USE(cuLibraryGetModule, library, pMod, library);
}

EXPORT CUresult cuLibraryGetGlobal(CUdeviceptr *dptr, size_t *bytes, CUlibrary library, const char *name)
{
    USE(cuLibraryGetGlobal, library, dptr, bytes, library, name);
}

EXPORT CUresult cuKernelGetFunction(CUfunction *pFunc, CUkernel kernel)
{
    USE(cuKernelGetFunction, fgpu_library_of(kernel), pFunc, kernel);
}

/* The last use of a handle. Other code may get the same handle next. */
#define UNLOAD(name, handle)                                                                                           \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        fgpu_hold(); /* it ends a parked process */                                                                    \
        fgpu_data_leaves((uint64_t)handle);                                                                            \
        CUresult result = driver(handle);                                                                              \
        fgpu_data_left((uint64_t)handle, result == CUDA_SUCCESS);                                                      \
        fgpu_functions_forget();                                                                                       \
        return result;                                                                                                 \
    } while (0)

EXPORT CUresult cuModuleUnload(CUmodule hmod) { UNLOAD(cuModuleUnload, hmod); }

EXPORT CUresult cuLibraryUnload(CUlibrary library) { UNLOAD(cuLibraryUnload, library); }
