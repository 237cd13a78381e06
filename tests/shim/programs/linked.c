/* A program that is linked with the driver, as small programs are. It reaches the shim by the shim's exported names. */
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <stdio.h>

int fake_calls(void);

int main(void)
{
    CUdeviceptr pointer;
    size_t free_bytes, total;
    cuInit(0);
    int small = cuMemAlloc_v2(&pointer, 4 << 20), large = cuMemAlloc_v2(&pointer, 2ull << 30);
    cuMemGetInfo_v2(&free_bytes, &total);
    printf("%d %d %d %zu %zu\n", small, large, fake_calls(), free_bytes, total);
    return 0;
}
