/* capture: captures graphs in the default (global) capture mode and launches each once, while another thread launches
 * kernels all the time. The program prints "ready". For each line `COUNT SECONDS` of stdin, it makes COUNT captures in
 * at most SECONDS, and answers with the number of captures, the number of failures, and the number of the first error.
 * In this mode, a call of any thread that waits for the device or queries it breaks a capture, so the program makes no
 * such call meanwhile. It does not use fgpu. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define NODES 5
#define WAIT_EVERY 8
#define BETWEEN_NS 200000 /* at least as long as the pause of a framework between two kernels */

static const char ptx[] = ".version 7.0\n.target sm_70\n.address_size 64\n"
                          ".visible .entry spin_20us()\n{\n.reg .u64 %a, %b, %c;\n.reg .pred %p;\n"
                          "mov.u64 %a, %globaltimer;\nagain:\nmov.u64 %b, %globaltimer;\nsub.u64 %c, %b, %a;\n"
                          "setp.lt.u64 %p, %c, 20000;\n@%p bra again;\nret;\n}\n";

#define DRIVER(X)                                                                                                      \
    X(cuInit)                                                                                                          \
    X(cuDevicePrimaryCtxRetain)                                                                                        \
    X(cuCtxSetCurrent)                                                                                                 \
    X(cuModuleLoadData)                                                                                                \
    X(cuModuleGetFunction)                                                                                             \
    X(cuStreamCreate)                                                                                                  \
    X(cuStreamSynchronize)                                                                                             \
    X(cuStreamBeginCapture_v2)                                                                                         \
    X(cuStreamEndCapture)                                                                                              \
    X(cuGraphInstantiateWithFlags)                                                                                     \
    X(cuGraphLaunch)                                                                                                   \
    X(cuGraphExecDestroy)                                                                                              \
    X(cuGraphDestroy)                                                                                                  \
    X(cuLaunchKernel)

static struct {
#define SLOT(name) __typeof__(&name) name;
    DRIVER(SLOT)
} cu;
static CUcontext context;
static CUfunction kernel;
static CUstream stream, beside;
static _Atomic bool ended;

static bool load(void)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    CUmodule module;
    bool all = driver != NULL;
#define FIND(name) all = all && (cu.name = (__typeof__(&name))dlsym(driver, #name));
    DRIVER(FIND)
    return all && !cu.cuInit(0) && !cu.cuDevicePrimaryCtxRetain(&context, 0) && !cu.cuCtxSetCurrent(context) &&
           !cu.cuModuleLoadData(&module, ptx) && !cu.cuModuleGetFunction(&kernel, module, "spin_20us") &&
           !cu.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING) && !cu.cuStreamCreate(&beside, CU_STREAM_NON_BLOCKING);
}

static CUresult launch(CUstream to) { return cu.cuLaunchKernel(kernel, 1, 1, 1, 1, 1, 1, 0, to, NULL, NULL); }

static void *launch_beside(void *unused)
{
    const struct timespec moment = {.tv_nsec = 200000};
    cu.cuCtxSetCurrent(context);
    while (!ended) {
        for (int i = 0; i < 5; i++) launch(beside);
        nanosleep(&moment, NULL);
    }
    return unused;
}

/* Make one capture. It is ended even if it has failed: otherwise the stream could not be used any more. */
static CUresult one(bool waits)
{
    const struct timespec between = {.tv_nsec = BETWEEN_NS};
    CUgraph graph = NULL;
    CUgraphExec exec = NULL;
    CUresult result = cu.cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_GLOBAL);
    for (int i = 0; i < NODES && !result; i++) {
        result = launch(stream);
        nanosleep(&between, NULL);
    }
    CUresult end = cu.cuStreamEndCapture(stream, &graph);
    if (!result) result = end;
    if (!result) result = cu.cuGraphInstantiateWithFlags(&exec, graph, 0);
    if (!result) result = cu.cuGraphLaunch(exec, stream);
    if (!result && waits) result = cu.cuStreamSynchronize(stream);
    if (exec) cu.cuGraphExecDestroy(exec);
    if (graph) cu.cuGraphDestroy(graph);
    return result;
}

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

int main(void)
{
    int count;
    double seconds;
    puts(load() ? "ready" : "- no context");
    for (; fflush(stdout), scanf("%d %lf", &count, &seconds) == 2;) {
        int made = 0, failed = 0, first = 0;
        double until = now() + seconds;
        pthread_t thread;
        ended = false;
        if (pthread_create(&thread, NULL, launch_beside, NULL)) return 1;
        for (; made < count && now() < until; made++) {
            CUresult result = one(made % WAIT_EVERY == 0);
            failed += result != CUDA_SUCCESS;
            if (result && !first) first = (int)result;
        }
        ended = true;
        pthread_join(thread, NULL);
        cu.cuStreamSynchronize(beside);
        printf("%d %d %d\n", made, failed, first);
    }
    return 0;
}
