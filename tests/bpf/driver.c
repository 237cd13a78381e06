/*
 * A libcuda whose results the test sets: each call returns the values of exported variables, and calls `inside` before
 * it returns. For tests of the kernel's side alone, which need failures, reused pointers and calls that never return.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

void (*admit)(unsigned, uint64_t, unsigned, uint64_t), (*give_back)(unsigned, uint64_t, unsigned, uint64_t);
__thread int result;
__thread uint64_t answer, second_answer;
__thread void (*inside)(void);

void set(int code, uint64_t a, uint64_t b) { result = code, answer = a, second_answer = b; }

static int end(void)
{
    if (inside) {
        void (*hook)(void) = inside;
        int code = result;
        uint64_t first = answer;
        inside = 0;
        hook(); /* it may make calls of its own */
        set(code, first, second_answer);
    }
    return result;
}
static int give(uint64_t *out)
{
    int code = end();
    if (!code) *out = answer;
    return code;
}
int cuInit(unsigned flags) { return end(); }
int cuMemAlloc_v2(uint64_t *p, uint64_t n) { return give(p); }
int cuMemAllocManaged(uint64_t *p, uint64_t n, unsigned flags) { return give(p); }
int cuMemAllocPitch_v2(uint64_t *p, uint64_t *pitch, uint64_t width, uint64_t height, unsigned element)
{
    *pitch = second_answer;
    return give(p);
}
int cuMemFree_v2(uint64_t p) { return end(); }
int cuMemCreate(uint64_t *h, uint64_t n, const void *prop, uint64_t flags) { return give(h); }
int cuMemMap(uint64_t p, uint64_t n, uint64_t offset, uint64_t h, uint64_t flags) { return end(); }
int cuMemUnmap(uint64_t p, uint64_t n) { return end(); }
int cuMemRelease(uint64_t h) { return end(); }
int cuMemExportToShareableHandle(int *file, uint64_t h, int type, uint64_t flags) { return end(); }
int cuIpcGetMemHandle(void *handle, uint64_t p) { return end(); }
int cuMemGetHandleForAddressRange(void *file, uint64_t p, uint64_t n, int type, uint64_t flags) { return end(); }
int cuMemPoolExportToShareableHandle(void *file, uint64_t pool, int type, uint64_t flags) { return end(); }
int cuMemImportFromShareableHandle(uint64_t *h, void *file, int type) { return give(h); }
int cuMemRetainAllocationHandle(uint64_t *h, uint64_t p) { return give(h); }
int cuDevicePrimaryCtxRetain(uint64_t *c, int device) { return give(c); }
int cuDevicePrimaryCtxRelease_v2(int device) { return end(); }
int cuDevicePrimaryCtxReset_v2(int device) { return end(); }
int cuCtxCreate_v2(uint64_t *c, unsigned flags, int device) { return give(c); }
int cuGreenCtxCreate(uint64_t *g, uint64_t what, int device, unsigned flags) { return give(g); }
int cuGreenCtxDestroy(uint64_t g) { return end(); }
int cuArrayCreate_v2(uint64_t *a, const void *shape) { return give(a); }
int cuArray3DCreate_v2(uint64_t *a, const void *shape) { return give(a); }
int cuMipmappedArrayCreate(uint64_t *a, const void *shape, unsigned levels) { return give(a); }
int cuArrayDestroy(uint64_t a) { return end(); }
int cuMipmappedArrayDestroy(uint64_t a) { return end(); }
int cuCtxDestroy_v2(uint64_t c) { return end(); }
int cuDevicePrimaryCtxRelease(int device) { return end(); }
int cuDevicePrimaryCtxReset(int device) { return end(); }
int cuCtxDestroy(uint64_t c) { return cuCtxDestroy_v2(c); }
int cuMemMapArrayAsync(void *list, unsigned count, void *stream) { return end(); }

/* -- things that Python cannot do ------------------------------------------------------------------------------- */

static __thread jmp_buf out;
static void leap(void) { longjmp(out, 1); }
void allocate_and_leap(uint64_t n, int managed)
{
    uint64_t p;
    if (setjmp(out)) return;
    inside = leap;
    managed ? cuMemAllocManaged(&p, n, 1) : cuMemAlloc_v2(&p, n);
}
static void leave_thread(void) { pthread_exit(0); }
static void *allocate_and_end(void *bytes)
{
    uint64_t p;
    inside = leave_thread;
    cuMemAlloc_v2(&p, (uint64_t)bytes);
    return 0;
}
static void *allocate_managed_and_end(void *bytes)
{
    uint64_t p;
    inside = leave_thread;
    cuMemAllocManaged(&p, (uint64_t)bytes, 1);
    return 0;
}
/* Ends a thread during its call of the driver. */
void thread_ends_inside(uint64_t n, int managed)
{
    pthread_t thread;
    pthread_create(&thread, 0, managed ? allocate_managed_and_end : allocate_and_end, (void *)n);
    pthread_join(thread, 0);
}

/* Runs a child that has this address space, or a copy of it. It reads orders from the FIFO `orders`: a: allocate
 * child_bytes; r: release child_bytes of a pool; e: execute another program; x: exit. */
static uint64_t child_bytes, child_pointer;
static int obey(void *orders)
{
    uint64_t p;
    int fd = open(orders, O_RDONLY);
    for (char order; read(fd, &order, 1) == 1;) {
        set(0, child_pointer++, 0);
        if (order == 'a') cuMemAlloc_v2(&p, child_bytes);
        if (order == 'r') give_back(0, child_bytes, 1, 99);
        if (order == 'e') execl("/bin/sleep", "sleep", "100", NULL);
        if (order == 'x') break;
    }
    _exit(0);
}
int start_child(char *orders, int flags, uint64_t pointer, uint64_t n)
{
    char *stack = malloc(1 << 20);
    child_pointer = pointer, child_bytes = n;
    return clone(obey, stack + (1 << 20), SIGCHLD | flags, orders);
}

static uint64_t reused;
static void *allocate_reused(void *bytes)
{
    uint64_t p;
    set(0, reused, 0);
    cuMemAlloc_v2(&p, (uint64_t)bytes);
    return 0;
}
static uint64_t other_bytes;
static void other_thread_allocates(void)
{
    pthread_t thread;
    pthread_create(&thread, 0, allocate_reused, (void *)other_bytes);
    pthread_join(thread, 0);
}
/* Frees p. During this call of the driver, another thread allocates `bytes` and gets the same pointer. */
void free_while_reused(uint64_t p, uint64_t bytes)
{
    reused = p, other_bytes = bytes;
    inside = other_thread_allocates;
    set(0, 0, 0);
    cuMemFree_v2(p);
}

static void *sleep_long(void *unused)
{
    for (;;) pause();
}
/* Ends the first thread of the process. Another thread keeps the process alive. */
void leave_leader(void)
{
    pthread_t thread;
    pthread_create(&thread, 0, sleep_long, 0);
    syscall(SYS_exit, 0);
}

/* Allocates one byte at each of n pointers from `first` on. Returns n. */
uint64_t allocate_many(uint64_t first, uint64_t n)
{
    uint64_t p;
    for (uint64_t i = 0; i < n; i++) {
        set(0, first + i, 0);
        cuMemAlloc_v2(&p, 1);
    }
    return n;
}
void free_many(uint64_t first, uint64_t n)
{
    set(0, 0, 0);
    for (uint64_t i = 0; i < n; i++) cuMemFree_v2(first + i);
}

/* Threads or processes that make one request, so that each gets an entry, and then wait. gather() returns when all have
 * made their request. */
struct gathering {
    _Atomic uint64_t there;
    _Atomic int dispersed;
};
static struct gathering *here; /* shared by the parent and its children */
static void be_seen(void)
{
    admit(0, 0, 3, 77);
    here->there++;
    while (!here->dispersed) syscall(SYS_futex, &here->dispersed, FUTEX_WAIT, 0, 0, 0, 0);
}
static void *be_seen_as_a_thread(void *unused) { return be_seen(), unused; }

/* Repeats a fork that fails: until the previous crowd's processes are reaped, there are too few pids for this one. */
static void fork_to_be_seen(void)
{
    int waits = 0, pid;
    while ((pid = fork()) < 0) {
        if (++waits > 10000) abort();
        usleep(1000);
    }
    if (pid) return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    be_seen();
    _exit(0);
}
static pthread_t *crowd;
static uint64_t crowd_size;
static void start_to_be_seen(pthread_t *thread)
{
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 32768);
    for (int waits = 0; pthread_create(thread, &small, be_seen_as_a_thread, 0); usleep(1000))
        if (++waits > 10000) abort();
}
void gather(uint64_t n, int processes)
{
    if (!here) here = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    here->there = here->dispersed = 0;
    crowd = calloc(n, sizeof *crowd);
    crowd_size = processes ? 0 : n;
    for (uint64_t i = 0; i < n; i++)
        if (processes)
            fork_to_be_seen();
        else
            start_to_be_seen(&crowd[i]);
    while (here->there < n) usleep(1000);
}
void disperse(void)
{
    here->dispersed = 1;
    syscall(SYS_futex, &here->dispersed, FUTEX_WAKE, crowd_size, 0, 0, 0);
    for (uint64_t i = 0; i < crowd_size; i++) pthread_join(crowd[i], 0);
}

/* One of several threads that retain and release the primary context at the same time. */
static void *retain_and_release(void *times)
{
    uint64_t c;
    set(0, 0xC0DE, 0);
    for (uint64_t i = 0; i < (uint64_t)times; i++) {
        cuDevicePrimaryCtxRetain(&c, 0);
        cuDevicePrimaryCtxRelease_v2(0);
    }
    return 0;
}
void race_primary(uint64_t times)
{
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], 0, retain_and_release, (void *)times);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], 0);
}

static void *release_primary(void *unused)
{
    set(0, 0, 0);
    cuDevicePrimaryCtxRelease_v2(0);
    return 0;
}
static void other_thread_releases(void)
{
    pthread_t thread;
    pthread_create(&thread, 0, release_primary, 0);
    pthread_join(thread, 0);
}
/* Retains the primary context. During this call of the driver, another thread releases the only earlier reference. */
int retain_while_released(int code)
{
    uint64_t c;
    inside = other_thread_releases;
    set(code, 0xC0DE, 0);
    return cuDevicePrimaryCtxRetain(&c, 0);
}

static void *admit_and_end(void *bytes)
{
    admit(0, (uint64_t)bytes, 0, 77);
    return 0;
}
void thread_admits_and_ends(uint64_t bytes)
{
    pthread_t thread;
    pthread_create(&thread, 0, admit_and_end, (void *)bytes);
    pthread_join(thread, 0);
}
