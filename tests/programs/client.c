/* client: a CUDA program that executes commands. It reads them from stdin, one a line, and prints one line for each:
 * "ok ..." or the name of the driver's error. It uses nothing of fgpu. `client proc` gets the driver's functions from
 * cuGetProcAddress_v2, `client` from dlsym. */
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST_POINTERS (1 << 19)
#define MOST_NUMBERS 8

/* The exported name, and the name that cuGetProcAddress takes. */
#define DRIVER(X)                                                                                                      \
    X(cuInit, "cuInit")                                                                                                \
    X(cuDeviceGet, "cuDeviceGet")                                                                                      \
    X(cuDeviceTotalMem_v2, "cuDeviceTotalMem")                                                                         \
    X(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain")                                                            \
    X(cuDevicePrimaryCtxRelease_v2, "cuDevicePrimaryCtxRelease")                                                       \
    X(cuCtxSetCurrent, "cuCtxSetCurrent")                                                                              \
    X(cuGetErrorName, "cuGetErrorName")                                                                                \
    X(cuMemAlloc_v2, "cuMemAlloc")                                                                                     \
    X(cuMemAllocPitch_v2, "cuMemAllocPitch")                                                                           \
    X(cuMemAllocManaged, "cuMemAllocManaged")                                                                          \
    X(cuMemFree_v2, "cuMemFree")                                                                                       \
    X(cuMemAllocAsync, "cuMemAllocAsync")                                                                              \
    X(cuMemFreeAsync, "cuMemFreeAsync")                                                                                \
    X(cuMemPoolTrimTo, "cuMemPoolTrimTo")                                                                              \
    X(cuDeviceGetDefaultMemPool, "cuDeviceGetDefaultMemPool")                                                          \
    X(cuStreamSynchronize, "cuStreamSynchronize")                                                                      \
    X(cuMemGetInfo_v2, "cuMemGetInfo")                                                                                 \
    X(cuMemCreate, "cuMemCreate")                                                                                      \
    X(cuMemRelease, "cuMemRelease")                                                                                    \
    X(cuMemAddressReserve, "cuMemAddressReserve")                                                                      \
    X(cuMemAddressFree, "cuMemAddressFree")                                                                            \
    X(cuMemMap, "cuMemMap")                                                                                            \
    X(cuMemUnmap, "cuMemUnmap")                                                                                        \
    X(cuCtxCreate_v2, "cuCtxCreate")                                                                                   \
    X(cuCtxDestroy_v2, "cuCtxDestroy")                                                                                 \
    X(cuCtxPopCurrent_v2, "cuCtxPopCurrent")                                                                           \
    X(cuIpcGetMemHandle, "cuIpcGetMemHandle")                                                                          \
    X(cuIpcOpenMemHandle_v2, "cuIpcOpenMemHandle")                                                                     \
    X(cuIpcCloseMemHandle, "cuIpcCloseMemHandle")                                                                      \
    X(cuMemExportToShareableHandle, "cuMemExportToShareableHandle")                                                    \
    X(cuMemImportFromShareableHandle, "cuMemImportFromShareableHandle")

static struct {
#define SLOT(name, asked) __typeof__(&name) name;
    DRIVER(SLOT)
} cu;

static char *self;
static const char *via;
static CUcontext context;
static int ordinal; /* of the device in use */
static CUdeviceptr pointers[MOST_POINTERS];
static unsigned count;

static void answer(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vprintf(format, list);
    va_end(list);
    putchar('\n');
    fflush(stdout);
}

static const char *name_of(CUresult result)
{
    static char number[32];
    const char *name = NULL;
    if (cu.cuGetErrorName && !cu.cuGetErrorName(result, &name) && name) return name;
    snprintf(number, sizeof number, "CUDA_ERROR_%d", result);
    return number;
}

/* -- the driver and a context */

static void *address(void *lib, const char *exported, const char *asked)
{
    CUresult (*get)(const char *, void **, int, cuuint64_t, CUdriverProcAddressQueryResult *);
    void *found = NULL;
    if (!via) return dlsym(lib, exported);
    get = dlsym(lib, "cuGetProcAddress_v2");
    return get && !get(asked, &found, 12000, CU_GET_PROC_ADDRESS_DEFAULT, NULL) ? found : NULL;
}

static const char *load(void)
{
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    if (!lib) return dlerror();
#define FIND(name, asked)                                                                                              \
    if (!(cu.name = (__typeof__(&name))address(lib, #name, asked))) return "no " #name;
    DRIVER(FIND)
    return NULL;
}

static CUresult need_context(void)
{
    CUresult result;
    if (context) return CUDA_SUCCESS;
    if ((result = cu.cuInit(0)) || (result = cu.cuDevicePrimaryCtxRetain(&context, ordinal))) return result;
    return cu.cuCtxSetCurrent(context);
}

/* -- commands: each gets the words after its name as numbers */

static CUresult vmm(CUdeviceptr *at, size_t bytes)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};
    CUmemGenericAllocationHandle handle;
    CUresult result = cu.cuMemCreate(&handle, bytes, &prop, 0);
    if (result) return result;
    result = cu.cuMemAddressReserve(at, bytes, 0, 0, 0);
    if (!result) result = cu.cuMemMap(*at, bytes, 0, handle, 0);
    cu.cuMemRelease(handle);
    return result;
}

enum how { PLAIN, VMM, MANAGED, CREATE };

static CUresult take(enum how how, uint64_t bytes, CUdeviceptr *at)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};
    CUresult result = need_context();
    if (result) return result;
    switch (how) {
    case VMM:
        return vmm(at, bytes);
    case MANAGED:
        return cu.cuMemAllocManaged(at, bytes, CU_MEM_ATTACH_GLOBAL);
    case CREATE:
        return cu.cuMemCreate((CUmemGenericAllocationHandle *)at, bytes, &prop, 0);
    default:
        return cu.cuMemAlloc_v2(at, bytes);
    }
}

static void one(enum how how, uint64_t bytes)
{
    CUdeviceptr at = 0;
    CUresult result = take(how, bytes, &at);
    if (result)
        answer("%s", name_of(result));
    else
        answer("ok %llu", at);
}

static void plain_answer(CUresult result) { answer("%s", result ? name_of(result) : "ok"); }

static void do_device(const uint64_t *n)
{
    ordinal = (int)n[0];
    context = NULL;
    plain_answer(need_context());
}

static void do_context(const uint64_t *n)
{
    (void)n;
    plain_answer(need_context());
}

static void do_drop_context(const uint64_t *n)
{
    (void)n;
    context = NULL;
    plain_answer(cu.cuDevicePrimaryCtxRelease_v2(0));
}

static void do_alloc(const uint64_t *n) { one(PLAIN, n[0]); }
static void do_vmm(const uint64_t *n) { one(VMM, n[0]); }
static void do_managed(const uint64_t *n) { one(MANAGED, n[0]); }
static void do_create(const uint64_t *n) { one(CREATE, n[0]); }
static void do_free(const uint64_t *n) { plain_answer(cu.cuMemFree_v2(n[0])); }
static void do_release(const uint64_t *n) { plain_answer(cu.cuMemRelease(n[0])); }

static void do_unmap(const uint64_t *n)
{
    CUresult result = cu.cuMemUnmap(n[0], n[1]);
    plain_answer(result ? result : cu.cuMemAddressFree(n[0], n[1]));
}

static void do_pitch(const uint64_t *n)
{
    CUdeviceptr at = 0;
    size_t pitch = 0;
    CUresult result = need_context();
    if (!result) result = cu.cuMemAllocPitch_v2(&at, &pitch, n[0], n[1], 4);
    if (result)
        answer("%s", name_of(result));
    else
        answer("ok %llu", at);
}

static void do_info(const uint64_t *n)
{
    size_t free_bytes = 0, total = 0;
    CUresult result = need_context();
    (void)n;
    if (!result) result = cu.cuMemGetInfo_v2(&free_bytes, &total);
    if (result)
        answer("%s", name_of(result));
    else
        answer("ok %zu %zu", free_bytes, total);
}

/* As do_info, with two calls that each pass one pointer. */
static void do_info_apart(const uint64_t *n)
{
    size_t free_bytes = 0, total = 0;
    CUresult result = need_context();
    (void)n;
    if (!result) result = cu.cuMemGetInfo_v2(&free_bytes, NULL);
    if (!result) result = cu.cuMemGetInfo_v2(NULL, &total);
    if (result)
        answer("%s", name_of(result));
    else
        answer("ok %zu %zu", free_bytes, total);
}

static void do_total(const uint64_t *n)
{
    size_t total = 0;
    CUresult result = cu.cuInit(0);
    (void)n;
    if (!result) result = cu.cuDeviceTotalMem_v2(&total, 0);
    if (result)
        answer("%s", name_of(result));
    else
        answer("ok %zu", total);
}

/* fill STEP HOW MOST: allocates STEP bytes at a time until it is refused, or MOST times (0: no maximum). Keeps the
 * memory. Prints the number of allocations. */
static void do_fill(const uint64_t *n)
{
    CUresult result = CUDA_SUCCESS;
    unsigned before = count;
    uint64_t end = n[2] ? before + n[2] : UINT64_MAX;
    while (count < MOST_POINTERS && count < end && !(result = take((enum how)n[1], n[0], &pointers[count]))) count++;
    if (result == CUDA_ERROR_OUT_OF_MEMORY || count == end)
        answer("ok %u", count - before);
    else
        answer("%s", result ? name_of(result) : "too many");
}

/* drop N: frees the last N allocations of `fill`. */
static void do_drop(const uint64_t *n)
{
    CUresult result = CUDA_SUCCESS;
    for (uint64_t i = 0; i < n[0] && count && !result; i++) result = cu.cuMemFree_v2(pointers[--count]);
    plain_answer(result);
}

static bool told(void)
{
    struct pollfd in = {.fd = 0, .events = POLLIN};
    return poll(&in, 1, 0) > 0;
}

static CUresult take_and_free(uint64_t bytes, CUmemoryPool pool)
{
    CUdeviceptr at;
    CUresult result = pool ? cu.cuMemAllocAsync(&at, bytes, NULL) : cu.cuMemAlloc_v2(&at, bytes);
    if (result) return result;
    if (!pool) return cu.cuMemFree_v2(at) ? CUDA_ERROR_UNKNOWN : CUDA_SUCCESS;
    if (cu.cuMemFreeAsync(at, NULL) || cu.cuStreamSynchronize(NULL)) return CUDA_ERROR_UNKNOWN;
    return cu.cuMemPoolTrimTo(pool, 0) ? CUDA_ERROR_UNKNOWN : CUDA_SUCCESS; /* so that the next requests admission */
}

/* ask BYTES N POOL: allocates BYTES and frees them, N times (0: until the next command), from the default pool if POOL
 * is 1. Prints how many allocations succeeded, were refused, and failed for another reason. */
static void do_ask(const uint64_t *n)
{
    uint64_t got = 0, refused = 0, other = 0;
    CUmemoryPool pool = NULL;
    CUresult result = need_context();
    if (!result && n[2]) result = cu.cuDeviceGetDefaultMemPool(&pool, 0);
    if (result) {
        answer("%s", name_of(result));
        return;
    }
    for (uint64_t i = 0; n[1] ? i < n[1] : i % 64 || !told(); i++) {
        result = take_and_free(n[0], pool);
        *(result == CUDA_SUCCESS ? &got : result == CUDA_ERROR_OUT_OF_MEMORY ? &refused : &other) += 1;
    }
    answer("ok %" PRIu64 " %" PRIu64 " %" PRIu64, got, refused, other);
}

/* -- races: all racers map one page, and wait for each other before and after each allocation */

struct track {
    _Atomic uint64_t arrived, round_wins;
};

static bool meet(struct track *track, uint64_t *generation, uint64_t racers)
{
    struct timespec start, now;
    uint64_t goal = ++*generation * racers;
    track->arrived++;
    clock_gettime(CLOCK_MONOTONIC, &start);
    while (track->arrived < goal) {
        sched_yield();
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (now.tv_sec - start.tv_sec > 20) return false;
    }
    return true;
}

static bool race_round(struct track *track, const uint64_t *n, uint64_t *met, uint64_t *wins, uint64_t *bad)
{
    CUdeviceptr at = 0;
    if (!meet(track, met, n[1])) return false;
    CUresult result = cu.cuMemAlloc_v2(&at, n[0]);
    if (!result) track->round_wins++;
    if (!meet(track, met, n[1])) return false;
    *bad += track->round_wins != 1 || (result && result != CUDA_ERROR_OUT_OF_MEMORY);
    if (!meet(track, met, n[1])) return false;
    if (!result) {
        *wins += 1;
        track->round_wins--;
        *bad += cu.cuMemFree_v2(at) != CUDA_SUCCESS;
    }
    return true;
}

/* race BYTES RACERS ROUNDS: needs a file `track` in the working folder. Prints how many rounds this racer won, and the
 * number of errors: rounds without exactly one winner, and calls that failed for another reason. */
static void do_race(const uint64_t *n)
{
    uint64_t met = 0, wins = 0, bad = 0;
    int fd = open("track", O_RDWR | O_CLOEXEC);
    struct track *track = fd < 0 ? MAP_FAILED : mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CUresult result = need_context();
    if (fd >= 0) close(fd);
    if (track == MAP_FAILED || result) {
        answer("no track, or no context");
        return;
    }
    for (uint64_t i = 0; i < n[2]; i++)
        if (!race_round(track, n, &met, &wins, &bad)) {
            answer("a racer stayed away");
            return;
        }
    answer("ok %" PRIu64 " %" PRIu64, wins, bad);
}

/* -- processes and threads */

static void serve(void);

static void *serve_on(void *unused)
{
    (void)unused;
    plain_answer(context ? cu.cuCtxSetCurrent(context) : CUDA_SUCCESS);
    serve();
    exit(0);
}

/* thread: starts a thread that executes the next commands with the same context, and ends the calling thread. */
static void do_thread(const uint64_t *n)
{
    pthread_t thread;
    (void)n;
    if (pthread_create(&thread, NULL, serve_on, NULL))
        answer("no thread");
    else
        syscall(SYS_exit, 0);
}

static void do_exec(const uint64_t *n)
{
    (void)n;
    execl(self, self, via, (char *)NULL);
    answer("no exec");
}

/* fork: starts a child that makes no call of the driver and exits, and waits for it. */
static void do_fork(const uint64_t *n)
{
    int status;
    pid_t child = fork();
    (void)n;
    if (child == 0) _exit(0);
    if (child < 0 || waitpid(child, &status, 0) != child || status)
        answer("no fork");
    else
        answer("ok");
}

/* linger: starts a child that makes no call of the driver, and keeps the driver's descriptors open until it is killed.
 */
static void do_linger(const uint64_t *n)
{
    pid_t child = fork();
    (void)n;
    while (child == 0) pause();
    if (child < 0)
        answer("no fork");
    else
        answer("ok %d", child);
}

static void *hold(void *unused)
{
    (void)unused;
    for (;;) pause();
    return NULL;
}

static _Noreturn void be_child(uint64_t bytes, bool leaderless, int report)
{
    CUdeviceptr at;
    pthread_t thread;
    char good = need_context() == CUDA_SUCCESS && cu.cuMemAlloc_v2(&at, bytes) == CUDA_SUCCESS;
    if (leaderless && pthread_create(&thread, NULL, hold, NULL)) good = 0;
    if (write(report, &good, 1) != 1) _exit(1);
    if (leaderless) syscall(SYS_exit, 0);
    for (;;) pause();
}

static _Noreturn void be_busy(uint64_t bytes, bool odd, int report)
{
    (void)odd;
    CUdeviceptr at;
    char good = need_context() == CUDA_SUCCESS;
    if (write(report, &good, 1) != 1) _exit(1);
    for (;;)
        if (!cu.cuMemAlloc_v2(&at, bytes)) cu.cuMemFree_v2(at);
}

/* Starts N children that run `be`. Prints how many of them report success. */
static void bear(const uint64_t *n, void (*be)(uint64_t bytes, bool odd, int report))
{
    int ends[2];
    uint64_t good = 0;
    char byte;
    if (context || pipe(ends)) {
        answer("children come before any context");
        return;
    }
    for (uint64_t i = 0; i < n[0]; i++)
        if (fork() == 0) be(n[1], i & 1, ends[1]);
    for (uint64_t i = 0; i < n[0] && read(ends[0], &byte, 1) == 1; i++) good += byte == 1;
    close(ends[0]);
    close(ends[1]);
    answer("ok %" PRIu64, good);
}

/* brood N BYTES: N children hold BYTES each until they are killed. In every second child the first thread exits. */
static void do_brood(const uint64_t *n) { bear(n, be_child); }

/* bustle N BYTES: N children allocate and free BYTES without a pause until they are killed. */
static void do_bustle(const uint64_t *n) { bear(n, be_busy); }

/* reap: waits for the exit of all children, and prints their number. */
static void do_reap(const uint64_t *n)
{
    unsigned buried = 0;
    (void)n;
    while (waitpid(-1, NULL, 0) > 0) buried++;
    answer("ok %u", buried);
}

#include "client_odd.h"

static const struct command {
    const char *name;
    void (*run)(const uint64_t *numbers);
} commands[] = {{"context", do_context},
                {"dropcontext", do_drop_context},
                {"alloc", do_alloc},
                {"vmm", do_vmm},
                {"device", do_device},
                {"managed", do_managed},
                {"create", do_create},
                {"pitch", do_pitch},
                {"free", do_free},
                {"release", do_release},
                {"unmap", do_unmap},
                {"info", do_info},
                {"info.apart", do_info_apart},
                {"total", do_total},
                {"fill", do_fill},
                {"drop", do_drop},
                {"ask", do_ask},
                {"race", do_race},
                {"thread", do_thread},
                {"exec", do_exec},
                {"fork", do_fork},
                {"linger", do_linger},
                {"brood", do_brood},
                {"bustle", do_bustle},
                {"reap", do_reap},
                {"reuse", do_reuse},
                {"leap", do_leap},
                {"brieflyleap", do_brief_leap},
                {"newcontext", do_new_context},
                {"newmanaged", do_new_managed},
                {"endcontext", do_end_context},
                {"share", do_share},
                {"open", do_open},
                {"close", do_close},
                {"export", do_export},
                {"import", do_import},
                {"forbid", do_forbid}};

/* -- the loop: reads by byte, so that an exec loses no line */

static bool read_line(char *line, size_t room)
{
    size_t n = 0;
    while (n + 1 < room && read(0, line + n, 1) == 1) {
        if (line[n] == '\n') {
            line[n] = 0;
            return true;
        }
        n++;
    }
    return false;
}

static void serve(void)
{
    char line[256];
    while (read_line(line, sizeof line)) {
        uint64_t numbers[MOST_NUMBERS] = {0};
        char *rest = strchr(line, ' ');
        if (rest) *rest++ = 0;
        for (unsigned i = 0; rest && *rest && i < MOST_NUMBERS; i++) numbers[i] = strtoull(rest, &rest, 0);
        const struct command *found = NULL;
        for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
            if (!strcmp(line, commands[i].name)) found = &commands[i];
        if (found)
            found->run(numbers);
        else
            answer("no command %s", line);
    }
}

int main(int argc, char **argv)
{
    self = argv[0];
    via = argc > 1 ? argv[1] : NULL;
    const char *wrong = load();
    if (wrong)
        answer("%s", wrong);
    else
        answer("ready %d", getpid());
    serve();
    return 0;
}
