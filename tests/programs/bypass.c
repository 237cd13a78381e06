/*
 * bypass WAY [DRIVER]: a CUDA program that calls the driver without the shim. Prints `ready PID`, and for each line
 * `alloc BYTES` either `ok` or `CUDA_ERROR_` with the number of the driver's error. No library can be preloaded into
 * the program if it is linked statically.
 *
 * WAY is how the program finds the driver's functions, and what it allocates:
 *
 * plain      dlopen and dlsym, as in most programs
 * deepbind   as plain, with RTLD_DEEPBIND
 * dlvsym     the C library's own dlsym, which dlvsym finds by its version
 * symbols    the symbol table of the driver's library
 * after      as symbols, in the library DRIVER, after an allocation of 2 MiB by the genuine library
 * lies       as dlvsym, after a request for the admission of one byte
 * registers  as dlvsym, after the request by which the shim registers; the shim itself is not used
 * handles    as plain, and a handle, which needs no context: libraries in a static program have no thread-local storage
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define HELLO 3 /* FGPU_HELLO in bpf/fgpu.h */

static void *driver;
static const char *way;
static void (*admit)(unsigned, uint64_t, unsigned, uint64_t);

static void *by_symbols(const char *name)
{
    struct link_map *map;
    const ElfW(Sym) *symbols = NULL;
    const char *strings = NULL;
    if (dlinfo(driver, RTLD_DI_LINKMAP, &map)) return NULL;
    for (const ElfW(Dyn) *d = map->l_ld; d->d_tag; d++) {
        if (d->d_tag == DT_SYMTAB) symbols = (void *)d->d_un.d_ptr;
        if (d->d_tag == DT_STRTAB) strings = (void *)d->d_un.d_ptr;
    }
    for (; symbols && (const char *)symbols < strings; symbols++)
        if (symbols->st_value && !strcmp(strings + symbols->st_name, name))
            return (void *)(map->l_addr + symbols->st_value);
    return NULL;
}

static void *by_version(const char *name)
{
    void *libc = dlopen("libc.so.6", RTLD_NOW);
    void *(*look)(void *, const char *) = libc ? dlvsym(libc, "dlsym", "GLIBC_2.34") : NULL;
    return look ? look(driver, name) : NULL;
}

static bool admits(void) { return !strcmp(way, "lies") || !strcmp(way, "registers"); }

static void *find(const char *name)
{
    void *found = !strcmp(way, "symbols")              ? by_symbols(name)
                  : !strcmp(way, "dlvsym") || admits() ? by_version(name)
                                                       : dlsym(driver, name);
    if (found) return found;
    fprintf(stderr, "no %s\n", name);
    exit(3);
}

#define CALL(name, ...) (((__typeof__(&name))find(#name))(__VA_ARGS__))

static int take_handle(uint64_t bytes)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};
    CUmemGenericAllocationHandle handle;
    CUresult result = CALL(cuInit, 0);
    return result ? (int)result : (int)CALL(cuMemCreate, &handle, bytes, &prop, 0);
}

static CUcontext context;

static int take(uint64_t bytes)
{
    static uint64_t ticket = 1 << 20;
    CUdeviceptr pointer;
    CUresult result = context ? CUDA_SUCCESS : CALL(cuInit, 0);
    if (!result && !context) result = CALL(cuDevicePrimaryCtxRetain, &context, 0);
    if (!result) result = CALL(cuCtxSetCurrent, context);
    if (admit && !strcmp(way, "lies")) admit(0, 1, 0, ++ticket);
    return result ? (int)result : (int)CALL(cuMemAlloc_v2, &pointer, bytes);
}

static int take_from_the_genuine_library(void)
{
    way = "plain";
    driver = dlopen("libcuda.so.1", RTLD_NOW);
    int result = driver ? take(2 << 20) : 1;
    context = NULL;
    way = "symbols";
    return result;
}

int main(int argc, char **argv)
{
    unsigned long long bytes;
    char word[16], argument[200];
    if (argc != 2 && argc != 3) return 2;
    way = argv[1];
    if (!strcmp(way, "after") && take_from_the_genuine_library()) return 5;
    driver = dlopen(argc == 3 ? argv[2] : "libcuda.so.1", RTLD_NOW | (!strcmp(way, "deepbind") ? RTLD_DEEPBIND : 0));
    if (!driver) {
        fprintf(stderr, "%s\n", dlerror());
        return 3;
    }
    if (admits() && !(admit = dlsym(RTLD_DEFAULT, "fgpu_admit"))) return 4;
    if (!strcmp(way, "registers")) admit(0, 0, HELLO, 1);
    printf("ready %d\n", getpid());
    for (fflush(stdout); scanf(" %15s %199s", word, argument) == 2; fflush(stdout)) {
        if (!strcmp(word, "open")) {
            printf("%d\n", open(argument, O_RDONLY) < 0 ? errno : 0);
            continue;
        }
        bytes = strtoull(argument, NULL, 10);
        int result = strcmp(way, "handles") ? take(bytes) : take_handle(bytes);
        printf(result ? "CUDA_ERROR_%d\n" : "ok\n", result);
    }
    return 0;
}
