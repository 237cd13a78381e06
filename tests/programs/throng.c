/* throng SHIM CGROUP N: N processes in CGROUP. Each process calls the shim's fgpu_admit once, with the kind of a hello,
 * and makes no other call. Prints "ready" when all processes have done this. They run until they are killed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define HELLO 3

static int enter(const char *cgroup)
{
    char path[4096], pid[32];
    int length = snprintf(pid, sizeof pid, "%d", getpid());
    snprintf(path, sizeof path, "%s/cgroup.procs", cgroup);
    int file = open(path, O_WRONLY);
    return file >= 0 && write(file, pid, (size_t)length) == length && !close(file);
}

int main(int count, char **arguments)
{
    void *shim = count == 4 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    void (*admit)(uint32_t, uint64_t, uint32_t, uint64_t) = shim ? dlsym(shim, "fgpu_admit") : NULL;
    int asked[2];
    if (!admit || pipe(asked) || !enter(arguments[2])) return 1;
    long number = strtol(arguments[3], NULL, 10);
    for (long i = 0; i < number; i++) {
        if (fork()) continue;
        admit(0, 0, HELLO, 1);
        if (write(asked[1], ".", 1) != 1) return 1;
        for (;;) pause();
    }
    char byte;
    for (long i = 0; i < number; i++)
        if (read(asked[0], &byte, 1) != 1) return 1;
    puts("ready");
    fflush(stdout);
    for (;;) pause();
}
