/* The libraries of the process, and their modules in contexts. */
#include "cuda/code/code.h"

#include <stdlib.h>

static struct library *libraries;

struct library *library_find(CUlibrary handle)
{
    for (struct library *l = libraries; l; l = l->next)
        if (l == (struct library *)handle) return l;
    return NULL;
}

struct kernel_entry *library_kernel(CUkernel handle)
{
    for (struct library *l = libraries; l; l = l->next)
        for (struct kernel_entry *k = l->kernels; k; k = k->next)
            if (k == (struct kernel_entry *)handle) return k;
    return NULL;
}

struct library *library_new(struct image *image)
{
    struct library *library = calloc(1, sizeof *library);
    if (!library) return NULL;
    library->image = image;
    library->next = libraries;
    libraries = library;
    return library;
}

void library_free(struct library *library)
{
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
}

CUresult library_place(struct library *library, struct context *context, struct module **out)
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
    struct kernel_entry *kernel = library_kernel(handle);
    struct module *module;
    if (!kernel) return CUDA_ERROR_INVALID_HANDLE;
    CUresult result = library_place(kernel->library, context, &module);
    if (result) return result;
    *out = module_function(module, kernel->name);
    return *out ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

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
