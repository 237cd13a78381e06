/*
 * managed: a CUDA program that bypasses the shim, allocates managed memory and tries to hide it. Prints `ready PID`,
 * and then for each line either `ok BYTES`, the bytes that it holds, or `CUDA_ERROR_` with the number of the driver's
 * error.
 *
 * overwrite TIMES   allocates a small and a large piece and frees the small one. When the call for the large piece
 *                   returns, a second thread replaces the returned pointer by that of the small piece.
 * vfork TIMES       allocates in children that share this process's address space
 * load PATH         loads another library with the driver's name
 * stranger          frees everything by that library, which frees nothing
 * free              frees everything
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST 256
#define SMALL (2ull << 20)
#define LARGE (16ull << 20)

static CUresult (*take_managed)(CUdeviceptr *, size_t, unsigned), (*free_memory)(CUdeviceptr);
static CUresult (*free_nothing)(CUdeviceptr);
static struct {
    CUdeviceptr at;
    uint64_t bytes;
} live[MOST];
static unsigned count;
static pid_t parent; /* 0: none */

/* Returns the parent's pid in a child that shares its address space, so that the driver treats both as one process. */
pid_t getpid(void) { return parent ? parent : (pid_t)syscall(SYS_getpid); }

static CUresult enter(CUdeviceptr at, uint64_t bytes, CUresult result)
{
    if (!result) live[count].at = at, live[count++].bytes = bytes;
    return result;
}

/* -- another thread overwrites the results of calls */

static uint64_t given;
static volatile uint64_t lie, told, returned; /* lie: the value that replaces a result; 0: none */

static void *overwrite(void *unused)
{
    for (;;) {
        uint64_t now = lie, found = now ? __atomic_exchange_n(&given, now, __ATOMIC_SEQ_CST) : 0;
        if (found && found != now) returned = found;
        told = now;
    }
    return unused;
}

static void tell(uint64_t now)
{
    lie = now;
    while (told != now) continue;
}

static CUresult take_overwritten(CUdeviceptr by)
{
    given = returned = 0;
    tell(by);
    CUresult result = take_managed((CUdeviceptr *)&given, LARGE, CU_MEM_ATTACH_GLOBAL);
    tell(0);
    return enter(returned ? returned : given, LARGE, result);
}

static CUresult overwrite_times(unsigned times)
{
    static pthread_t thread;
    CUresult result = CUDA_SUCCESS;
    if (!thread && pthread_create(&thread, NULL, overwrite, NULL)) return CUDA_ERROR_UNKNOWN;
    for (; times-- && !result && count + 1 < MOST;) {
        CUdeviceptr small;
        result = take_managed(&small, SMALL, CU_MEM_ATTACH_GLOBAL);
        if (!result) result = take_overwritten(small);
        if (!result) result = free_memory(small);
    }
    return result;
}

/* -- children */

static CUresult vfork_times(unsigned times)
{
    static volatile CUresult result;
    static CUdeviceptr at;
    result = CUDA_SUCCESS;
    for (; times-- && !result && count < MOST;) {
        int status;
        parent = getpid();
        pid_t child = vfork();
        if (!child) {
            result = take_managed(&at, LARGE, CU_MEM_ATTACH_GLOBAL);
            _exit(0);
        }
        parent = 0;
        if (child < 0 || waitpid(child, &status, 0) != child) return CUDA_ERROR_UNKNOWN;
        enter(at, LARGE, result);
    }
    return result;
}

/* -- another library */

static CUresult load(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    free_nothing = library ? (CUresult(*)(CUdeviceptr))dlsym(library, "cuMemFree_v2") : NULL;
    return free_nothing ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

static CUresult free_by_stranger(void)
{
    CUresult result = CUDA_SUCCESS;
    for (unsigned i = 0; i < count && !result; i++) result = free_nothing(live[i].at);
    return result;
}

/* -- commands */

static CUresult obey(const char *what, const char *which)
{
    CUresult result = CUDA_SUCCESS;
    if (!strcmp(what, "overwrite")) return overwrite_times((unsigned)atoi(which));
    if (!strcmp(what, "vfork")) return vfork_times((unsigned)atoi(which));
    if (!strcmp(what, "load")) return load(which);
    if (!strcmp(what, "stranger")) return free_by_stranger();
    for (; count && !result; count -= !result) result = free_memory(live[count - 1].at);
    return result;
}

static uint64_t held(void)
{
    uint64_t bytes = 0;
    for (unsigned i = 0; i < count; i++) bytes += live[i].bytes;
    return bytes;
}

static void *find(void *library, const char *name)
{
    static void *(*look)(void *, const char *);
    void *libc = dlopen("libc.so.6", RTLD_NOW);
    if (!look) look = (void *(*)(void *, const char *))dlvsym(libc, "dlsym", "GLIBC_2.34");
    void *found = look ? look(library, name) : NULL;
    if (found) return found;
    fprintf(stderr, "no %s\n", name);
    exit(3);
}

#define CALL(name, ...) (((__typeof__(&name))find(driver, #name))(__VA_ARGS__))

int main(void)
{
    char line[4096], what[16], which[4080];
    CUcontext context;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver || CALL(cuInit, 0) || CALL(cuDevicePrimaryCtxRetain, &context, 0) || CALL(cuCtxSetCurrent, context))
        return 1;
    take_managed = (__typeof__(take_managed))find(driver, "cuMemAllocManaged");
    free_memory = (__typeof__(free_memory))find(driver, "cuMemFree_v2");
    printf("ready %d\n", getpid());
    for (fflush(stdout); fgets(line, sizeof line, stdin); fflush(stdout)) {
        which[0] = 0;
        if (sscanf(line, "%15s %4079s", what, which) < 1) return 2;
        CUresult result = obey(what, which);
        if (result)
            printf("CUDA_ERROR_%d\n", result);
        else
            printf("ok %" PRIu64 "\n", held());
    }
    return 0;
}
