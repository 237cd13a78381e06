/* Prints the cost of launches and waits at an open gate: nanoseconds of a launch and of a wait (the best of many
 * rounds), readings of the clock for each launch and for a wait, and changes of the capture mode.
 */
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <time.h>

#define ROUNDS 200
#define STEPS 200
#define LAUNCHES 9

static unsigned long clocks;

/* Counts readings of the clock. The shim's are included, because a program's own symbols take precedence. */
int clock_gettime(clockid_t id, struct timespec *t)
{
    static int (*next)(clockid_t, struct timespec *);
    if (!next) next = dlsym(RTLD_NEXT, "clock_gettime");
    clocks++;
    return next(id, t);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * t.tv_sec + t.tv_nsec;
}

static int launch(int n)
{
    while (n--)
        if (cuLaunchKernel(0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0)) return 1;
    return 0;
}

unsigned long fake_exchanges(void);

/* Returns the nanoseconds of a step's wait or of its launches. A step waits for its launches, so no work accumulates.
 */
static double best_of(int waits)
{
    double best = 1e9;
    for (int round = 0; round < ROUNDS; round++) {
        double took = 0;
        for (int i = 0; i < STEPS; i++) {
            double start = now();
            if (launch(LAUNCHES)) return -1;
            double middle = now();
            if (cuStreamSynchronize(0)) return -1;
            took += waits ? now() - middle : middle - start;
        }
        if (took < best) best = took;
    }
    return best / STEPS;
}

int main(void)
{
    unsigned long at[3];
    CUcontext c;
    cuInit(0);
    cuDevicePrimaryCtxRetain(&c, 0);
    double launches = best_of(0) / LAUNCHES, wait = best_of(1);
    at[0] = clocks;
    unsigned long exchanges = fake_exchanges();
    if (launch(LAUNCHES)) return 1;
    at[1] = clocks;
    if (cuStreamSynchronize(0)) return 1;
    at[2] = clocks;
    printf("%.1f %.1f %.2f %lu %lu\n", launches, wait, (at[1] - at[0]) / (double)LAUNCHES, at[2] - at[1],
           fake_exchanges() - exchanges);
    return 0;
}
