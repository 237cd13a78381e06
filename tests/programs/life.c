/* life: a CUDA program that makes random calls. `life SEED THREADS WAYS` prints "ready RESULT PID". Then it reads
 * commands, one a line, and prints one line for each:
 *
 * N           each thread does N operations: "ok OPERATIONS REFUSED CONTEXTS"
 * exec SEED   the program executes itself: "ready RESULT PID"
 * leave       the first thread exits, and another thread continues: "ok 0 0 0"
 * close       descriptors and imported pools of other processes are closed: "ok 0 0 0"
 *
 * The program allocates and frees memory in every way, shares it with other lives, passes invalid arguments, leaves
 * calls by siglongjmp, forks, ends its contexts, and lets threads race for contexts. It does not check which calls
 * fail: the tests compare the ledger with the driver.
 *
 * WAYS: `plain` and `shown`: without managed memory. `pools`: also memory in streams and graphs. `shared`: as `pools`,
 * also shared memory, modules and stacks. `real`: as `shared`, without the calls that crash a real driver. `anew`: as
 * `real`, also ends of primary contexts. `whole`: only whole granules, without left calls and races. `once`: a few
 * operations, and then an exit without frees.
 */
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <dlfcn.h>
#include <inttypes.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 48
#define GRANULE (2ULL << 20)
#define MOST_THREADS 8
#define CHILD_SECONDS 30
#define WAIT_NS 100000000LL         /* a call that takes longer has waited: for room, or for a child */
#define MOST_WAITS_NS 20000000000LL /* of a thread in one round, see live() */
#define NOWHERE 8                   /* an address that nothing is ever mapped at */

/* clang-format off */
#define DRIVER(X)                                                                                                      \
    X(cuInit) X(cuDeviceGetCount) X(cuDevicePrimaryCtxRetain) X(cuCtxSetCurrent) X(cuCtxCreate_v2) X(cuCtxDestroy_v2)   \
    X(cuCtxCreate_v4) X(cuCtxPopCurrent_v2) X(cuMemAlloc_v2) X(cuMemAllocPitch_v2) X(cuMemAllocManaged) X(cuMemFree_v2) \
    X(cuArrayCreate_v2) X(cuArray3DCreate_v2) X(cuMipmappedArrayCreate) X(cuArrayDestroy) X(cuMipmappedArrayDestroy)    \
    X(cuMemCreate) X(cuMemRelease) X(cuMemRetainAllocationHandle) X(cuMemAddressReserve) X(cuMemAddressFree)            \
    X(cuMemMap) X(cuMemUnmap) X(cuMemAllocAsync) X(cuMemAllocFromPoolAsync) X(cuMemFreeAsync) X(cuMemPoolCreate)        \
    X(cuMemPoolDestroy) X(cuMemPoolGetAttribute) X(cuMemPoolSetAttribute) X(cuMemPoolTrimTo) X(cuDeviceGetDefaultMemPool) X(cuCtxSynchronize)    \
    X(cuStreamCreate) X(cuStreamSynchronize) X(cuStreamBeginCapture_v2) X(cuStreamEndCapture) X(cuStreamDestroy_v2)     \
    X(cuGraphInstantiateWithFlags) X(cuGraphLaunch) X(cuGraphExecDestroy) X(cuGraphDestroy) X(cuDeviceGraphMemTrim) \
    X(cuDevicePrimaryCtxRelease_v2) X(cuDevicePrimaryCtxReset_v2) X(cuIpcGetMemHandle)                                  \
    X(cuMemExportToShareableHandle) X(cuMemImportFromShareableHandle) X(cuMemGetHandleForAddressRange)                  \
    X(cuMemSetAccess) X(cuMemPoolExportToShareableHandle) X(cuMemPoolImportFromShareableHandle)                         \
    X(cuMemPoolExportPointer) X(cuMemPoolImportPointer) X(cuModuleLoadData) X(cuModuleUnload) X(cuModuleGetFunction)    \
    X(cuLaunchKernel) X(cuCtxSetLimit)
/* clang-format on */

static struct {
#define SLOT(name) __typeof__(&name) name;
    DRIVER(SLOT)
} cu;

enum kind { NOTHING, POINTER, MANAGED, ARRAY, MIPMAPPED, MAPPED, CONTEXT, POOLED, IMPORTED_POOL, DESCRIPTOR, MODULE };
struct slot {
    enum kind kind;
    CUdeviceptr pointer;
    size_t bytes;
    CUarray array;
    CUmipmappedArray mipmapped;
    CUmemGenericAllocationHandle handle;
    int references; /* to the handle, of this program */
    CUcontext context;
    CUmemoryPool pool;
    CUmodule module;
    int file;
};
struct life {
    uint64_t random;
    struct slot slots[SLOTS];
    pthread_t thread;
    int device;
    CUmemoryPool pool;
};

static char *self;
static const char *ways;
static unsigned threads;
static CUcontext primary[MOST_THREADS];
static struct life lives[MOST_THREADS];
static uint64_t goal;
static _Atomic uint64_t refused;
static _Atomic bool orphaned;                    /* a child has exited with an unexpected status */
static _Atomic CUdeviceptr handed[MOST_THREADS]; /* pointers that a thread passes to another thread */

static uint64_t draw(struct life *life, uint64_t below)
{
    life->random ^= life->random << 13, life->random ^= life->random >> 7, life->random ^= life->random << 17;
    return (life->random >> 11) % below;
}

static bool took(CUresult result)
{
    if (result == CUDA_ERROR_OUT_OF_MEMORY) refused++;
    return result == CUDA_SUCCESS;
}

static bool is_whole(void) { return !strcmp(ways, "whole"); }
static bool is_real(void) { return !strcmp(ways, "real") || !strcmp(ways, "anew"); }
static bool is_shared(void) { return is_real() || !strcmp(ways, "shared"); }
static bool has_pools(void) { return is_shared() || !strcmp(ways, "pools"); }

/* Returns whether the program creates and ends contexts in ways that probes cannot record completely. Then managed
 * memory, which NVML does not show either, would stay charged until the process exits. So such a program has none. */
static bool leaves_unseen(void) { return !strcmp(ways, "plain") || !strcmp(ways, "shown"); }

/* Returns a size of up to 16 MiB. Small sizes are more frequent. */
static size_t size(struct life *life)
{
    return is_whole() ? (1 + draw(life, 8)) * GRANULE : 1 + draw(life, 1ULL << (4 + draw(life, 21)));
}

static void give(struct life *life, struct slot *slot);

#include "life_modules.h"
#include "life_pools.h"
#include "life_races.h"
#include "life_shares.h"

static void map(struct life *life, struct slot *slot)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = life->device}};
    if (is_shared()) prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    slot->bytes = (1 + draw(life, 4)) * GRANULE;
    if (!took(cu.cuMemCreate(&slot->handle, slot->bytes, &prop, 0))) return;
    slot->references = 1;
    slot->kind = MAPPED;
    if (cu.cuMemAddressReserve(&slot->pointer, slot->bytes, 0, 0, 0)) slot->pointer = 0;
    if (slot->pointer && cu.cuMemMap(slot->pointer, slot->bytes, 0, slot->handle, 0)) {
        cu.cuMemAddressFree(slot->pointer, slot->bytes);
        slot->pointer = 0;
    }
    CUmemGenericAllocationHandle again;
    if (slot->pointer && !draw(life, 3) && !cu.cuMemRetainAllocationHandle(&again, (void *)slot->pointer))
        slot->references++;
}

/* Unmaps and releases in either order: the last of these calls frees the memory. */
static void unmap(struct life *life, struct slot *slot)
{
    bool first = draw(life, 2);
    for (int i = 0; first && i < slot->references; i++) cu.cuMemRelease(slot->handle);
    if (slot->pointer) {
        cu.cuMemUnmap(slot->pointer, slot->bytes);
        cu.cuMemAddressFree(slot->pointer, slot->bytes);
    }
    for (int i = 0; !first && i < slot->references; i++) cu.cuMemRelease(slot->handle);
}

static void take_array(struct life *life, struct slot *slot)
{
    CUDA_ARRAY3D_DESCRIPTOR shape = {.Width = 1 + draw(life, 300),
                                     .Height = 1 + draw(life, 300),
                                     .Format = CU_AD_FORMAT_FLOAT,
                                     .NumChannels = 1 + 3 * (unsigned)draw(life, 2)};
    if (is_whole()) shape.Width = 512, shape.Height = 256 * (1 + draw(life, 4)), shape.NumChannels = 4;
    CUDA_ARRAY_DESCRIPTOR flat = {shape.Width, shape.Height, shape.Format, shape.NumChannels};
    switch (draw(life, 3)) {
    case 0:
        if (took(cu.cuArrayCreate_v2(&slot->array, &flat))) slot->kind = ARRAY;
        return;
    case 1:
        shape.Depth = 1 + draw(life, 20);
        if (took(cu.cuArray3DCreate_v2(&slot->array, &shape))) slot->kind = ARRAY;
        return;
    default:
        if (took(cu.cuMipmappedArrayCreate(&slot->mipmapped, &shape, 1 + (unsigned)draw(life, is_whole() ? 1 : 5))))
            slot->kind = MIPMAPPED;
    }
}

/* -- calls that fail or do not return */

static __thread sigjmp_buf out;
static __thread volatile sig_atomic_t leaping;

static void leap(int signal_number)
{
    if (leaping) siglongjmp(out, 1);
    signal(signal_number, SIG_DFL);
}

/* Passes an invalid address to the driver, which gets SIGSEGV when it writes there. The handler leaves the call. */
static void leave_a_call(struct life *life)
{
    CUcontext context;
    if (!sigsetjmp(out, 1)) {
        leaping = 1;
        if (draw(life, 4) || !leaves_unseen())
            cu.cuMemAlloc_v2((CUdeviceptr *)NOWHERE, size(life));
        else
            cu.cuCtxCreate_v4(&context, (CUctxCreateParams *)NOWHERE, 0, life->device);
    }
    leaping = 0;
}

static void *live_briefly(void *argument)
{
    struct life *life = argument;
    cu.cuCtxSetCurrent(primary[life->device]);
    leave_a_call(life);
    return NULL;
}

/* Runs a thread that leaves a call and then exits. */
static void start_a_thread(struct life *life)
{
    pthread_t thread;
    if (!pthread_create(&thread, NULL, live_briefly, life)) pthread_join(thread, NULL);
}

/* The driver refuses the calls of a forked child. Only a program that the child executes can allocate memory. Both exit
 * without a free of their memory. */
static _Noreturn void be_a_child(const char *seed, unsigned what, CUdeviceptr pointer)
{
    alarm(CHILD_SECONDS);
    if (what == 1) {
        if (!cu.cuMemAlloc_v2(&pointer, GRANULE)) _exit(1);
        cu.cuMemFree_v2(pointer);
    }
    if (what == 2) execl(self, self, seed, "1", "once", (char *)NULL);
    _exit(what == 2);
}

static void have_a_child(struct life *life)
{
    char seed[24];
    int status;
    unsigned what = (unsigned)draw(life, 3);
    snprintf(seed, sizeof seed, "%" PRIu64, draw(life, 1 << 30));
    pid_t child = fork();
    if (!child) be_a_child(seed, what, life->slots[0].pointer);
    if (child < 0 || waitpid(child, &status, 0) != child || status) orphaned = true;
}

static void nonsense(struct life *life, struct slot *slot)
{
    took(cu.cuMemAlloc_v2(&slot->pointer, draw(life, 2) ? 0 : 1ULL << (34 + draw(life, 30))));
    cu.cuMemFree_v2(draw(life, 1ULL << 40));
    cu.cuMemRelease(draw(life, 1000) + 1000000);
}

static void be_odd(struct life *life, struct slot *slot)
{
    uint64_t what = draw(life, 200);
    switch (is_whole() && what > 2 ? 200 : what) {
    case 0:
        if (cu.cuCtxCreate_v2(&slot->context, 0, life->device)) return;
        cu.cuCtxPopCurrent_v2(&slot->context);
        slot->kind = CONTEXT;
        return;
    case 1:
    case 2:
        if (strcmp(ways, "once")) have_a_child(life);
        return;
    case 3:
    case 4:
    case 5:
        start_a_thread(life);
        return;
    case 6:
    case 7:
    case 8:
        leave_a_call(life);
        return;
    case 9:
        if (strcmp(ways, "once")) race_contexts(life);
        return;
    default:
        nonsense(life, slot);
    }
}

/* -- a life */

static void take(struct life *life, struct slot *slot)
{
    size_t pitch, row, rows;
    if (is_shared() && !draw(life, 3)) {
        draw(life, 8) ? share(life, slot) : draw(life, 4) ? load(life, slot) : set_stack(life);
        return;
    }
    if (has_pools() && draw(life, 2)) {
        take_in_stream(life, slot);
        return;
    }
    switch (draw(life, 12)) {
    case 0:
        row = is_whole() ? 4096 : 1 + draw(life, 5000);
        rows = is_whole() ? 512 * (1 + draw(life, 4)) : 1 + draw(life, 500);
        if (took(cu.cuMemAllocPitch_v2(&slot->pointer, &pitch, row, rows, 4))) slot->kind = POINTER;
        return;
    case 1:
        if (leaves_unseen()) return;
        /* Whole granules, because no driver returns the size to which it rounds managed memory. */
        if (took(cu.cuMemAllocManaged(&slot->pointer, (1 + draw(life, 4)) * GRANULE, CU_MEM_ATTACH_GLOBAL)))
            slot->kind = MANAGED;
        return;
    case 2:
    case 3:
        map(life, slot);
        return;
    case 4:
    case 5:
        take_array(life, slot);
        return;
    case 6:
    case 7:
        if (!is_real()) be_odd(life, slot);
        return;
    default:
        slot->bytes = size(life);
        if (took(cu.cuMemAlloc_v2(&slot->pointer, slot->bytes))) slot->kind = POINTER;
    }
}

static void give(struct life *life, struct slot *slot)
{
    CUipcMemHandle open;
    switch (slot->kind) {
    case MANAGED:
    case POINTER: /* some have been exported before their free */
        if (!draw(life, 8)) cu.cuIpcGetMemHandle(&open, slot->pointer);
        /* some are passed to another thread, which frees them */
        if (!draw(life, 3)) slot->pointer = atomic_exchange(&handed[draw(life, MOST_THREADS)], slot->pointer);
        if (slot->pointer) cu.cuMemFree_v2(slot->pointer);
        break;
    case ARRAY:
        cu.cuArrayDestroy(slot->array);
        break;
    case MIPMAPPED:
        cu.cuMipmappedArrayDestroy(slot->mipmapped);
        break;
    case MAPPED:
        unmap(life, slot);
        break;
    case CONTEXT:
        cu.cuCtxDestroy_v2(slot->context);
        break;
    case POOLED:
        give_pooled(life, slot);
        break;
    case IMPORTED_POOL:
        cu.cuMemFreeAsync(slot->pointer, NULL);
        synchronize();
        cu.cuMemPoolDestroy(slot->pool);
        break;
    case DESCRIPTOR:
        close(slot->file);
        break;
    case MODULE:
        cu.cuModuleUnload(slot->module);
        break;
    default:
        break;
    }
    *slot = (struct slot){0};
}

static long long now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Takes memory, and returns for how long the call waited. */
static long long take_or_wait(struct life *life, struct slot *slot)
{
    long long begun = now_ns();
    take(life, slot);
    long long took_ns = now_ns() - begun;
    return took_ns < WAIT_NS ? 0 : took_ns;
}

/* In a full tenant each request may wait for a second, so a thread that has waited for MOST_WAITS_NS allocates nothing
 * more in this round. At the end, the driver has released all memory that was freed in streams, and a call that the
 * thread has left is settled by its exit. */
static void *live(void *argument)
{
    struct life *life = argument;
    bool pools = has_pools();
    long long waited_ns = 0;
    cu.cuCtxSetCurrent(primary[life->device]);
    if (pools) cu.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING);
    for (uint64_t i = 0; i < goal; i++) {
        struct slot *slot = &life->slots[draw(life, SLOTS)];
        if (slot->kind != NOTHING)
            give(life, slot);
        else if (waited_ns < MOST_WAITS_NS)
            waited_ns += take_or_wait(life, slot);
    }
    if (pools) synchronize();
    if (pools) cu.cuStreamDestroy_v2(stream);
    return NULL;
}

/* If primary contexts end, a real driver (580.159, without agent and shim too) corrupts the heap: six crashes in
 * 325,000 operations, and none in 120,000 without such ends. */
static bool begins_anew(void) { return strcmp(ways, "once") && strcmp(ways, "real"); }

static void live_all(void)
{
    if (begins_anew() && !draw(&lives[0], 12)) begin_anew(&lives[0]);
    for (unsigned t = 0; t < threads; t++)
        if (!primary[lives[t].device]) retain_together(lives[t].device);
    for (unsigned t = 0; t < threads; t++) pthread_create(&lives[t].thread, NULL, live, &lives[t]);
    for (unsigned t = 0; t < threads; t++) pthread_join(lives[t].thread, NULL);
}

/* -- as a process */

static void *execute_again(void *seed)
{
    char count[8];
    snprintf(count, sizeof count, "%u", threads);
    if (is_shared() && atoi((char *)seed) % 3 == 0) keep_driver_files();
    execl(self, self, (char *)seed, count, ways, (char *)NULL);
    exit(3);
}

static void *serve(void *unused)
{
    char line[64];
    pthread_t thread;
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, "exec ", 5)) { /* by any thread: it becomes the first thread, and all others end */
            if (atoi(line + 5) % 2) execute_again(line + 5);
            pthread_create(&thread, NULL, execute_again, line + 5);
            for (;;) pause();
        } else if (!strcmp(line, "leave")) {
            if (pthread_create(&thread, NULL, serve, NULL)) exit(4);
            puts("ok 0 0 0");
            fflush(stdout);
            syscall(SYS_exit, 0);
        } else if (!strcmp(line, "close")) {
            close_all_shared();
            puts("ok 0 0 0");
            fflush(stdout);
            continue;
        }
        goal = strtoull(line, NULL, 10);
        live_all();
        if (orphaned) exit(5);
        printf("ok %" PRIu64 " %" PRIu64 " %u\n", goal * threads, (uint64_t)refused, held_contexts());
        fflush(stdout);
    }
    exit(0);
    return unused;
}

static CUresult be_born(uint64_t seed)
{
    int devices = 1;
    CUresult result = cu.cuInit(0);
    if (!result) result = cu.cuDeviceGetCount(&devices);
    for (unsigned t = 0; !result && t < threads; t++) {
        lives[t].random = seed * MOST_THREADS + t + 1;
        lives[t].device = (int)t % devices;
        if (!primary[lives[t].device]) result = cu.cuDevicePrimaryCtxRetain(&primary[lives[t].device], lives[t].device);
    }
    return result;
}

int main(int count, char **arguments)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    struct sigaction action = {.sa_handler = leap};
    if (count != 4 || !driver) return 2;
#define FIND(name) cu.name = (__typeof__(&name))dlsym(driver, #name);
    DRIVER(FIND)
    sigaction(SIGSEGV, &action, NULL);
    self = arguments[0];
    inheriteds = driver_files(inherited, MOST_INHERITED);
    threads = (unsigned)atoi(arguments[2]) % (MOST_THREADS + 1);
    ways = arguments[3];
    if (is_shared()) open_mailbox();
    CUresult result = be_born(strtoull(arguments[1], NULL, 10));
    if (!strcmp(ways, "once")) {
        goal = 20;
        if (!result) live_all();
        return 0;
    }
    printf("ready %d %d\n", result, getpid());
    fflush(stdout);
    serve(NULL);
}
