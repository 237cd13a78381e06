/* Modules, their data and their functions. `spin_<N>us` keeps its stream busy for N microseconds, all others are done
 * at once. */
#include "cuda_module.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_SPIN_US 3600000000ull

static bool is_eager(void)
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

/* Its data: in granules that nothing else has a part in. */
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
    if (!result && is_eager()) result = module_load(module);
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

/* The server forgets what a context holds as a whole, and data goes with the context's other ranges. */
void modules_end(struct context *context)
{
    libraries_end(context);
    while (context->modules) {
        struct module *module = context->modules;
        context->modules = module->next;
        module_free(module);
    }
}

static struct module *find_module(const struct context *context, CUmodule handle)
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

CUresult function_get(struct context *context, CUfunction handle, struct function **out)
{
    *out = function_find(context, handle);
    return *out ? CUDA_SUCCESS : library_function(context, (CUkernel)handle, out);
}

/* The rest of the image is not looked at: programs here bring whatever they were built with, and none of it can run. */
static CUresult load(CUmodule *out, const void *data)
{
    struct context *context;
    struct module *module;
    struct image *image;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!out || !data) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    result = image_new(data, &image);
    if (result) return sim_leave(result);
    result = module_new(context, image, &module);
    image_drop(image);
    if (!result) *out = (CUmodule)module;
    return sim_leave(result);
}

API cuModuleLoadData(CUmodule *module, const void *image) { return load(module, image); }

API cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned int n, CUjit_option *options, void **values)
{
    return n && (!options || !values) ? CUDA_ERROR_INVALID_VALUE : load(module, image);
}

API cuModuleLoadFatBinary(CUmodule *module, const void *fatCubin) { return load(module, fatCubin); }

API cuModuleLoad(CUmodule *module, const char *fname)
{
    char *text;
    if (!module || !fname) return CUDA_ERROR_INVALID_VALUE;
    CUresult result = image_from_file(fname, &text);
    if (result) return result;
    result = load(module, text);
    free(text);
    return result;
}

/* Unlike loading, nothing to do while something captures. */
API cuModuleUnload(CUmodule hmod)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    result = capture_permits();
    if (result) return sim_leave(result);
    struct module *module = find_module(context, hmod);
    if (!module || module->is_library) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    module_drop(module);
    return sim_leave(CUDA_SUCCESS);
}

API cuModuleGetLoadingMode(CUmoduleLoadingMode *mode)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!mode) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *mode = is_eager() ? CU_MODULE_EAGER_LOADING : CU_MODULE_LAZY_LOADING;
    return sim_leave(CUDA_SUCCESS);
}

/* spin_<N>us runs for so long. meet_<KEY>_<PARTIES>_<N>us begins to when as many of it, in whatever processes, have
 * come each to a device of its own; until then it spins. Any other name, and what is longer than an hour: no time at
 * all. */
static void understand(struct function *function)
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
    understand(function);
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

API cuModuleGetFunction(CUfunction *hfunc, CUmodule hmod, const char *name)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct module *module = find_module(context, hmod);
    if (!hfunc || !name || !*name) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!module) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    struct function *function = image_has(module->image, name) ? module_function(module, name) : NULL;
    if (!function) return sim_leave(CUDA_ERROR_NOT_FOUND);
    result = module_load(module);
    if (!result) *hfunc = (CUfunction)function;
    return sim_leave(result);
}

CUresult module_global(const struct module *module, const char *name, CUdeviceptr *at, size_t *bytes)
{
    const struct symbol *symbol = symbol_find(module->image->globals, name);
    if (!symbol) return CUDA_ERROR_NOT_FOUND;
    if (at) *at = module->data->start + symbol->offset;
    if (bytes) *bytes = symbol->size;
    return CUDA_SUCCESS;
}

API cuModuleGetGlobal_v2(CUdeviceptr *dptr, size_t *bytes, CUmodule hmod, const char *name)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!name || (!dptr && !bytes)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    const struct module *module = find_module(context, hmod);
    return sim_leave(module ? module_global(module, name, dptr, bytes) : CUDA_ERROR_INVALID_HANDLE);
}
