/*
 * opener plain|deep FILE...: a CUDA program that opens each FILE by dlopen, for `deep` with RTLD_DEEPBIND. The last
 * FILE executes the commands. Each FILE is a shared library that is compiled from this source with
 *
 * -DPLUGIN            to call the driver, with which it is linked
 * -DPLUGIN -DOPENS    to call the driver, which it opens by itself, as a static CUDA runtime does
 * -DPLUGIN -DNEXT     to call the next functions in the order of the search, as a wrapper does
 * -DWRAPPER           to wrap one function
 *
 * Prints `ready PID`. Then prints ok for `alloc BYTES`, ok with the free and the total bytes for `info`, and ok with
 * the number of calls of the wrapper for `calls`. If a call fails, it prints `CUDA_ERROR_` with the number of the
 * error.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#if defined(WRAPPER)

int wrapper_calls;
CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t bytes)
{
    __typeof__(&cuMemAlloc_v2) next = (__typeof__(&cuMemAlloc_v2))dlsym(RTLD_NEXT, "cuMemAlloc_v2");
    wrapper_calls++;
    return next ? next(pointer, bytes) : CUDA_ERROR_NOT_FOUND;
}

#elif defined(PLUGIN)

#if defined(OPENS)
#define CALL(name, ...) (((__typeof__(&name))dlsym(dlopen("libcuda.so.1", RTLD_NOW), #name))(__VA_ARGS__))
#elif defined(NEXT)
#define CALL(name, ...) (((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__))
#else
#define CALL(name, ...) name(__VA_ARGS__)
#endif

static CUresult take(size_t bytes)
{
    static CUcontext context;
    CUdeviceptr pointer;
    CUresult result = context ? CUDA_SUCCESS : CALL(cuInit, 0);
    if (!result && !context) result = CALL(cuDevicePrimaryCtxRetain, &context, 0);
    if (!result) result = CALL(cuCtxSetCurrent, context);
    return result ? result : CALL(cuMemAlloc_v2, &pointer, bytes);
}

void serve(void)
{
    char command[32];
    size_t bytes = 0, total = 0;
    for (; scanf("%31s", command) == 1; fflush(stdout)) {
        const int *calls = dlsym(RTLD_DEFAULT, "wrapper_calls");
        CUresult result = CUDA_SUCCESS;
        if (!strcmp(command, "alloc"))
            result = scanf("%zu", &bytes) == 1 ? take(bytes) : CUDA_ERROR_INVALID_VALUE;
        else if (!strcmp(command, "info"))
            result = CALL(cuMemGetInfo_v2, &bytes, &total);
        if (result)
            printf("CUDA_ERROR_%d\n", result);
        else if (!strcmp(command, "calls"))
            printf("ok %d\n", calls ? *calls : 0);
        else
            printf("ok %zu %zu\n", bytes, total);
    }
}

#else

int main(int argc, char **argv)
{
    void *opened = NULL;
    for (int i = 2; i < argc; i++) {
        opened = dlopen(argv[i], RTLD_NOW | (!strcmp(argv[1], "deep") ? RTLD_DEEPBIND : 0));
        if (!opened) {
            fprintf(stderr, "%s\n", dlerror());
            return 3;
        }
    }
    void (*serve)(void) = opened ? (void (*)(void))dlsym(opened, "serve") : NULL;
    if (!serve) return 4;
    printf("ready %d\n", getpid());
    fflush(stdout);
    serve();
    return 0;
}

#endif
