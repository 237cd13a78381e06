/* freed_contexts.h: the part of freed.c that ends contexts with memory in them. Only freed.c includes this file. */

static void context(size_t bytes) /* a second context, which is destroyed with its memory */
{
    CUcontext made;
    CUdeviceptr at;
    TRY(cuCtxCreate_v2, &made, 0, 0);
    CUresult had = cu.cuMemAlloc_v2(&at, bytes / 2);
    TRY(cuCtxDestroy_v2, made);
    failed = "cuMemAlloc in a context";
    result = had;
}

static void fill(size_t bytes)
{
    CUDA_ARRAY_DESCRIPTOR what = {
        .Width = 1 << 14, .Height = bytes >> 18, .Format = CU_AD_FORMAT_FLOAT, .NumChannels = 1};
    CUdeviceptr at;
    CUarray array;
    CUmodule module;
    TRY(cuMemAlloc_v2, &at, bytes / 4);
    TRY(cuMemAllocManaged, &at, bytes / 4, CU_MEM_ATTACH_GLOBAL);
    TRY(cuArrayCreate_v2, &array, &what);
    TRY(cuModuleLoadData, &module, code_with(bytes / 4));
}

/* A reset keeps the program's reference: the retain that follows adds one. */
static void primary_of(size_t bytes, bool resets)
{
    fill(bytes);
    CUresult filling = result;
    const char *call = failed;
    if (resets) TRY(cuDevicePrimaryCtxReset_v2, 0);
    if (!resets) TRY(cuDevicePrimaryCtxRelease_v2, 0);
    TRY(cuDevicePrimaryCtxRetain, &primary, 0);
    if (resets) TRY(cuDevicePrimaryCtxRelease_v2, 0);
    TRY(cuCtxSetCurrent, primary);
    result = filling;
    failed = call;
}

static void reset(size_t bytes) { primary_of(bytes, true); }
static void released(size_t bytes) { primary_of(bytes, false); }
