/* charged.h: the common parts of bench/programs/charged_*.c: marks, roles, the driver's functions by name.
 *
 * A program is started as `PROGRAM SCENARIO`. Each time after memory was allocated or freed, it writes
 * `mark|TEXT|A=PID B=PID|BYTES` to stdout and waits for a line on stdin. BYTES are charged and need not be on the
 * device. Lines of the kinds `note`, `reuse` and `end` have the same form and need no reply; `end` is the last line.
 * All processes of a scenario share both streams, and only one process at a time uses them. */
#ifndef FGPU_BENCH_CHARGED_H
#define FGPU_BENCH_CHARGED_H

#define _GNU_SOURCE
#include <cuda.h>
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MIB (1ull << 20)
#define GIB (1ull << 30)
#define SIZE (2 * GIB)
#define SECONDS 60 /* each process of a scenario is killed after this time, whether or not others still run */

static char roles[64];
static unsigned long long host_bytes; /* managed memory: charged whether it is on the device or on the host */

static inline void say(const char *kind, const char *text)
{
    char line[640];
    int length = snprintf(line, sizeof line, "%s|%s|%s|%llu\n", kind, text, roles, host_bytes);
    if (write(STDOUT_FILENO, line, (size_t)length) != length) _exit(90);
}

static inline void note(const char *format, ...)
{
    char text[512];
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    say("note", text);
}

static inline void mark(const char *text)
{
    char byte;
    say("mark", text);
    do {
        if (read(STDIN_FILENO, &byte, 1) != 1) _exit(91);
    } while (byte != '\n');
}

static inline void role(char name, pid_t pid)
{
    size_t length = strlen(roles);
    snprintf(roles + length, sizeof roles - length, "%s%c=%d", length ? " " : "", name, pid);
}

static inline void finish(void)
{
    say("end", "");
    _exit(0);
}

/* -- the driver: found by dlsym, so that the program can be built on a machine without a driver */

static inline void *driver_symbol(const char *name)
{
    static void *library;
    if (!library) library = dlopen("libcuda.so.1", RTLD_NOW);
    return library ? dlsym(library, name) : NULL;
}

#define TEXT_OF(x) #x
#define NAME_OF(x) TEXT_OF(x)
#define CU(name, ...)                                                                                                  \
    ({                                                                                                                 \
        static __typeof__(&name) function_;                                                                            \
        if (!function_) function_ = (__typeof__(&name))driver_symbol(NAME_OF(name));                                   \
        CUresult result_ = function_ ? function_(__VA_ARGS__) : CUDA_ERROR_NOT_FOUND;                                  \
        if (result_) note("%s returns %d", NAME_OF(name), (int)result_);                                               \
        result_;                                                                                                       \
    })

static inline CUcontext begin(void)
{
    CUcontext context = NULL;
    CU(cuInit, 0);
    CU(cuDevicePrimaryCtxRetain, &context, 0);
    CU(cuCtxSetCurrent, context);
    return context;
}

static inline CUdeviceptr allocate(size_t bytes)
{
    CUdeviceptr at = 0;
    CU(cuMemAlloc, &at, bytes);
    return at;
}

static inline CUmemGenericAllocationHandle create(size_t bytes, int is_shareable)
{
    CUmemGenericAllocationHandle handle = 0;
    CUmemAllocationProp kind;
    memset(&kind, 0, sizeof kind);
    kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    kind.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    if (is_shareable) kind.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CU(cuMemCreate, &handle, bytes, &kind, 0);
    return handle;
}

static inline CUdeviceptr map(CUmemGenericAllocationHandle handle, size_t bytes)
{
    CUmemAccessDesc access = {{.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUdeviceptr at = 0;
    if (!handle || CU(cuMemAddressReserve, &at, bytes, 0, 0, 0)) return 0;
    CU(cuMemMap, at, bytes, 0, handle, 0);
    CU(cuMemSetAccess, at, bytes, &access, 1);
    return at;
}

static inline int export_fd(CUmemGenericAllocationHandle handle)
{
    int fd = -1;
    if (handle) CU(cuMemExportToShareableHandle, &fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    return fd;
}

/* Run the scenario that the command line names. The table ends with an empty row. */
struct scenario {
    const char *name;
    void (*run)(void);
};

static inline int run_one(const struct scenario *table, int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_IGN); /* the kernel reaps children */
    alarm(SECONDS);
    for (; argc > 1 && table->name; table++) {
        if (strcmp(table->name, argv[1])) continue;
        table->run();
        return 0;
    }
    fprintf(stderr, "usage: %s SCENARIO\n", argv[0]);
    return 2;
}

#endif
