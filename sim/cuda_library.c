/* Libraries: code and data that belong to no context until one of their kernels is used there. */
#include "cuda_module.h"

#include <stdlib.h>
#include <string.h>

struct kernel_entry {
    char name[128];
    struct library *library;
    struct kernel_entry *next;
};

/* Its module in one context. */
struct placed {
    struct module *module;
    struct placed *next;
};

struct library {
    struct image *image;
    struct kernel_entry *kernels;
    struct placed *placed;
    struct library *next;
};

static struct library *libraries;

static struct library *find(CUlibrary handle)
{
    for (struct library *l = libraries; l; l = l->next)
        if (l == (struct library *)handle) return l;
    return NULL;
}

static struct kernel_entry *find_kernel(CUkernel handle)
{
    for (struct library *l = libraries; l; l = l->next)
        for (struct kernel_entry *k = l->kernels; k; k = k->next)
            if (k == (struct kernel_entry *)handle) return k;
    return NULL;
}

static CUresult place(struct library *library, struct context *context, struct module **out)
{
    for (struct placed *p = library->placed; p; p = p->next) {
        *out = p->module;
        if (p->module->context == context) return CUDA_SUCCESS;
    }
    struct placed *placed = calloc(1, sizeof *placed);
    CUresult result = placed ? module_new(context, library->image, &placed->module) : CUDA_ERROR_OUT_OF_MEMORY;
    if (result) {
        free(placed);
        return result;
    }
    placed->module->is_library = true;
    placed->next = library->placed;
    library->placed = placed;
    *out = placed->module;
    return CUDA_SUCCESS;
}

CUresult library_function(struct context *context, CUkernel handle, struct function **out)
{
    struct kernel_entry *kernel = find_kernel(handle);
    struct module *module;
    if (!kernel) return CUDA_ERROR_INVALID_HANDLE;
    CUresult result = place(kernel->library, context, &module);
    if (result) return result;
    *out = module_function(module, kernel->name);
    return *out ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

/* Forgets the modules of a context that is about to free them. */
void libraries_end(const struct context *context)
{
    for (struct library *l = libraries; l; l = l->next) {
        for (struct placed **at = &l->placed; *at;) {
            struct placed *placed = *at;
            if (placed->module->context != context) {
                at = &placed->next;
                continue;
            }
            *at = placed->next;
            free(placed);
        }
    }
}

static CUresult load(CUlibrary *out, const void *code)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!out || !code) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct library *library = calloc(1, sizeof *library);
    if (!library) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    result = image_new(code, &library->image);
    if (result) {
        free(library);
        return sim_leave(result);
    }
    library->next = libraries;
    libraries = library;
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
    struct library *library = find(handle);
    if (!library) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    while (library->placed) {
        struct placed *placed = library->placed;
        library->placed = placed->next;
        module_drop(placed->module);
        free(placed);
    }
    while (library->kernels) {
        struct kernel_entry *kernel = library->kernels;
        library->kernels = kernel->next;
        free(kernel);
    }
    struct library **at = &libraries;
    while (*at != library) at = &(*at)->next;
    *at = library->next;
    image_drop(library->image);
    free(library);
    return sim_leave(CUDA_SUCCESS);
}

API cuLibraryGetKernel(CUkernel *pKernel, CUlibrary handle, const char *name)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct library *library = find(handle);
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
    struct library *library = find(handle);
    if (!pMod) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!library) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    result = place(library, context, &module);
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
    struct library *library = find(handle);
    if (!library) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (!symbol_find(library->image->globals, name)) return sim_leave(CUDA_ERROR_NOT_FOUND);
    result = place(library, context, &module);
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

/* Without a context: nothing is loaded by the question. */
API cuKernelGetAttribute(int *pi, CUfunction_attribute attrib, CUkernel handle, CUdevice dev)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    const struct kernel_entry *kernel = find_kernel(handle);
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
    const struct kernel_entry *kernel = find_kernel(hfunc);
    if (!name) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!kernel) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    *name = kernel->name;
    return sim_leave(CUDA_SUCCESS);
}

API cuKernelGetLibrary(CUlibrary *pLib, CUkernel kernel)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    const struct kernel_entry *found = find_kernel(kernel);
    if (!pLib) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!found) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    *pLib = (CUlibrary)found->library;
    return sim_leave(CUDA_SUCCESS);
}
