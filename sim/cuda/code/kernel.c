/* Kernels: finding the function of a handle, what a device can launch, and attributes. */
#include "cuda/code/code.h"

CUresult function_get(struct context *context, CUfunction handle, struct function **out)
{
    *out = function_find(context, handle);
    return *out ? CUDA_SUCCESS : library_function(context, (CUkernel)handle, out);
}

int kernel_blocks_at_once(const int32_t *limits, const struct shape *shape)
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
           (uint64_t)limits[CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT] * (uint64_t)kernel_blocks_at_once(limits, shape);
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

/* All blocks of a cooperative kernel are on the device at once. A block with too much shared memory never fits. */
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

/* Returns the attribute of a kernel of the newest kind with this much local memory and room for this much shared
 * memory. */
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
