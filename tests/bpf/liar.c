/*
 * liar DRIVER PAGE TIMES SEED: a tenant in which the return probe of half of the allocations reads the pointer or
 * handle of an older allocation, as if a second thread had overwritten the returned one. The own name of the
 * older allocation was read. PAGE is a descriptor of the level's usage page.
 *
 * Prints how many calls released more than the driver library freed, or charged less than it allocated. Then prints how
 * many bytes the library has allocated and not freed after the last call.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "fgpu.h"

#define MOST 64
#define NAMES 0x100000ULL
#define ADDRESSES 0x7000000000ULL

enum kind { PLAIN, MANAGED, HANDLE, ARRAY, KINDS };
static struct {
    enum kind kind;
    __u64 name, bytes;
    int handles, mapped, exported, forged; /* forged: its name was not read */
} live[MOST];                              /* allocations of the driver library */
static int count;
static __u64 state, names = NAMES, lost; /* lost: bytes that were exported and that this process has freed */

static int (*allocate)(__u64 *, __u64), (*allocate_managed)(__u64 *, __u64, unsigned), (*free_pointer)(__u64);
static int (*create)(__u64 *, __u64, const void *, __u64), (*release)(__u64);
static int (*map)(__u64, __u64, __u64, __u64, __u64), (*unmap)(__u64, __u64);
static int (*export_handle)(int *, __u64, int, __u64), (*export_pointer)(void *, __u64);
static int (*make_array)(__u64 *, const void *), (*destroy_array)(__u64);
static void (*set)(int, __u64, __u64);
static const volatile struct fgpu_usage_page *page;

static __u64 any(void) /* xorshift64* */
{
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (state * 0x2545f4914f6cdd1dULL) >> 8;
}

static void take(void)
{
    struct {
        __u64 width, height;
        __u32 format, channels;
    } shape = {any() % 4096 + 1, 1, 1, 1};
    static const __u32 on_the_device[8] = {1, 0, 1, 0};
    enum kind kind = any() % KINDS;
    __u64 given, bytes = kind == ARRAY ? shape.width : any() % (1 << 20) + 1, name = names++;
    if (count == MOST) return;
    int older = count ? any() % count : 0, forged = count && any() % 2 && !live[older].forged;
    set(0, forged ? live[older].name : name, 0);
    if (kind == PLAIN) allocate(&given, bytes);
    if (kind == MANAGED) allocate_managed(&given, bytes, 1);
    if (kind == HANDLE) create(&given, bytes, on_the_device, 0);
    if (kind == ARRAY) make_array(&given, &shape);
    live[count].kind = kind, live[count].name = name, live[count].bytes = bytes;
    live[count].handles = 1, live[count].mapped = live[count].exported = 0, live[count].forged = forged;
    count++;
}

/* Removes an allocation without references, which the driver library has freed. Exported memory stays on the device. */
static void drop(int at)
{
    if (live[at].handles || live[at].mapped) return;
    if (live[at].exported) lost += live[at].bytes;
    live[at] = live[--count];
}

static void give_up(int at)
{
    set(0, 0, 0);
    live[at].handles = 0;
    if (live[at].kind == HANDLE)
        release(live[at].name);
    else if (live[at].kind == ARRAY)
        destroy_array(live[at].name);
    else
        free_pointer(live[at].name);
    drop(at);
}

static void use_mapping(int at)
{
    set(0, 0, 0);
    if (live[at].kind != HANDLE) return;
    live[at].mapped = !live[at].mapped;
    if (live[at].mapped)
        map(ADDRESSES + live[at].name * 4096, 4096, 0, live[at].name, 0);
    else
        unmap(ADDRESSES + live[at].name * 4096, 4096);
    drop(at);
}

static void export(int at)
{
    set(0, 0, 0);
    if (!live[at].handles || live[at].kind == ARRAY) return;
    live[at].exported = 1;
    if (live[at].kind == HANDLE)
        export_handle(NULL, live[at].name, 1, 0);
    else
        export_pointer(NULL, live[at].name);
}

static void call_any(void)
{
    int what = any() % 16, at = count ? any() % count : 0;
    if (!count || what < 7)
        take();
    else if (what < 13 && live[at].handles)
        give_up(at);
    else if (what < 15)
        use_mapping(at);
    else if (any() % 16 == 0)
        export(at);
    else
        set(1, 0, 0), free_pointer(names + any() % 16); /* it has no such pointer */
}

static __u64 held(void)
{
    __u64 bytes = lost;
    for (int i = 0; i < count; i++) bytes += live[i].bytes;
    return bytes;
}

static void *needed(void *library, const char *name)
{
    void *found = dlsym(library, name);
    if (!found) exit(3);
    return found;
}

static void find_functions(void *driver)
{
    allocate = needed(driver, "cuMemAlloc_v2"), allocate_managed = needed(driver, "cuMemAllocManaged");
    free_pointer = needed(driver, "cuMemFree_v2"), create = needed(driver, "cuMemCreate");
    release = needed(driver, "cuMemRelease"), map = needed(driver, "cuMemMap"), unmap = needed(driver, "cuMemUnmap");
    export_handle = needed(driver, "cuMemExportToShareableHandle");
    export_pointer = needed(driver, "cuIpcGetMemHandle"), make_array = needed(driver, "cuArrayCreate_v2");
    destroy_array = needed(driver, "cuArrayDestroy"), set = needed(driver, "set");
}

int main(int argc, char **argv)
{
    long wrong = 0;
    long long beyond = 0; /* bytes that are charged and that the driver library does not hold */
    if (argc != 5) return 2;
    void *driver = dlopen(argv[1], RTLD_NOW);
    if (!driver) return 3;
    find_functions(driver);
    page = mmap(NULL, sizeof *page, PROT_READ, MAP_SHARED, atoi(argv[2]), 0);
    if (page == MAP_FAILED) return 4;
    state = strtoull(argv[4], NULL, 0) | 1;
    for (long i = atol(argv[3]); i; i--) {
        call_any();
        long long before = beyond;
        beyond = (long long)page->devices[0].used - (long long)held();
        wrong += beyond < before;
    }
    printf("%ld %lld\n", wrong, held());
    fflush(stdout);
    getchar(); /* wait, so that the test can read the ledger */
    return 0;
}
