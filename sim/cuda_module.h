/* Modules: code in a context. A module's memory is taken when one of its functions is first used, unless loading is
 * eager. */
#ifndef FGPU_SIM_CUDA_MODULE_H
#define FGPU_SIM_CUDA_MODULE_H

#include "cuda_state.h"

struct function {
    char name[128];
    uint64_t ns;
    struct module *module;
    struct function *next;
};

struct module {
    struct context *context;
    uint64_t bytes; /* 0: small, and shares granules with others */
    bool is_loaded, is_library;
    struct function *functions;
    struct module *next;
};

/* cuda_module.c */
uint64_t image_bytes(const void *image);
CUresult module_new(struct context *context, uint64_t bytes, struct module **out);
void module_drop(struct module *module);
CUresult module_load(struct module *module);
struct function *module_function(struct module *module, const char *name);
struct function *function_find(struct context *context, CUfunction handle);

/* cuda_library.c */
struct function *library_function(struct context *context, CUkernel handle);
void libraries_end(const struct context *context);

#endif
