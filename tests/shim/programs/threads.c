/* threads COUNT KERNEL: COUNT threads launch KERNEL as fast as they can, each on its own stream, until a line comes on
 * standard input. Then each thread waits for its stream. Prints "ready", and finally the number of launches. */
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static void *driver;
#define CALL(name, ...)                                                                                                \
    do {                                                                                                               \
        int result = ((__typeof__(&name))dlsym(driver, #name))(__VA_ARGS__);                                           \
        if (result) printf("[\"%s\", %d]\n", #name, result), exit(1);                                                  \
    } while (0)

static CUcontext context;
static CUfunction kernel;
static volatile int stop;
static long launches;

static void *work(void *unused)
{
    CUstream stream;
    CALL(cuCtxSetCurrent, context);
    CALL(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    __typeof__(&cuLaunchKernel) launch = dlsym(driver, "cuLaunchKernel");
    while (!stop) {
        if (launch(kernel, 1, 1, 1, 1, 1, 1, 0, stream, NULL, NULL)) exit(1);
        __sync_fetch_and_add(&launches, 1);
    }
    CALL(cuStreamSynchronize, stream);
    return unused;
}

int main(int count, char **words)
{
    int threads = atoi(words[1]);
    pthread_t thread[threads];
    CUmodule module;
    driver = dlopen("libcuda.so.1", RTLD_NOW);
    CALL(cuInit, 0);
    CALL(cuDevicePrimaryCtxRetain, &context, 0);
    CALL(cuCtxSetCurrent, context);
    CALL(cuModuleLoadData, &module, "any");
    CALL(cuModuleGetFunction, &kernel, module, words[2]);
    for (int i = 0; i < threads; i++) pthread_create(thread + i, NULL, work, NULL);
    puts("[\"ready\"]");
    fflush(stdout);
    getchar();
    stop = 1;
    for (int i = 0; i < threads; i++) pthread_join(thread[i], NULL);
    CALL(cuCtxSynchronize);
    printf("[%ld]\n", launches);
    fflush(stdout);
    getchar();
    return !count;
}
