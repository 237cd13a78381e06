/* Functions: questions about them, and launching. */
#include "cuda_graph.h"
#include "cuda_module.h"

/* May it be launched so, and for how long will it run? Its module is loaded by that. */
CUresult kernel_check(struct context *context, CUfunction handle, const struct shape *shape, uint64_t *ns)
{
    struct function *function = function_find(context, handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    const int32_t *limits = driver.devices[context->device].attributes;
    uint64_t threads = 1;
    for (int i = 0; i < 3; i++) {
        if (!shape->grid[i] || !shape->block[i] ||
            shape->grid[i] > (unsigned)limits[CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X + i] ||
            shape->block[i] > (unsigned)limits[CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X + i])
            return CUDA_ERROR_INVALID_VALUE;
        threads *= shape->block[i];
    }
    if (threads > (unsigned)limits[CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK] ||
        shape->shared > (unsigned)limits[CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN])
        return CUDA_ERROR_INVALID_VALUE;
    *ns = function->ns;
    return module_load(function->module);
}

/* Only work that lasts is worth telling the server, which shows it as utilisation. */
void kernel_report(const struct context *context, uint64_t ns)
{
    if (ns >= 1000)
        sim_ask(SIM_WORK, (struct sim_request){.device = (uint32_t)context->device, .bytes = ns / 1000}, NULL, 0);
}

static CUresult launch(CUfunction handle, struct shape shape, CUstream stream_handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    struct kernel kernel = {handle, shape, 0};
    CUresult result = stream_enter_work(stream_handle, per_thread, &context, &stream);
    if (result) return result;
    result = kernel_check(context, handle, &shape, &kernel.ns);
    if (result) return sim_leave(result);
    if (stream->capture) {
        struct node *node;
        result = capture_node(stream, CU_GRAPH_NODE_TYPE_KERNEL, &node);
        if (!result) node->kernel = kernel;
        return sim_leave(result);
    }
    stream_work(context, stream, kernel.ns);
    kernel_report(context, kernel.ns);
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

static CUresult enter_function(CUfunction handle, struct function **function)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    *function = function_find(context, handle);
    return *function ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_INVALID_HANDLE);
}

/* As a small kernel of the newest kind would answer. */
API cuFuncGetAttribute(int *pi, CUfunction_attribute attrib, CUfunction hfunc)
{
    struct function *function;
    CUresult result = enter_function(hfunc, &function);
    if (result) return result;
    if (!pi || (unsigned)attrib >= CU_FUNC_ATTRIBUTE_MAX) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    const int32_t *a = driver.devices[function->module->context->device].attributes;
    int capability =
        a[CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR] * 10 + a[CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR];
    result = module_load(function->module);
    *pi = attrib == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? a[CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK]
          : attrib == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 8
          : attrib == CU_FUNC_ATTRIBUTE_BINARY_VERSION      ? capability
          : attrib == CU_FUNC_ATTRIBUTE_PTX_VERSION         ? capability
                                                            : 0;
    return sim_leave(result);
}

API cuFuncSetAttribute(CUfunction hfunc, CUfunction_attribute attrib, int value)
{
    struct function *function;
    CUresult result = enter_function(hfunc, &function);
    if (result) return result;
    if ((unsigned)attrib >= CU_FUNC_ATTRIBUTE_MAX || value < -1) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    return sim_leave(module_load(function->module));
}

API cuFuncSetCacheConfig(CUfunction hfunc, CUfunc_cache config)
{
    struct function *function;
    CUresult result = enter_function(hfunc, &function);
    if (result) return result;
    return sim_leave((unsigned)config > CU_FUNC_CACHE_PREFER_EQUAL ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS);
}

API cuFuncGetModule(CUmodule *hmod, CUfunction hfunc)
{
    struct function *function;
    CUresult result = enter_function(hfunc, &function);
    if (result) return result;
    if (!hmod) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *hmod = (CUmodule)function->module;
    return sim_leave(CUDA_SUCCESS);
}

API cuFuncGetName(const char **name, CUfunction hfunc)
{
    struct function *function;
    CUresult result = enter_function(hfunc, &function);
    if (result) return result;
    if (!name) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *name = function->name;
    return sim_leave(CUDA_SUCCESS);
}

API cuFuncIsLoaded(CUfunctionLoadingState *state, CUfunction function)
{
    struct function *found;
    CUresult result = enter_function(function, &found);
    if (result) return result;
    if (!state) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *state = found->module->is_loaded ? CU_FUNCTION_LOADING_STATE_LOADED : CU_FUNCTION_LOADING_STATE_UNLOADED;
    return sim_leave(CUDA_SUCCESS);
}

API cuFuncLoad(CUfunction function)
{
    struct function *found;
    CUresult result = enter_function(function, &found);
    return result ? result : sim_leave(module_load(found->module));
}

API cuOccupancyMaxActiveBlocksPerMultiprocessor(int *numBlocks, CUfunction func, int blockSize, size_t dynamicSMemSize)
{
    struct function *function;
    CUresult result = enter_function(func, &function);
    if (result) return result;
    if (!numBlocks || blockSize <= 0) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    const int32_t *a = driver.devices[function->module->context->device].attributes;
    int by_threads = a[CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR] / blockSize;
    int most = a[CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR];
    if (dynamicSMemSize) {
        size_t by_memory = (size_t)a[CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR] / dynamicSMemSize;
        if (by_memory < (size_t)most) most = (int)by_memory;
    }
    *numBlocks = by_threads < most ? by_threads : most;
    return sim_leave(CUDA_SUCCESS);
}
