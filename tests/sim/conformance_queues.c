/* Device memory that the driver takes for streams, events, graphs and registered host memory. */
#define _GNU_SOURCE
#include "conformance_code.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void check_many_streams(void)
{
    static const unsigned steps[] = {1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512};
    static CUstream streams[512];
    static CUevent events[20000];
    unsigned n = 0;
    CUcontext context = own_context();
    for (unsigned i = 0; i < sizeof steps / sizeof *steps; i++) {
        for (; n < steps[i]; n++) {
            CALL(cuStreamCreate, &streams[n], CU_STREAM_NON_BLOCKING);
            CALL(cuLaunchKernel, noop_kernel, 1, 1, 1, 32, 1, 1, 0, streams[n], NULL, NULL);
        }
        CALL(cuCtxSynchronize);
        say_number("streams", n, "mib", taken_mib());
    }
    for (n = 0; n < 512; n++) CALL(cuStreamDestroy_v2, streams[n]);
    say("streams.destroyed.mib", taken_mib());
    for (n = 0; n < 512; n++) {
        CALL(cuStreamCreate, &streams[n], CU_STREAM_NON_BLOCKING);
        CALL(cuLaunchKernel, noop_kernel, 1, 1, 1, 32, 1, 1, 0, streams[n], NULL, NULL);
    }
    CALL(cuCtxSynchronize);
    say("streams.again.mib", taken_mib());
    for (n = 0; n < 20000; n++) {
        CALL(cuEventCreate, &events[n], 0);
        CALL(cuEventRecord, events[n], streams[n % 512]);
        if (n == 999 || n == 4999 || n == 9999) say_number("events", n + 1, "mib", taken_mib());
    }
    CALL(cuCtxSynchronize);
    say("events.20000.mib", taken_mib());
    for (n = 0; n < 20000; n++) CALL(cuEventDestroy_v2, events[n]);
    say("events.destroyed.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
    context = own_context();
    for (n = 0; n < 64; n++) CALL(cuStreamCreate, &streams[n], CU_STREAM_NON_BLOCKING);
    say("unused.64.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
}

static void check_nodes(void)
{
    static const unsigned sizes[] = {100, 1000, 5000, 10000, 30000};
    CUcontext context = own_context();
    CUDA_KERNEL_NODE_PARAMS params;
    memset(&params, 0, sizeof params);
    params.func = noop_kernel;
    params.gridDimX = params.gridDimY = params.gridDimZ = params.blockDimX = params.blockDimY = params.blockDimZ = 1;
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        CUgraph graph = NULL;
        CUgraphExec exec = NULL;
        CUgraphNode last = NULL, node;
        CALL(cuGraphCreate, &graph, 0);
        for (unsigned n = 0; n < sizes[i]; n++) {
            CALL(cuGraphAddKernelNode_v2, &node, graph, last ? &last : NULL, last ? 1 : 0, &params);
            last = node;
        }
        say_number("nodes", sizes[i], "made.mib", taken_mib());
        CALL(cuGraphInstantiateWithFlags, &exec, graph, 0);
        say_number("nodes", sizes[i], "instantiated.mib", taken_mib());
        CALL(cuGraphUpload, exec, NULL);
        CALL(cuCtxSynchronize);
        say_number("nodes", sizes[i], "uploaded.mib", taken_mib());
        CALL(cuGraphLaunch, exec, NULL);
        CALL(cuCtxSynchronize);
        say_number("nodes", sizes[i], "launched.mib", taken_mib());
        CALL(cuGraphExecDestroy, exec);
        CALL(cuGraphDestroy, graph);
        CALL(cuCtxSynchronize);
        say_number("nodes", sizes[i], "destroyed.mib", taken_mib());
    }
    CALL(cuCtxDestroy_v2, context);
}

static void check_registered(void)
{
    CUcontext context = own_context();
    void *at[33];
    int file = memfd_create("conformance", 0);
    if (ftruncate(file, 64 * (long long)MIB)) return;
    for (int i = 0; i < 33; i++) {
        at[i] = mmap(NULL, 64 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
        CALL(cuMemHostRegister_v2, at[i], 64 * MIB, CU_MEMHOSTREGISTER_DEVICEMAP);
        if (i == 0 || i == 7 || i == 15 || i == 31) say_number("registered", (unsigned)i + 1, "mib", taken_mib());
    }
    for (int i = 0; i < 33; i++) {
        CALL(cuMemHostUnregister, at[i]);
        munmap(at[i], 64 * MIB);
    }
    say("unregistered.mib", taken_mib());
    close(file);
    CALL(cuCtxDestroy_v2, context);
}

void check_queues(void)
{
    section("queues");
    check_many_streams();
    check_nodes();
    check_registered();
}
