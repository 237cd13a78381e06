/* Prints the nanoseconds of one allocation with its free in a stream, of one launch of a graph, and of one wait: the
 * best of many rounds. */
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define ROUNDS 40
#define CALLS 5000
static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * t.tv_sec + t.tv_nsec;
}
#define BEST(best, code)                                                                                               \
    for (int round = 0; round < ROUNDS; round++) {                                                                     \
        double start = now();                                                                                          \
        for (int i = 0; i < CALLS; i++) code;                                                                          \
        double took = (now() - start) / CALLS;                                                                         \
        if (took < best) best = took;                                                                                  \
    }
int main(int argc, char **argv)
{
    size_t size = strtoull(argv[1], NULL, 0);
    double pair = 1e9, launch = 1e9, wait = 1e9;
    CUdeviceptr p;
    CUcontext c;
    CUgraph g;
    CUgraphExec e;
    cuInit(0);
    cuDevicePrimaryCtxRetain(&c, 0);
    if (argc > 3 && (cuStreamBeginCapture_v2(0, 0) || cuStreamEndCapture(0, &g))) return 1;
    if (argc > 3 && cuGraphInstantiateWithFlags(&e, g, 0)) return 1;
    if (argc > 3) BEST(launch, if (cuGraphLaunch(e, 0)) return 2);
    if (argc > 2) { /* without this argument, pools are measured in a process that has neither captured nor waited */
        BEST(wait, if (cuCtxSynchronize()) return 3);
    }
    BEST(pair, if (cuMemAllocAsync(&p, size, 0) || cuMemFreeAsync(p, 0)) return 4);
    printf("%.1f %.1f %.1f\n", pair, launch < 1e9 ? launch : 0, wait < 1e9 ? wait : 0);
    return 0;
}
