/* Modules, as programs load them. Kernels with names that begin with `spin_` or `meet_` keep their streams busy
 * (module_table.c). All other kernels are done at once. */
#include "cuda/code/code.h"
#include "cuda/core/capture_state.h"
#include "cuda/core/gate.h"

#include <stdlib.h>

/* The image is read only for its kernels and its memory (image.c), because real device code cannot run here. */
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

/* Unlike loading, this is unsafe while any stream captures. */
API cuModuleUnload(CUmodule hmod)
{
    struct context *context;
    gate_read_completion();
    CUresult result = sim_enter(&context);
    if (result) return result;
    result = capture_permits();
    if (result) return sim_leave(result);
    struct module *module = module_find(context, hmod);
    if (!module || module->is_library) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    module_drop(module);
    return sim_leave(CUDA_SUCCESS);
}

API cuModuleGetLoadingMode(CUmoduleLoadingMode *mode)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!mode) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *mode = module_is_eager() ? CU_MODULE_EAGER_LOADING : CU_MODULE_LAZY_LOADING;
    return sim_leave(CUDA_SUCCESS);
}

API cuModuleGetFunction(CUfunction *hfunc, CUmodule hmod, const char *name)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct module *module = module_find(context, hmod);
    if (!hfunc || !name || !*name) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!module) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    struct function *function = image_has(module->image, name) ? module_function(module, name) : NULL;
    if (!function) return sim_leave(CUDA_ERROR_NOT_FOUND);
    result = module_load(module);
    if (!result) *hfunc = (CUfunction)function;
    return sim_leave(result);
}

API cuModuleGetGlobal_v2(CUdeviceptr *dptr, size_t *bytes, CUmodule hmod, const char *name)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!name || (!dptr && !bytes)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    const struct module *module = module_find(context, hmod);
    return sim_leave(module ? module_global(module, name, dptr, bytes) : CUDA_ERROR_INVALID_HANDLE);
}
