/* Old calls that the real library still exports. Calls from before CUDA 3.2 have device pointers of 32 bits, and need a
 * context of a kind that cannot be created any more. Launches from before CUDA 4.0 still work. */
#include "cuda/async/async.h"

#include <string.h>

static CUresult refuse(void)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    return result ? result : sim_leave(CUDA_ERROR_INVALID_CONTEXT);
}

API cuMemAlloc(CUdeviceptr_v1 *dptr, unsigned int bytesize)
{
    (void)dptr, (void)bytesize;
    return refuse();
}

API cuMemFree(CUdeviceptr_v1 dptr)
{
    (void)dptr;
    return refuse();
}

API cuMemGetInfo(unsigned int *free, unsigned int *total)
{
    (void)free, (void)total;
    return refuse();
}

API cuMemAllocPitch(CUdeviceptr_v1 *dptr, unsigned int *pitch, unsigned int width, unsigned int height,
                    unsigned int element)
{
    (void)dptr, (void)pitch, (void)width, (void)height, (void)element;
    return refuse();
}

API cuArrayCreate(CUarray *out, const CUDA_ARRAY_DESCRIPTOR_v1 *shape)
{
    (void)out, (void)shape;
    return refuse();
}

API cuArray3DCreate(CUarray *out, const CUDA_ARRAY3D_DESCRIPTOR_v1 *shape)
{
    (void)out, (void)shape;
    return refuse();
}

/* Launches from before CUDA 4.0. A function keeps the shape of its blocks until the program sets another. */

static CUresult enter_function(CUfunction handle, struct function **function)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    result = function_get(context, handle, function);
    return result ? sim_leave(result) : CUDA_SUCCESS;
}

API cuFuncSetBlockShape(CUfunction hfunc, int x, int y, int z)
{
    struct function *function;
    CUresult result = enter_function(hfunc, &function);
    if (result) return result;
    /* A negative number becomes too large a number. */
    const unsigned block[] = {(unsigned)x, (unsigned)y, (unsigned)z};
    if (!block_is_possible(function->module->context->device, block)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    memcpy(function->shape.block, block, sizeof block);
    return sim_leave(CUDA_SUCCESS);
}

API cuFuncSetSharedSize(CUfunction hfunc, unsigned int bytes)
{
    struct function *function;
    CUresult result = enter_function(hfunc, &function);
    if (result) return result;
    function->shape.shared = bytes;
    return sim_leave(CUDA_SUCCESS);
}

/* While any stream captures, these launches are as unsafe as calls that allocate, in each stream. If they are
 * permitted, they ignore captures: the kernel runs at once and becomes no node. */
static CUresult launch_grid(CUfunction handle, int width, int height, CUstream stream_handle)
{
    struct context *context;
    struct stream *stream;
    struct kernel_run run;
    struct function *function;
    CUresult result = stream_enter(stream_handle, false, &context, &stream);
    if (result) return result;
    result = function_get(context, handle, &function);
    if (!result) result = capture_permits();
    if (result) return sim_leave(result);
    if (width <= 0 || height <= 0) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct shape shape = function->shape;
    memcpy(shape.grid, (unsigned[]){(unsigned)width, (unsigned)height, 1}, sizeof shape.grid);
    result = kernel_check(context, handle, &shape, false, &run);
    return sim_leave(result ? result : kernel_begin(context, stream, &run));
}

API cuLaunch(CUfunction f) { return launch_grid(f, 1, 1, NULL); }

API cuLaunchGrid(CUfunction f, int grid_width, int grid_height)
{
    return launch_grid(f, grid_width, grid_height, NULL);
}

API cuLaunchGridAsync(CUfunction f, int grid_width, int grid_height, CUstream hStream)
{
    return launch_grid(f, grid_width, grid_height, hStream);
}
