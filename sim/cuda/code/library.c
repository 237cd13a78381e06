/* Libraries: code and data that are in no context until a program uses the library in the context. */
#include "cuda/code/code.h"

#include <stdlib.h>
#include <string.h>

static CUresult load(CUlibrary *out, const void *code)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!out || !code) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct image *image;
    result = image_new(code, &image);
    if (result) return sim_leave(result);
    struct library *library = library_new(image);
    if (!library) {
        image_drop(image);
        return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    }
    *out = (CUlibrary)library;
    return sim_leave(CUDA_SUCCESS);
}

API cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *jitOptions, void **jitOptionsValues,
                      unsigned int numJitOptions, CUlibraryOption *libraryOptions, void **libraryOptionValues,
                      unsigned int numLibraryOptions)
{
    bool missing = (numJitOptions && (!jitOptions || !jitOptionsValues)) || (numLibraryOptions && !libraryOptions);
    (void)libraryOptionValues;
    return missing ? CUDA_ERROR_INVALID_VALUE : load(library, code);
}

API cuLibraryLoadFromFile(CUlibrary *library, const char *fileName, CUjit_option *jitOptions, void **jitOptionsValues,
                          unsigned int numJitOptions, CUlibraryOption *libraryOptions, void **libraryOptionValues,
                          unsigned int numLibraryOptions)
{
    char *text;
    (void)jitOptions, (void)jitOptionsValues, (void)numJitOptions;
    (void)libraryOptions, (void)libraryOptionValues, (void)numLibraryOptions;
    if (!library || !fileName) return CUDA_ERROR_INVALID_VALUE;
    CUresult result = image_from_file(fileName, &text);
    if (result) return result;
    result = load(library, text);
    free(text);
    return result;
}

API cuLibraryUnload(CUlibrary handle)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct library *library = library_find(handle);
    if (!library) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    library_free(library);
    return sim_leave(CUDA_SUCCESS);
}

API cuLibraryGetKernel(CUkernel *pKernel, CUlibrary handle, const char *name)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct library *library = library_find(handle);
    if (!pKernel || !name || !*name) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!library) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    struct kernel_entry *kernel = library->kernels;
    while (kernel && strcmp(kernel->name, name)) kernel = kernel->next;
    if (!kernel) {
        bool is_there = image_has(library->image, name) && strlen(name) < sizeof kernel->name;
        kernel = is_there ? calloc(1, sizeof *kernel) : NULL;
        if (!kernel) return sim_leave(CUDA_ERROR_NOT_FOUND);
        strcpy(kernel->name, name);
        kernel->library = library;
        kernel->next = library->kernels;
        library->kernels = kernel;
    }
    *pKernel = (CUkernel)kernel;
    return sim_leave(CUDA_SUCCESS);
}

API cuLibraryGetModule(CUmodule *pMod, CUlibrary handle)
{
    struct context *context;
    struct module *module;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct library *library = library_find(handle);
    if (!pMod) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!library) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    result = library_place(library, context, &module);
    if (!result) *pMod = (CUmodule)module;
    return sim_leave(result);
}

API cuLibraryGetGlobal(CUdeviceptr *dptr, size_t *bytes, CUlibrary handle, const char *name)
{
    struct context *context;
    struct module *module;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!name || (!dptr && !bytes)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct library *library = library_find(handle);
    if (!library) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (!symbol_find(library->image->globals, name)) return sim_leave(CUDA_ERROR_NOT_FOUND);
    result = library_place(library, context, &module);
    return sim_leave(result ? result : module_global(module, name, dptr, bytes));
}

API cuKernelGetFunction(CUfunction *pFunc, CUkernel kernel)
{
    struct context *context;
    struct function *function;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!pFunc) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    result = library_function(context, kernel, &function);
    if (!result) *pFunc = (CUfunction)function;
    return sim_leave(result);
}

/* Works without a context, and loads nothing. */
API cuKernelGetAttribute(int *pi, CUfunction_attribute attrib, CUkernel handle, CUdevice dev)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    const struct kernel_entry *kernel = library_kernel(handle);
    if (!pi || (unsigned)attrib >= CU_FUNC_ATTRIBUTE_MAX) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!kernel) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (!sim_is_device(dev)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    const int32_t *limits = driver.devices[dev].attributes;
    int shared = limits[CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK];
    *pi = kernel_attribute(dev, attrib, shared, image_local(kernel->library->image, kernel->name));
    return sim_leave(CUDA_SUCCESS);
}

API cuKernelGetName(const char **name, CUkernel hfunc)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    const struct kernel_entry *kernel = library_kernel(hfunc);
    if (!name) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!kernel) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    *name = kernel->name;
    return sim_leave(CUDA_SUCCESS);
}

API cuKernelGetLibrary(CUlibrary *pLib, CUkernel kernel)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    const struct kernel_entry *found = library_kernel(kernel);
    if (!pLib) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!found) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    *pLib = (CUlibrary)found->library;
    return sim_leave(CUDA_SUCCESS);
}
