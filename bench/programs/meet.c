/* meet KEY: a program that keeps devices 0 and 1 busy with pairs of kernels. The kernels of a pair run only together:
 * each spins until the other has begun, as kernels of a collective do. A kernel stops spinning after 10 s, so that no
 * device hangs.
 *
 * The program prints "ready", or "- WHY". For each line `SECONDS PERIOD_MS START_NS KERNEL_US HOW` of stdin, it
 * launches pairs for SECONDS, 20 at a time. Only spin.c uses PERIOD_MS and HOW. The answer has the completed
 * pairs; p50, p99 and mean of 20 pairs in microseconds; and the completed pairs with a fraction. The program does not
 * use fgpu. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DEVICES 2
#define ROUND 20
#define MOST_ROUNDS 1000000

/* Each kernel writes its own word of host memory and reads the word of the other, without atomics over the bus. */
static const char form[] = ".version 7.0\n.target sm_70\n.address_size 64\n"
                           ".visible .entry meet_%s_2_%dus(.param .u64 own, .param .u64 others)\n{\n"
                           ".reg .u64 %%o, %%t, %%r, %%v, %%a, %%b, %%c;\n.reg .pred %%p;\n"
                           "ld.param.u64 %%o, [own];\nld.param.u64 %%t, [others];\n"
                           "ld.volatile.u64 %%r, [%%o];\nadd.u64 %%r, %%r, 1;\nst.volatile.u64 [%%o], %%r;\n"
                           "membar.sys;\nmov.u64 %%a, %%globaltimer;\n"
                           "wait:\nld.volatile.u64 %%v, [%%t];\nsetp.ge.u64 %%p, %%v, %%r;\n@%%p bra met;\n"
                           "mov.u64 %%b, %%globaltimer;\nsub.u64 %%c, %%b, %%a;\n"
                           "setp.lt.u64 %%p, %%c, 10000000000;\n@%%p bra wait;\n"
                           "met:\nmov.u64 %%a, %%globaltimer;\n"
                           "again:\nmov.u64 %%b, %%globaltimer;\nsub.u64 %%c, %%b, %%a;\n"
                           "setp.lt.u64 %%p, %%c, %d000;\n@%%p bra again;\nret;\n}\n";

static void *driver;
static void *find(const char *name)
{
    void *found = dlsym(driver, name);
    if (!found) {
        printf("- the driver has no %s\n", name);
        exit(1);
    }
    return found;
}
#define CALL(name, ...)                                                                                                \
    do {                                                                                                               \
        CUresult result_ = ((__typeof__(&name))find(#name))(__VA_ARGS__);                                              \
        if (result_ != CUDA_SUCCESS) {                                                                                 \
            printf("- %s: %d\n", #name, result_);                                                                      \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static struct {
    CUcontext context;
    CUstream stream;
    CUfunction kernel;
} devices[DEVICES];
static int kernel_us;
static volatile uint64_t *words; /* one for each device, in separate cache lines */
static __typeof__(&cuLaunchKernel) launch;
static __typeof__(&cuStreamSynchronize) synchronize;
static __typeof__(&cuCtxSetCurrent) set_current;
static uint32_t took_us[MOST_ROUNDS];

static int64_t now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static void prepare(void)
{
    int count;
    void *memory;
    CALL(cuInit, 0);
    CALL(cuDeviceGetCount, &count);
    if (count < DEVICES) {
        printf("- %d device\n", count);
        exit(0);
    }
    for (int d = 0; d < DEVICES; d++) {
        CALL(cuDevicePrimaryCtxRetain, &devices[d].context, d);
        CALL(cuCtxSetCurrent, devices[d].context);
        CALL(cuStreamCreate, &devices[d].stream, CU_STREAM_NON_BLOCKING);
    }
    CALL(cuMemHostAlloc, &memory, 4096, CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP);
    memset(memory, 0, 4096);
    words = memory;
    launch = (__typeof__(launch))find("cuLaunchKernel");
    synchronize = (__typeof__(synchronize))find("cuStreamSynchronize");
    set_current = (__typeof__(set_current))find("cuCtxSetCurrent");
}

static void load(const char *key, int us)
{
    char ptx[4096], name[64];
    if (us == kernel_us) return;
    kernel_us = us;
    snprintf(ptx, sizeof ptx, form, key, us, us);
    snprintf(name, sizeof name, "meet_%s_2_%dus", key, us);
    for (int d = 0; d < DEVICES; d++) {
        CUmodule module;
        CALL(cuCtxSetCurrent, devices[d].context);
        CALL(cuModuleLoadData, &module, ptx);
        CALL(cuModuleGetFunction, &devices[d].kernel, module, name);
    }
}

static int step(int64_t end)
{
    int pairs = 0;
    CUresult result = CUDA_SUCCESS;
    do {
        for (int d = 0; d < DEVICES && !result; d++) {
            void *own = (void *)(words + 64 * d), *others = (void *)(words + 64 * (1 - d));
            void *parameters[] = {&own, &others};
            result = set_current(devices[d].context);
            if (!result) result = launch(devices[d].kernel, 1, 1, 1, 1, 1, 1, 0, devices[d].stream, parameters, NULL);
        }
    } while (!result && ++pairs < ROUND && now() < end);
    for (int d = 0; d < DEVICES && !result; d++) {
        result = set_current(devices[d].context);
        if (!result) result = synchronize(devices[d].stream);
    }
    if (result) {
        printf("- launch: %d\n", result);
        exit(1);
    }
    return pairs;
}

static int compare(const void *a, const void *b)
{
    uint32_t one = *(const uint32_t *)a, other = *(const uint32_t *)b;
    return (one > other) - (one < other);
}

static void run(double seconds, int64_t begin)
{
    double done = 0, sum_us = 0;
    struct timespec when = {begin / 1000000000, begin % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL)) {
    }
    int64_t at = now(), end = at + (int64_t)(seconds * 1e9);
    int rounds = 0;
    for (; at < end && rounds < MOST_ROUNDS; rounds++) {
        int pairs = step(end);
        int64_t after = now();
        done += after <= end ? pairs : pairs * (double)(end - at) / (double)(after - at);
        took_us[rounds] = (uint32_t)((after - at) / 1000);
        sum_us += (double)(after - at) / 1000;
        at = after;
    }
    qsort(took_us, (size_t)rounds, sizeof *took_us, compare);
    printf("%.0f %u %u %.2f %.3f\n", done, rounds ? took_us[rounds / 2] : 0, rounds ? took_us[rounds * 99 / 100] : 0,
           rounds ? sum_us / rounds : 0, done);
}

int main(int argc, char **argv)
{
    char line[256];
    driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (argc != 2 || strlen(argv[1]) > 18 || !driver) return 2;
    prepare();
    puts("ready");
    for (; fflush(stdout), fgets(line, sizeof line, stdin);) {
        double seconds, period_ms;
        int64_t begin;
        int us;
        if (sscanf(line, "%lf %lf %" SCNd64 " %d", &seconds, &period_ms, &begin, &us) != 4) return 2;
        load(argv[1], us);
        run(seconds, begin);
    }
    return 0;
}
