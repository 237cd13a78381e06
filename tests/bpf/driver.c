/*
 * A libcuda that does as it is told: what each call answers lies in exported variables, and `inside` is called in the
 * middle of it. For tests of the kernel side alone, which need failures, reused pointers and calls that never return.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

__thread int result;
__thread uint64_t answer, second_answer;
__thread void (*inside)(void);

static int end(void)
{
    if (inside) {
        void (*hook)(void) = inside;
        inside = 0;
        hook();
    }
    return result;
}
static int give(uint64_t *out)
{
    int code = end();
    if (!code) *out = answer;
    return code;
}
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
int cuMemRetainAllocationHandle(uint64_t *h, uint64_t p) { return give(h); }
int cuDevicePrimaryCtxRetain(uint64_t *c, int device) { return give(c); }
int cuDevicePrimaryCtxRelease_v2(int device) { return end(); }
int cuDevicePrimaryCtxReset_v2(int device) { return end(); }
int cuCtxCreate_v2(uint64_t *c, unsigned flags, int device) { return give(c); }
int cuArrayCreate_v2(uint64_t *a, const void *shape) { return give(a); }
int cuArray3DCreate_v2(uint64_t *a, const void *shape) { return give(a); }
int cuMipmappedArrayCreate(uint64_t *a, const void *shape, unsigned levels) { return give(a); }
int cuArrayDestroy(uint64_t a) { return end(); }
int cuMipmappedArrayDestroy(uint64_t a) { return end(); }
int cuCtxDestroy_v2(uint64_t c) { return end(); }

void set(int code, uint64_t a, uint64_t b) { result = code, answer = a, second_answer = b; }

/* -- things that Python cannot do ------------------------------------------------------------------------------- */

static __thread jmp_buf out;
static void leap(void) { longjmp(out, 1); }
void allocate_and_leap(uint64_t n)
{
    uint64_t p;
    if (setjmp(out)) return;
    inside = leap;
    cuMemAlloc_v2(&p, n);
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
/* Frees p; while the driver is at it, another thread is given the same pointer for `bytes`. */
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
/* The leader goes; another thread stays and keeps the process alive. */
void leave_leader(void)
{
    pthread_t thread;
    pthread_create(&thread, 0, sleep_long, 0);
    syscall(SYS_exit, 0);
}

void (*admit)(unsigned, uint64_t, unsigned, uint64_t);
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
