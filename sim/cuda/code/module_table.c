/* The modules of contexts, their data, and the functions in them. */
#include "cuda/code/code.h"
#include "cuda/memory/memory.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_SPIN_US 3600000000ull

bool module_is_eager(void)
{
    const char *loading = getenv("CUDA_MODULE_LOADING");
    return loading && !strcmp(loading, "EAGER");
}

CUresult module_load(struct module *module)
{
    if (module->is_loaded) return CUDA_SUCCESS;
    uint64_t bytes = module->image->bytes;
    struct context *context = module->context;
    CUresult result = bytes ? sim_take(context, context->device, SIM_MODULE, bytes, bytes) : CUDA_SUCCESS;
    module->is_loaded = !result;
    return result;
}

static void unload(struct module *module)
{
    struct context *context = module->context;
    uint64_t bytes = module->is_loaded ? module->image->bytes : 0;
    module->is_loaded = false;
    if (bytes) sim_give(context, context->device, SIM_MODULE, bytes, bytes);
}

static void module_free(struct module *module)
{
    while (module->functions) {
        struct function *function = module->functions;
        module->functions = function->next;
        free(function);
    }
    image_drop(module->image);
    free(module);
}

/* Takes whole granules for the data. Nothing else shares them. */
static CUresult place_data(struct module *module)
{
    struct context *context = module->context;
    uint64_t bytes = module->image->data, physical = granules(bytes);
    if (!bytes) return CUDA_SUCCESS;
    CUresult result = sim_take(context, context->device, SIM_MODULE, physical, bytes);
    if (result) return result;
    uintptr_t start = space_reserve(physical, GRANULE, false);
    module->data = start ? range_new(context, start, bytes) : NULL;
    if (!module->data) {
        if (start) space_return(start, physical);
        sim_give(context, context->device, SIM_MODULE, physical, bytes);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    module->data->kind = RANGE_DATA;
    module->data->span = physical;
    return CUDA_SUCCESS;
}

static void remove_data(struct module *module)
{
    if (!module->data) return;
    struct context *context = module->context;
    sim_give(context, context->device, SIM_MODULE, module->data->span, module->data->size);
    range_drop(module->data);
    module->data = NULL;
}

static CUresult place(struct module *module)
{
    CUresult result = growth_code(module->context, module->image->has_malloc, module->image->has_printf);
    if (!result) result = place_data(module);
    if (!result && module_is_eager()) result = module_load(module);
    return result;
}

CUresult module_new(struct context *context, struct image *image, struct module **out)
{
    struct module *module = calloc(1, sizeof *module);
    if (!module) return CUDA_ERROR_OUT_OF_MEMORY;
    module->context = context;
    module->image = image_use(image);
    CUresult result = place(module);
    if (result) {
        remove_data(module);
        module_free(module);
        return result;
    }
    module->next = context->modules;
    context->modules = module;
    *out = module;
    return CUDA_SUCCESS;
}

void module_drop(struct module *module)
{
    struct module **at = &module->context->modules;
    while (*at != module) at = &(*at)->next;
    *at = module->next;
    unload(module);
    remove_data(module);
    module_free(module);
}

/* The server removes all memory of a context at once, and data is freed with the context's other ranges. */
void modules_end(struct context *context)
{
    while (context->modules) {
        struct module *module = context->modules;
        context->modules = module->next;
        module_free(module);
    }
}

struct module *module_find(const struct context *context, CUmodule handle)
{
    struct module *module = context->modules;
    while (module && module != (struct module *)handle) module = module->next;
    return module;
}

struct function *function_find(const struct context *context, CUfunction handle)
{
    for (const struct module *m = context->modules; m; m = m->next)
        for (struct function *f = m->functions; f; f = f->next)
            if (f == (struct function *)handle) return f;
    return NULL;
}

/* A kernel spin_<N>us runs for N microseconds. A kernel meet_<KEY>_<PARTIES>_<N>us spins until PARTIES kernels with
 * this key, in any processes, have started, each on its own device, and then runs for N microseconds. Any other kernel
 * takes no time, nor does a kernel of more than an hour. */
static void parse_name(struct function *function)
{
    const char *name = function->name;
    unsigned long long us = 0, key = 0;
    unsigned parties = 0;
    int end = 0;
    if (sscanf(name, "meet_%18llu_%2u_%10lluus%n", &key, &parties, &us, &end) != 3) end = parties = 0;
    if (!end && sscanf(name, "spin_%10lluus%n", &us, &end) != 1) return;
    if (!end || name[end] || us > MAX_SPIN_US) return;
    function->ns = us * 1000;
    function->party = (struct party){key, parties};
}

struct function *module_function(struct module *module, const char *name)
{
    for (struct function *f = module->functions; f; f = f->next)
        if (!strcmp(f->name, name)) return f;
    struct function *function = strlen(name) < sizeof function->name ? calloc(1, sizeof *function) : NULL;
    if (!function) return NULL;
    strcpy(function->name, name);
    parse_name(function);
    const int32_t *limits = driver.devices[module->context->device].attributes;
    function->shape = (struct shape){.block = {1, 1, 1}};
    function->shared_most = (unsigned)limits[CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK];
    function->needs =
        (struct needs){image_local(module->image, name), module->image->has_malloc, module->image->has_printf};
    function->module = module;
    function->next = module->functions;
    module->functions = function;
    return function;
}

CUresult module_global(const struct module *module, const char *name, CUdeviceptr *at, size_t *bytes)
{
    const struct symbol *symbol = symbol_find(module->image->globals, name);
    if (!symbol) return CUDA_ERROR_NOT_FOUND;
    if (at) *at = module->data->start + symbol->offset;
    if (bytes) *bytes = symbol->size;
    return CUDA_SUCCESS;
}
