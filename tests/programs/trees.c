/* trees N BYTES: starts N processes, one after the other, in every way in which a process can start. Each allocates
 * BYTES of device memory and exits, except forked children that make no call of the driver. The first half starts
 * before this program calls the driver. Then the program allocates BYTES itself, and keeps them while the second half
 * runs. It prints "ok GOOD FREE-BEFORE FREE-AFTER" when all have exited: how many succeeded, and the free bytes that
 * the program is shown before and after the second half. It exits when its stdin ends. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <inttypes.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;
static char *self, *size;

static bool take(uint64_t bytes)
{
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    CUresult (*init)(unsigned) = lib ? dlsym(lib, "cuInit") : NULL;
    CUresult (*retain)(CUcontext *, CUdevice) = lib ? dlsym(lib, "cuDevicePrimaryCtxRetain") : NULL;
    CUresult (*set)(CUcontext) = lib ? dlsym(lib, "cuCtxSetCurrent") : NULL;
    CUresult (*alloc)(CUdeviceptr *, size_t) = lib ? dlsym(lib, "cuMemAlloc_v2") : NULL;
    CUcontext context;
    CUdeviceptr at;
    return alloc && !init(0) && !retain(&context, 0) && !set(context) && !alloc(&at, bytes);
}

static uint64_t left(void)
{
    size_t free_bytes = 0, total = 0;
    CUresult (*info)(size_t *, size_t *) = dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuMemGetInfo_v2");
    return info && !info(&free_bytes, &total) ? free_bytes : 0;
}

/* Returns the same figure after the driver has freed the memory of exited processes: unchanged for 0.5 s. */
static uint64_t left_at_rest(void)
{
    uint64_t bytes = left();
    for (unsigned same = 0; same < 10; same++) {
        usleep(50000);
        uint64_t now = left();
        if (now != bytes) same = 0;
        bytes = now;
    }
    return bytes;
}

static int leaf(void) { return take(strtoull(size, NULL, 0)) ? 0 : 1; }

static bool well(pid_t child)
{
    int status = -1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

static void become_a_leaf(void)
{
    execl(self, self, "leaf", size, (char *)NULL);
    _exit(2);
}

/* -- ways for every process */

static bool by_exec(void)
{
    pid_t child = fork();
    if (!child) become_a_leaf();
    return well(child);
}

static bool by_vfork(void)
{
    pid_t child = vfork();
    if (!child) become_a_leaf();
    return well(child);
}

static bool by_spawn(void)
{
    char *words[] = {self, "leaf", size, NULL};
    pid_t child;
    return !posix_spawn(&child, self, NULL, NULL, words, environ) && well(child);
}

/* Starts a child that makes no call of the driver. */
static bool by_fork_alone(void)
{
    pid_t child = fork();
    if (!child) _exit(0);
    return well(child);
}

/* -- ways for a process that has never called the driver */

static bool by_fork(void)
{
    pid_t child = fork();
    if (!child) _exit(leaf());
    return well(child);
}

/* Starts a process, and its parent exits. This program becomes its parent, instead of init. */
static bool by_double_fork(void)
{
    int status = -1;
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    pid_t child = fork();
    if (!child) {
        if (!fork()) _exit(leaf());
        _exit(0);
    }
    return well(child) && wait(&status) > 0 && status == 0;
}

static bool as_a_daemon(void)
{
    pid_t child = fork();
    if (!child) {
        setsid();
        for (int i = 0; i < 1024; i++) close(i);
        _exit(leaf());
    }
    return well(child);
}

/* Starts a process that executes another program while it holds memory. */
static bool by_exec_in_the_middle(void)
{
    pid_t child = fork();
    if (!child) {
        if (leaf()) _exit(3);
        become_a_leaf();
    }
    return well(child);
}

static bool (*const open_to_all[])(void) = {by_exec, by_vfork, by_spawn, by_fork_alone};
static bool (*const bare[])(void) = {by_fork, by_double_fork, as_a_daemon, by_exec_in_the_middle, by_spawn, by_vfork};

static unsigned grow(bool (*const ways[])(void), unsigned n_ways, unsigned n)
{
    unsigned good = 0;
    for (unsigned i = 0; i < n; i++) {
        good += ways[i % n_ways]();
        usleep(5000); /* the driver needs 0.1 s to free each one's memory: faster starts would fill the device */
    }
    return good;
}

int main(int argc, char **argv)
{
    self = argv[0];
    size = argv[argc - 1];
    if (argc == 3 && argv[1][0] == 'l') return leaf();
    if (argc != 3) return 2;
    unsigned n = (unsigned)atoi(argv[1]), good = grow(bare, 6, n / 2);
    if (leaf()) return 3;
    uint64_t before = left_at_rest();
    good += grow(open_to_all, 4, n - n / 2);
    printf("ok %u %" PRIu64 " %" PRIu64 "\n", good, before, left_at_rest());
    fflush(stdout);
    while (getchar() != EOF) {
    }
    return 0;
}
