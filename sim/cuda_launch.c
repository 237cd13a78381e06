/* Functions: questions about them, and launching. */
#include "cuda_graph.h"
#include "cuda_module.h"

#define CLUSTER_MAX 8u /* blocks that every device with clusters can do */

/* On one multiprocessor. */
static int blocks_at_once(const int32_t *limits, const struct shape *shape)
{
    unsigned threads = shape->block[0] * shape->block[1] * shape->block[2];
    int by_threads = (int)((unsigned)limits[CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR] / threads);
    int most = limits[CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR];
    if (shape->shared) {
        int by_memory = limits[CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR] / (int)shape->shared;
        if (by_memory < most) most = by_memory;
    }
    return by_threads < most ? by_threads : most;
}

static bool are_at_once(const int32_t *limits, const struct shape *shape)
{
    uint64_t blocks = (uint64_t)shape->grid[0] * shape->grid[1] * shape->grid[2];
    return blocks <=
           (uint64_t)limits[CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT] * (uint64_t)blocks_at_once(limits, shape);
}

static bool are_within(const unsigned *counts, const int32_t *most)
{
    for (int i = 0; i < 3; i++)
        if (!counts[i] || counts[i] > (unsigned)most[i]) return false;
    return true;
}

bool block_is_possible(int device, const unsigned *block)
{
    const int32_t *limits = driver.devices[device].attributes;
    return are_within(block, &limits[CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X]) &&
           (uint64_t)block[0] * block[1] * block[2] <= (unsigned)limits[CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK];
}

/* May it be launched so, and what will it take? Its module is loaded by that. All blocks of a kernel that cooperates
 * are on the device at once; with too much shared memory none can be. */
CUresult kernel_check(struct context *context, CUfunction handle, const struct shape *shape, bool cooperates,
                      struct kernel_run *run)
{
    struct function *function;
    CUresult result = function_get(context, handle, &function);
    if (result) return result;
    const int32_t *limits = driver.devices[context->device].attributes;
    if (!are_within(shape->grid, &limits[CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X]) ||
        !block_is_possible(context->device, shape->block))
        return CUDA_ERROR_INVALID_VALUE;
    bool has_room = shape->shared <= function->shared_most;
    if (cooperates && !(has_room && are_at_once(limits, shape))) return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
    if (!has_room) return CUDA_ERROR_INVALID_VALUE;
    *run = (struct kernel_run){function->ns, function->party, function->needs};
    return module_load(function->module);
}

CUresult kernel_begin(struct context *context, struct stream *stream, const struct kernel_run *run)
{
    CUresult result = growth_launch(context, &run->needs);
    return result ? result : stream_work(context, stream, run->ns, &run->party);
}

CUresult kernel_launch(CUfunction handle, struct shape shape, CUstream stream_handle, bool per_thread, bool cooperates)
{
    struct context *context;
    struct stream *stream;
    struct kernel kernel = {.function = handle, .shape = shape};
    CUresult result = stream_enter_work(stream_handle, per_thread, &context, &stream);
    if (result) return result;
    result = kernel_check(context, handle, &shape, cooperates, &kernel.run);
    if (result) return sim_leave(result);
    if (stream->capture) {
        struct node *node;
        result = capture_node(stream, CU_GRAPH_NODE_TYPE_KERNEL, &node);
        if (!result) node->kernel = kernel;
        return sim_leave(result);
    }
    return sim_leave(kernel_begin(context, stream, &kernel.run));
}

#define SHAPE(s)                                                                                                       \
    ((struct shape){{(s)->gridDimX, (s)->gridDimY, (s)->gridDimZ},                                                     \
                    {(s)->blockDimX, (s)->blockDimY, (s)->blockDimZ},                                                  \
                    (s)->sharedMemBytes})

TWICE(_ptsz, cuLaunchKernel,
      (CUfunction f, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by,
       unsigned int bz, unsigned int shared, CUstream hStream, void **params, void **extra),
      ((void)params, (void)extra,
       kernel_launch(f, (struct shape){{gx, gy, gz}, {bx, by, bz}, shared}, hStream, per_thread, false)))

TWICE(_ptsz, cuLaunchCooperativeKernel,
      (CUfunction f, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by,
       unsigned int bz, unsigned int shared, CUstream hStream, void **params),
      ((void)params, kernel_launch(f, (struct shape){{gx, gy, gz}, {bx, by, bz}, shared}, hStream, per_thread, true)))

static bool says_cooperative(const CUlaunchConfig *config)
{
    for (unsigned i = 0; config->attrs && i < config->numAttrs; i++)
        if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE && config->attrs[i].value.cooperative) return true;
    return false;
}

/* Clusters are of so many blocks at most, and a grid of whole clusters. */
static bool fits_clusters(const CUlaunchConfig *config)
{
    for (unsigned i = 0; config->attrs && i < config->numAttrs; i++) {
        const CUlaunchAttributeValue *value = &config->attrs[i].value;
        if (config->attrs[i].id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) continue;
        unsigned x = value->clusterDim.x, y = value->clusterDim.y, z = value->clusterDim.z;
        if (!x || !y || !z || (uint64_t)x * y * z > CLUSTER_MAX) return false;
        if (config->gridDimX % x || config->gridDimY % y || config->gridDimZ % z) return false;
    }
    return true;
}

static CUresult launch_as_told(const CUlaunchConfig *config, CUfunction f, bool per_thread)
{
    if (!config) return CUDA_ERROR_INVALID_VALUE;
    if (!fits_clusters(config)) return CUDA_ERROR_INVALID_CLUSTER_SIZE;
    return kernel_launch(f, SHAPE(config), config->hStream, per_thread, says_cooperative(config));
}

TWICE(_ptsz, cuLaunchKernelEx, (const CUlaunchConfig *config, CUfunction f, void **params, void **extra),
      ((void)params, (void)extra, launch_as_told(config, f, per_thread)))

static CUresult enter_function(CUfunction handle, struct function **function)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    result = function_get(context, handle, function);
    return result ? sim_leave(result) : CUDA_SUCCESS;
}

/* Of a kernel of the newest kind, with so much local memory and room for so much shared memory. */
int kernel_attribute(int device, CUfunction_attribute attribute, int shared, uint64_t local)
{
    const int32_t *a = driver.devices[device].attributes;
    int capability =
        a[CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR] * 10 + a[CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR];
    return attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK           ? a[CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK]
           : attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? shared
           : attribute == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES              ? (int)local
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS                      ? 8
           : attribute == CU_FUNC_ATTRIBUTE_BINARY_VERSION                ? capability
           : attribute == CU_FUNC_ATTRIBUTE_PTX_VERSION                   ? capability
                                                                          : 0;
}

/* A kernel of a library has questions of its own, and is no function here. */
API cuFuncGetAttribute(int *pi, CUfunction_attribute attrib, CUfunction hfunc)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct function *function = function_find(context, hfunc);
    if (!function) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (!pi || (unsigned)attrib >= CU_FUNC_ATTRIBUTE_MAX) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    result = module_load(function->module);
    *pi = kernel_attribute(context->device, attrib, (int)function->shared_most, function->needs.local);
    return sim_leave(result);
}

API cuFuncSetAttribute(CUfunction hfunc, CUfunction_attribute attrib, int value)
{
    struct function *function;
    CUresult result = enter_function(hfunc, &function);
    if (result) return result;
    if ((unsigned)attrib >= CU_FUNC_ATTRIBUTE_MAX || value < -1) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (attrib == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        const int32_t *limits = driver.devices[function->module->context->device].attributes;
        if (value < 0 || value > limits[CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN])
            return sim_leave(CUDA_ERROR_INVALID_VALUE);
        function->shared_most = (unsigned)value;
    }
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
    const int32_t *limits = driver.devices[function->module->context->device].attributes;
    size_t most = (size_t)limits[CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR];
    struct shape shape = {{1, 1, 1}, {(unsigned)blockSize, 1, 1}, (unsigned)dynamicSMemSize};
    *numBlocks = dynamicSMemSize > most ? 0 : blocks_at_once(limits, &shape);
    return sim_leave(CUDA_SUCCESS);
}
