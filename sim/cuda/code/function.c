/* Functions: their attributes, and loading them. */
#include "cuda/code/code.h"

static CUresult enter_function(CUfunction handle, struct function **function)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    result = function_get(context, handle, function);
    return result ? sim_leave(result) : CUDA_SUCCESS;
}

/* Accepts no kernel of a library, unlike other calls for functions: cuKernelGetAttribute is for such kernels. */
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
    *numBlocks = dynamicSMemSize > most ? 0 : kernel_blocks_at_once(limits, &shape);
    return sim_leave(CUDA_SUCCESS);
}
