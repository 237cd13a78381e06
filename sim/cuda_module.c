/* Modules and their functions. Any image is a module and has every kernel that it is asked for; `spin_<N>us` keeps its
 * stream busy for N microseconds, all others are done at once. An image that begins with `fgpu-module <N>MiB` takes N
 * MiB of the device, any other a part of a granule. */
#include "cuda_module.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_SPIN_US 3600000000ull
#define MAX_MIB (1ull << 24)
#define SMALL_PER_GRANULE 32u

uint64_t image_bytes(const void *image)
{
    static const char sign[] = "fgpu-module ";
    unsigned long long mib;
    int end = 0;
    /* Compared byte by byte: a real image may end before this text would. */
    if (strncmp(image, sign, sizeof sign - 1)) return 0;
    if (sscanf((const char *)image + sizeof sign - 1, "%10lluMiB%n", &mib, &end) != 1 || !end) return 0;
    return mib > MAX_MIB ? 0 : mib * MIB;
}

static bool is_eager(void)
{
    const char *loading = getenv("CUDA_MODULE_LOADING");
    return loading && !strcmp(loading, "EAGER");
}

/* What a module takes from the device; small ones only where the granules of the others are full. */
static uint64_t room_needed(const struct module *module)
{
    return module->bytes ? module->bytes : module->context->small_modules % SMALL_PER_GRANULE ? 0 : GRANULE;
}

CUresult module_load(struct module *module)
{
    if (module->is_loaded) return CUDA_SUCCESS;
    uint64_t bytes = room_needed(module);
    struct context *context = module->context;
    CUresult result = bytes ? sim_take(context, context->device, SIM_MODULE, bytes, bytes) : CUDA_SUCCESS;
    if (result) return result;
    context->small_modules += !module->bytes;
    module->is_loaded = true;
    return CUDA_SUCCESS;
}

static void unload(struct module *module)
{
    struct context *context = module->context;
    if (!module->is_loaded) return;
    module->is_loaded = false;
    context->small_modules -= !module->bytes;
    uint64_t bytes = room_needed(module);
    if (bytes) sim_give(context, context->device, SIM_MODULE, bytes, bytes);
}

CUresult module_new(struct context *context, uint64_t bytes, struct module **out)
{
    struct module *module = calloc(1, sizeof *module);
    if (!module) return CUDA_ERROR_OUT_OF_MEMORY;
    module->context = context;
    module->bytes = bytes;
    CUresult result = is_eager() ? module_load(module) : CUDA_SUCCESS;
    if (result) {
        free(module);
        return result;
    }
    module->next = context->modules;
    context->modules = module;
    *out = module;
    return CUDA_SUCCESS;
}

static void module_free(struct module *module)
{
    while (module->functions) {
        struct function *function = module->functions;
        module->functions = function->next;
        free(function);
    }
    free(module);
}

void module_drop(struct module *module)
{
    struct module **at = &module->context->modules;
    while (*at != module) at = &(*at)->next;
    *at = module->next;
    unload(module);
    module_free(module);
}

/* The server forgets what a context holds as a whole. */
void modules_end(struct context *context)
{
    libraries_end(context);
    while (context->modules) {
        struct module *module = context->modules;
        context->modules = module->next;
        module_free(module);
    }
    context->small_modules = 0;
}

static struct module *find_module(const struct context *context, CUmodule handle)
{
    struct module *module = context->modules;
    while (module && module != (struct module *)handle) module = module->next;
    return module;
}

struct function *function_find(struct context *context, CUfunction handle)
{
    for (const struct module *m = context->modules; m; m = m->next)
        for (struct function *f = m->functions; f; f = f->next)
            if (f == (struct function *)handle) return f;
    return library_function(context, (CUkernel)handle);
}

/* Loading code needs the device to itself for a moment, which a capture does not allow. */
static CUresult enter_unsafe(struct context **context)
{
    CUresult result = sim_enter(context);
    if (result) return result;
    result = capture_permits();
    return result ? sim_leave(result) : CUDA_SUCCESS;
}

/* The rest of the image is not looked at: programs here bring whatever they were built with, and none of it can run. */
static CUresult load(CUmodule *out, const void *image)
{
    struct context *context;
    struct module *module;
    CUresult result = enter_unsafe(&context);
    if (result) return result;
    if (!out || !image) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    result = module_new(context, image_bytes(image), &module);
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
    char head[64] = "";
    if (!module || !fname) return CUDA_ERROR_INVALID_VALUE;
    FILE *file = fopen(fname, "re");
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    size_t got = fread(head, 1, sizeof head - 1, file);
    fclose(file);
    return got ? load(module, head) : CUDA_ERROR_INVALID_IMAGE;
}

API cuModuleUnload(CUmodule hmod)
{
    struct context *context;
    CUresult result = enter_unsafe(&context);
    if (result) return result;
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

/* 0 for any other name, and for what is longer than an hour. */
static uint64_t spin_ns(const char *name)
{
    unsigned long long us;
    int end = 0;
    if (sscanf(name, "spin_%10lluus%n", &us, &end) != 1 || !end || name[end] || us > MAX_SPIN_US) return 0;
    return us * 1000;
}

struct function *module_function(struct module *module, const char *name)
{
    for (struct function *f = module->functions; f; f = f->next)
        if (!strcmp(f->name, name)) return f;
    struct function *function = strlen(name) < sizeof function->name ? calloc(1, sizeof *function) : NULL;
    if (!function) return NULL;
    strcpy(function->name, name);
    function->ns = spin_ns(name);
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
    struct function *function = module_function(module, name);
    if (function) *hfunc = (CUfunction)function;
    return sim_leave(function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND);
}

/* Images here have code and nothing else. */
API cuModuleGetGlobal_v2(CUdeviceptr *dptr, size_t *bytes, CUmodule hmod, const char *name)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!name || (!dptr && !bytes)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    return sim_leave(find_module(context, hmod) ? CUDA_ERROR_NOT_FOUND : CUDA_ERROR_INVALID_HANDLE);
}
