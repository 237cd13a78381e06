/* honest FILE MOST_MIB SEED: an ordinary CUDA program. One thread launches kernels in steps and waits for each step.
 * Another thread allocates up to MOST_MIB at a time, writes, reads back, compares and frees. The program prints
 * "ready PID" when it has a context, and "ok STEPS TRIES REFUSED WRONG" when its stdin has ended. It writes a record of
 * each step to FILE. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BURST 20 /* kernels of a step */
#define MOST 16  /* allocations at a time */
#define MIB (1ull << 20)
#define SAMPLE 4096

struct record {
    int64_t begun_ns, ended_ns, kernels;
};

static void *driver;
static CUcontext context;
static atomic_bool has_ended;
static uint64_t state, most, tries, refused, wrong;

#define CALL(name, ...) (((__typeof__(&name))dlsym(driver, #name))(__VA_ARGS__))

static uint64_t any(void) /* xorshift64* */
{
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dULL;
}

static int64_t now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static void check(CUresult result, const char *what)
{
    if (result == CUDA_SUCCESS) return;
    fprintf(stderr, "honest: %s: %d\n", what, result);
    exit(1);
}

static bool is_kept(CUdeviceptr at)
{
    unsigned char written[SAMPLE], read[SAMPLE];
    memset(written, (int)any(), sizeof written);
    check(CALL(cuMemcpyHtoD_v2, at, written, sizeof written), "cuMemcpyHtoD");
    check(CALL(cuMemcpyDtoH_v2, read, at, sizeof read), "cuMemcpyDtoH");
    return !memcmp(written, read, sizeof read);
}

static void take_and_free(void)
{
    CUdeviceptr taken[MOST];
    unsigned count = 0;
    uint64_t left = most;
    while (count < MOST && left >= 2 * MIB) {
        uint64_t bytes = (1 + any() % (left / (2 * MIB))) * 2 * MIB;
        CUresult result = CALL(cuMemAlloc_v2, &taken[count], bytes);
        tries++;
        if (result) {
            refused++;
            fprintf(stderr, "honest: %" PRIu64 " of %" PRIu64 " bytes: %d\n", bytes, left, result);
            break;
        }
        left -= bytes;
        if (!is_kept(taken[count++])) wrong++;
    }
    while (count) check(CALL(cuMemFree_v2, taken[--count]), "cuMemFree");
}

static void *allocate(void *none)
{
    check(CALL(cuCtxSetCurrent, context), "cuCtxSetCurrent");
    while (!has_ended) {
        take_and_free();
        usleep(20000 + (useconds_t)(any() % 30000));
    }
    return none;
}

static void *await_end(void *none)
{
    while (getchar() != EOF) {
    }
    has_ended = true;
    return none;
}

static uint64_t launch_steps(FILE *file)
{
    CUmodule module;
    CUfunction kernel;
    CUstream stream;
    uint64_t steps = 0;
    check(CALL(cuModuleLoadData, &module, "any"), "cuModuleLoadData");
    check(CALL(cuModuleGetFunction, &kernel, module, "spin_200us"), "cuModuleGetFunction");
    check(CALL(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
    __typeof__(&cuLaunchKernel) launch = (__typeof__(launch))dlsym(driver, "cuLaunchKernel");
    __typeof__(&cuStreamSynchronize) synchronize = (__typeof__(synchronize))dlsym(driver, "cuStreamSynchronize");
    for (; !has_ended; steps++) {
        struct record step = {.begun_ns = now(), .kernels = BURST};
        for (int i = 0; i < BURST; i++) check(launch(kernel, 1, 1, 1, 1, 1, 1, 0, stream, NULL, NULL), "launch");
        check(synchronize(stream), "synchronize");
        step.ended_ns = now();
        fwrite(&step, sizeof step, 1, file);
    }
    return steps;
}

int main(int argc, char **argv)
{
    CUdevice device;
    pthread_t allocator, reader;
    driver = dlopen("libcuda.so.1", RTLD_NOW);
    FILE *file = argc == 4 ? fopen(argv[1], "wbe") : NULL;
    if (!driver || !file) return 2;
    most = strtoull(argv[2], NULL, 0) * MIB;
    state = strtoull(argv[3], NULL, 0) | 1;
    check(CALL(cuInit, 0), "cuInit");
    check(CALL(cuDeviceGet, &device, 0), "cuDeviceGet");
    check(CALL(cuDevicePrimaryCtxRetain, &context, device), "cuDevicePrimaryCtxRetain");
    check(CALL(cuCtxSetCurrent, context), "cuCtxSetCurrent");
    printf("ready %d\n", getpid());
    fflush(stdout);
    if (pthread_create(&reader, NULL, await_end, NULL) || pthread_create(&allocator, NULL, allocate, NULL)) return 3;
    uint64_t steps = launch_steps(file);
    pthread_join(allocator, NULL);
    fclose(file);
    printf("ok %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", steps, tries, refused, wrong);
    return 0;
}
