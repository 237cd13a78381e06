/* spin [KERNEL_US one|burst|graph|cooperative]: a program that keeps device 0 busy. It prints "ready", then answers
 * each line of stdin with one line. It does not use fgpu; bench/compute.py runs it with and without fgpu.
 *
 *   SECONDS [PERIOD_MS [START_NS KERNEL_US HOW]]
 *       Runs steps for SECONDS, from now on or from START_NS of CLOCK_MONOTONIC on, one in each period. A step launches
 *       one kernel, 50 kernels, a graph of 20 kernels or a cooperative kernel, and waits for it. Answer: completed
 *       kernels; p50, p99 and mean of a step in microseconds; completed kernels with a fraction. A step that is running
 *       when the time ends counts for its part before the end.
 *   times
 *       Answer: when each step of the last run ended, in CLOCK_MONOTONIC nanoseconds.
 *   launched
 *       Answer: when the first launch of each step returned.
 *   launch BATCHES CPU
 *       Launches batches of 1,000 empty kernels from this processor. Answer: the nanoseconds of each batch. The
 *       processor is fixed, because times on two processors differ by more than the measured difference. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <inttypes.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define BURST 50
#define GRAPH 20
#define MOST_STEPS 4000000
#define MOST_KERNELS 16
#define BATCH 1000

#define KERNEL(us)                                                                                                     \
    ".visible .entry spin_" #us "us()\n{\n.reg .u64 %a, %b, %c;\n.reg .pred %p;\nmov.u64 %a, %globaltimer;\n"          \
    "again:\nmov.u64 %b, %globaltimer;\nsub.u64 %c, %b, %a;\nsetp.lt.u64 %p, %c, " #us                                 \
    "000;\n@%p bra again;\nret;\n}\n"

static const char ptx[] = ".version 7.0\n.target sm_70\n.address_size 64\n" KERNEL(20) KERNEL(100) KERNEL(200)
    KERNEL(500) KERNEL(4000) KERNEL(50000) ".visible .entry empty()\n{\nret;\n}\n";

/* Find a function by dlsym and its exported name, as real programs do. */
static void *driver;
static void *find(const char *name)
{
    void *found = dlsym(driver, name);
    if (!found) {
        fprintf(stderr, "spin: the driver has no %s\n", name);
        exit(1);
    }
    return found;
}
#define CALL(name, ...)                                                                                                \
    do {                                                                                                               \
        CUresult result_ = ((__typeof__(&name))find(#name))(__VA_ARGS__);                                              \
        if (result_ != CUDA_SUCCESS) {                                                                                 \
            fprintf(stderr, "spin: %s: %d\n", #name, result_);                                                         \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* The kernel of one length, and its graph. */
struct work {
    int us; /* 0: none yet */
    CUfunction kernel;
    CUgraphExec graph;
};

static CUmodule module;
static CUstream stream;
static struct work works[MOST_KERNELS];
static __typeof__(&cuLaunchKernel) launch;
static __typeof__(&cuLaunchCooperativeKernel) launch_cooperative;
static __typeof__(&cuGraphLaunch) launch_graph;
static __typeof__(&cuStreamSynchronize) synchronize;
static uint32_t *took_us;
static int64_t *ended_ns, *launched_ns;
static long steps;

static int64_t now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static void sleep_until(int64_t at)
{
    struct timespec when = {at / 1000000000, at % 1000000000};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL)) {
    }
}

static void check(CUresult result, const char *what)
{
    if (result == CUDA_SUCCESS) return;
    fprintf(stderr, "spin: %s: %d\n", what, result);
    exit(1);
}

static void launch_one(CUfunction kernel) { check(launch(kernel, 1, 1, 1, 1, 1, 1, 0, stream, NULL, NULL), "launch"); }

static void prepare(void)
{
    CUcontext context;
    CUdevice device;
    CALL(cuInit, 0);
    CALL(cuDeviceGet, &device, 0);
    CALL(cuDevicePrimaryCtxRetain, &context, device);
    CALL(cuCtxSetCurrent, context);
    CALL(cuModuleLoadData, &module, ptx);
    CALL(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    launch = (__typeof__(launch))find("cuLaunchKernel");
    launch_cooperative = (__typeof__(launch_cooperative))find("cuLaunchCooperativeKernel");
    launch_graph = (__typeof__(launch_graph))find("cuGraphLaunch");
    synchronize = (__typeof__(synchronize))find("cuStreamSynchronize");
}

static struct work *work_of(int us)
{
    char name[64];
    struct work *work = works;
    while (work < works + MOST_KERNELS - 1 && work->us && work->us != us) work++;
    if (work->us == us) return work;
    snprintf(name, sizeof name, "spin_%dus", us);
    CALL(cuModuleGetFunction, &work->kernel, module, name);
    work->us = us;
    return work;
}

static void record_graph(struct work *work)
{
    CUgraph recorded;
    CALL(cuStreamBeginCapture_v2, stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    for (int i = 0; i < GRAPH; i++) launch_one(work->kernel);
    CALL(cuStreamEndCapture, stream, &recorded);
    CALL(cuGraphInstantiateWithFlags, &work->graph, recorded, 0);
}

/* Run a step. Returns the number of launched kernels: a burst has no launch after `end`. */
static int step(const struct work *work, const char *how, int64_t end, int64_t *launched)
{
    int kernels = 1;
    if (!strcmp(how, "graph")) {
        check(launch_graph(work->graph, stream), "graph launch");
        kernels = GRAPH;
    } else if (!strcmp(how, "cooperative")) {
        check(launch_cooperative(work->kernel, 1, 1, 1, 1, 1, 1, 0, stream, NULL), "cooperative launch");
    } else {
        launch_one(work->kernel);
    }
    *launched = now();
    if (!strcmp(how, "burst"))
        for (; kernels < BURST && now() < end; kernels++) launch_one(work->kernel);
    check(synchronize(stream), "synchronize");
    return kernels;
}

static int compare(const void *a, const void *b)
{
    uint32_t one = *(const uint32_t *)a, other = *(const uint32_t *)b;
    return (one > other) - (one < other);
}

static void run(const char *how, int us, double seconds, double period_ms, int64_t begin)
{
    struct work *work = work_of(us);
    double done = 0, sum_us = 0;
    if (!strcmp(how, "graph") && !work->graph) record_graph(work);
    if (begin) sleep_until(begin);
    int64_t begun = begin ? begin : now(), end = begun + (int64_t)(seconds * 1e9), next = begun;
    for (steps = 0;;) {
        int64_t at = now();
        if (at < next) {
            sleep_until(next);
            at = now();
        }
        if (at >= end) break;
        next += (int64_t)(period_ms * 1e6);
        int64_t launched;
        int kernels = step(work, how, end, &launched);
        int64_t after = now();
        done += after <= end ? kernels : kernels * (double)(end - at) / (double)(after - at);
        sum_us += (double)(after - at) / 1000;
        if (steps == MOST_STEPS) continue;
        took_us[steps] = (uint32_t)((after - at) / 1000);
        launched_ns[steps] = launched;
        ended_ns[steps++] = after;
    }
    qsort(took_us, (size_t)steps, sizeof *took_us, compare);
    printf("%.0f %u %u %.2f %.3f\n", done, steps ? took_us[steps / 2] : 0, steps ? took_us[steps * 99 / 100] : 0,
           steps ? sum_us / (double)steps : 0, done);
}

static void say_times(const int64_t *at_ns)
{
    for (long i = 0; i < steps; i++) printf("%s%" PRId64, i ? " " : "", at_ns[i]);
    putchar('\n');
}

static void time_launches(int batches, int cpu)
{
    CUfunction empty;
    cpu_set_t before, only;
    sched_getaffinity(0, sizeof before, &before);
    CPU_ZERO(&only);
    CPU_SET(cpu, &only);
    sched_setaffinity(0, sizeof only, &only);
    CALL(cuModuleGetFunction, &empty, module, "empty");
    for (int batch = 0; batch < batches; batch++) {
        int64_t begun = now();
        for (int i = 0; i < BATCH; i++) launch_one(empty);
        printf("%s%" PRId64, batch ? " " : "", now() - begun);
        check(synchronize(stream), "synchronize");
    }
    putchar('\n');
    sched_setaffinity(0, sizeof before, &before);
}

int main(int argc, char **argv)
{
    char how[16] = "one", line[256];
    int us = argc > 1 ? atoi(argv[1]) : 200, batches, cpu;
    if (argc > 2) snprintf(how, sizeof how, "%s", argv[2]);
    driver = dlopen("libcuda.so.1", RTLD_NOW);
    took_us = malloc(MOST_STEPS * sizeof *took_us);
    ended_ns = malloc(MOST_STEPS * sizeof *ended_ns);
    launched_ns = malloc(MOST_STEPS * sizeof *launched_ns);
    if (!driver || !took_us || !ended_ns || !launched_ns) return 1;
    prepare();
    puts("ready");
    for (; fflush(stdout), fgets(line, sizeof line, stdin);) {
        double seconds = 1, period_ms = 0;
        int64_t begin = 0;
        if (!strcmp(line, "times\n"))
            say_times(ended_ns);
        else if (!strcmp(line, "launched\n"))
            say_times(launched_ns);
        else if (sscanf(line, "launch %d %d", &batches, &cpu) == 2)
            time_launches(batches, cpu);
        else if (sscanf(line, "%lf %lf %" SCNd64 " %d %15s", &seconds, &period_ms, &begin, &us, how) < 1)
            return 2;
        else
            run(how, us, seconds, period_ms, begin);
    }
    return 0;
}
