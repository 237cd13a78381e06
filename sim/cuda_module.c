/* Modules and kernels. Any image is a module and has every kernel that it is asked for; `spin_<N>us` keeps its stream
 * busy for N microseconds, all others are done at once. */
#include "cuda_state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_SPIN_US 3600000000ull

struct function {
    char name[128];
    uint64_t ns;
    struct function *next;
};

struct module {
    struct function *functions;
    struct module *next;
};

static void module_free(struct module *module)
{
    while (module->functions) {
        struct function *function = module->functions;
        module->functions = function->next;
        free(function);
    }
    free(module);
}

void modules_end(struct context *context)
{
    while (context->modules) {
        struct module *module = context->modules;
        context->modules = module->next;
        module_free(module);
    }
}

static struct module **find_module(struct context *context, CUmodule handle)
{
    struct module **at = &context->modules;
    while (*at && *at != (struct module *)handle) at = &(*at)->next;
    return *at ? at : NULL;
}

static struct function *find_function(struct context *context, CUfunction handle)
{
    for (const struct module *m = context->modules; m; m = m->next)
        for (struct function *f = m->functions; f; f = f->next)
            if (f == (struct function *)handle) return f;
    return NULL;
}

/* The image is not looked at: programs here bring whatever they were built with, and none of it can run. */
static CUresult load(CUmodule *out, const void *image)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!out || !image) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct module *module = calloc(1, sizeof *module);
    if (!module) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    module->next = context->modules;
    context->modules = module;
    *out = (CUmodule)module;
    return sim_leave(CUDA_SUCCESS);
}

API cuModuleLoadData(CUmodule *module, const void *image) { return load(module, image); }

API cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned int n, CUjit_option *options, void **values)
{
    return n && (!options || !values) ? CUDA_ERROR_INVALID_VALUE : load(module, image);
}

API cuModuleLoadFatBinary(CUmodule *module, const void *fatCubin) { return load(module, fatCubin); }

API cuModuleUnload(CUmodule hmod)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct module **at = find_module(context, hmod);
    if (!at) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    struct module *module = *at;
    *at = module->next;
    module_free(module);
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

API cuModuleGetFunction(CUfunction *hfunc, CUmodule hmod, const char *name)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct module **at = find_module(context, hmod);
    if (!hfunc || !name || !*name) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!at) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    for (struct function *f = (*at)->functions; f; f = f->next) {
        if (!strcmp(f->name, name)) {
            *hfunc = (CUfunction)f;
            return sim_leave(CUDA_SUCCESS);
        }
    }
    struct function *function = strlen(name) < sizeof function->name ? calloc(1, sizeof *function) : NULL;
    if (!function) return sim_leave(CUDA_ERROR_NOT_FOUND);
    strcpy(function->name, name);
    function->ns = spin_ns(name);
    function->next = (*at)->functions;
    (*at)->functions = function;
    *hfunc = (CUfunction)function;
    return sim_leave(CUDA_SUCCESS);
}

struct shape {
    unsigned grid[3], block[3], shared;
};

static CUresult launch(CUfunction handle, struct shape shape, CUstream stream_handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter(stream_handle, per_thread, &context, &stream);
    if (result) return result;
    const struct function *function = find_function(context, handle);
    if (!function) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    const int32_t *limits = driver.devices[context->device].attributes;
    uint64_t threads = 1;
    for (int i = 0; i < 3; i++) {
        if (!shape.grid[i] || !shape.block[i] ||
            shape.grid[i] > (unsigned)limits[CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X + i] ||
            shape.block[i] > (unsigned)limits[CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X + i])
            return sim_leave(CUDA_ERROR_INVALID_VALUE);
        threads *= shape.block[i];
    }
    if (threads > (unsigned)limits[CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK] ||
        shape.shared > (unsigned)limits[CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN])
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    stream_work(context, stream, function->ns);
    /* Only work that lasts is worth telling the server, which shows it as utilisation. */
    if (function->ns >= 1000)
        sim_ask(SIM_WORK, (struct sim_request){.device = (uint32_t)context->device, .bytes = function->ns / 1000}, NULL,
                0);
    return sim_leave(CUDA_SUCCESS);
}

#define SHAPE(s)                                                                                                       \
    ((struct shape){{(s)->gridDimX, (s)->gridDimY, (s)->gridDimZ},                                                     \
                    {(s)->blockDimX, (s)->blockDimY, (s)->blockDimZ},                                                  \
                    (s)->sharedMemBytes})

TWICE(_ptsz, cuLaunchKernel,
      (CUfunction f, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by,
       unsigned int bz, unsigned int shared, CUstream hStream, void **params, void **extra),
      ((void)params, (void)extra, launch(f, (struct shape){{gx, gy, gz}, {bx, by, bz}, shared}, hStream, per_thread)))

TWICE(_ptsz, cuLaunchCooperativeKernel,
      (CUfunction f, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by,
       unsigned int bz, unsigned int shared, CUstream hStream, void **params),
      ((void)params, launch(f, (struct shape){{gx, gy, gz}, {bx, by, bz}, shared}, hStream, per_thread)))

TWICE(_ptsz, cuLaunchKernelEx, (const CUlaunchConfig *config, CUfunction f, void **params, void **extra),
      ((void)params, (void)extra,
       config ? launch(f, SHAPE(config), config->hStream, per_thread) : CUDA_ERROR_INVALID_VALUE))
