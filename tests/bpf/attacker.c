/*
 * attacker DRIVER SHIM PAGE WAY TIMES SEED: a process in a level that calls the probe symbols with arguments that no
 * shim uses. PAGE is a descriptor of the level's usage page. The process first allocates HELD bytes. After TIMES calls
 * it prints a number, which depends on WAY:
 *
 * flood   requests more than the limit                        -> how many requests were refused
 * sizes   requests impossible sizes of every kind of memory   -> how many requests were not refused
 * noise   calls probe symbols with any arguments, frees       -> after how many calls `used` was less than HELD
 *         memory that it does not have, and makes frees
 *         that the driver refuses
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "fgpu.h"

#define HELD (64ULL << 20)
#define POINTER 0x1000ULL

static void (*admit)(unsigned, __u64, unsigned, __u64), (*give_back)(unsigned, __u64, unsigned, __u64);
static int (*allocate)(__u64 *, __u64), (*free_it)(__u64), (*release)(__u64);
static void (*set)(int, __u64, __u64);
static const volatile struct fgpu_usage_page *page;
static __u64 state, tickets = 1 << 30;

static __u64 any(void) /* xorshift64* */
{
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dULL;
}

static __u64 any_size(void)
{
    __u64 bits = any() % 65;
    return bits ? any() >> (64 - bits) : 0;
}

/* The verdict, as a shim reads it; -1: no answer. */
static int ask(__u64 bytes, unsigned kind, unsigned device)
{
    __u64 ticket = ++tickets;
    admit(device, bytes, kind, ticket);
    __u64 word = page->verdicts[ticket & (FGPU_VERDICTS - 1)];
    return word >> 2 == ticket ? (int)(word & 3) : -1;
}

static long flood(long times)
{
    long refused = 0;
    for (long i = 0; i < times; i++) refused += ask(1ULL << 50, FGPU_MEMORY, 0) == FGPU_REFUSED;
    return refused;
}

static long sizes(long times)
{
    static const unsigned kinds[] = {FGPU_MEMORY, FGPU_POOL, FGPU_VMM};
    long admitted = 0;
    for (long i = 0; i < times; i++) {
        __u64 bytes = i % 3 ? 1ULL << 40 | any() : ~0ULL - any() % 4096;
        admitted += ask(bytes, kinds[any() % 3], 0) != FGPU_REFUSED;
    }
    return admitted;
}

static void call_any(void)
{
    unsigned device = any() % 8 ? 0 : (unsigned)any(), kind = any() % 4 ? any() % 8 : (unsigned)any();
    switch (any() % 5) {
    case 0:
        admit(device, any_size(), kind, any());
        break;
    case 1:
        give_back(device, any_size(), kind, any());
        break;
    case 2:
        give_back(0, any_size(), FGPU_POOL, any());
        break;
    case 3:
        set(1, 0, 0); /* the driver refuses the free: as a double free, or of another process's memory */
        free_it(any() % 2 ? POINTER : any());
        break;
    default:
        set(0, 0, 0);
        any() % 2 ? free_it(any() | 1ULL << 63) : release(any());
    }
}

static long noise(long times)
{
    long below = 0;
    for (long i = 0; i < times; i++) {
        call_any();
        below += page->devices[0].used < HELD;
    }
    return below;
}

static void *needed(void *library, const char *name)
{
    void *found = dlsym(library, name);
    if (!found) exit(3);
    return found;
}

int main(int argc, char **argv)
{
    __u64 pointer;
    if (argc != 7) return 2;
    void *driver = dlopen(argv[1], RTLD_NOW), *shim = dlopen(argv[2], RTLD_NOW);
    if (!driver || !shim) return 3;
    admit = needed(shim, "fgpu_admit"), give_back = needed(shim, "fgpu_release");
    allocate = needed(driver, "cuMemAlloc_v2"), free_it = needed(driver, "cuMemFree_v2");
    release = needed(driver, "cuMemRelease"), set = needed(driver, "set");
    page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, atoi(argv[3]), 0);
    if (page == MAP_FAILED) return 4;
    state = strtoull(argv[6], NULL, 0) | 1;
    set(0, POINTER, 0);
    if (ask(HELD, FGPU_MEMORY, 0) != FGPU_ADMITTED || allocate(&pointer, HELD)) return 5;
    long times = atol(argv[5]);
    long found = *argv[4] == 'f' ? flood(times) : *argv[4] == 's' ? sizes(times) : noise(times);
    printf("%ld\n", found);
    fflush(stdout);
    getchar(); /* wait, so that the test can read the ledger */
    return 0;
}
