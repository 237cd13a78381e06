/* The director: sends orders to the actors, and prints their memory in NVML after each step. */
#define _GNU_SOURCE
#include "conformance_actors.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ACTORS 4
#define ROWS 64
#ifndef SETTLED_MS
#define SETTLED_MS 400 /* the driver takes up to 100 ms to free the memory of an exited process */
#endif

static struct role roles[ACTORS];
static unsigned n_roles;
static long long at_rest;
static nvmlDevice_t device;

static void rest(long ms)
{
    struct timespec moment = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&moment, NULL);
}

static long long in_use(void)
{
    nvmlMemory_v2_t memory;
    memset(&memory, 0, sizeof memory);
    memory.version = nvmlMemory_v2;
    CALL(nvmlDeviceGetMemoryInfo_v2, device, &memory);
    return (long long)memory.used;
}

static long long row_of(pid_t pid)
{
    static nvmlProcessInfo_t rows[ROWS];
    unsigned n = ROWS;
    long long bytes = 0;
    if (CALL(nvmlDeviceGetComputeRunningProcesses_v3, device, &n, rows)) return -1;
    for (unsigned i = 0; i < n; i++)
        if ((pid_t)rows[i].pid == pid) bytes += (long long)rows[i].usedGpuMemory;
    return bytes;
}

void show(const char *what)
{
    char name[96];
    rest(SETTLED_MS);
    snprintf(name, sizeof name, "%s.device", what);
    say(name, (in_use() - at_rest + (long long)MIB / 2) / (long long)MIB);
    for (unsigned i = 0; i < n_roles; i++) {
        snprintf(name, sizeof name, "%s.%c", what, (char)('a' + i));
        say(name, row_of(roles[i].pid) / (long long)MIB);
    }
}

struct role *role_enter(void)
{
    struct role *role = &roles[n_roles++];
    int ends[2];
    char number[16];
    *role = (struct role){.file = -1};
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) exit(1);
    role->sock = ends[0];
    role->pid = fork();
    if (!role->pid) {
        fcntl(ends[1], F_SETFD, 0);
        snprintf(number, sizeof number, "%d", ends[1]);
        execl("/proc/self/exe", "conformance", "--actor", number, (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    collect(role->sock, &role->last);
    return role;
}

void drop_file(struct role *role)
{
    if (role->file >= 0) close(role->file);
    role->file = -1;
}

long long tell_with(struct role *role, enum act act, long long number, const struct order *more, int file)
{
    struct order order = more ? *more : (struct order){0};
    order.act = act;
    order.number = number;
    if (post(role->sock, &order, &file, file >= 0)) return -1;
    int came = collect(role->sock, &role->last);
    if (came >= 0) {
        drop_file(role);
        role->file = came;
    }
    return role->last.number;
}

long long tell(struct role *role, enum act act, long long number) { return tell_with(role, act, number, NULL, -1); }

void ask(const char *what, struct role *role, enum act act, long long number) { say(what, tell(role, act, number)); }

void ask_with(const char *what, struct role *role, enum act act, const struct role *from)
{
    say(what, tell_with(role, act, 0, &from->last, from->file));
}

void role_end(struct role *role)
{
    if (role->ended) return;
    role->ended = 1;
    kill(role->pid, SIGKILL);
    waitpid(role->pid, NULL, 0);
}

void roles_begin(void)
{
    CALL(nvmlInit_v2);
    CALL(nvmlDeviceGetHandleByIndex_v2, 0, &device);
    rest(SETTLED_MS);
    at_rest = in_use();
    n_roles = 0;
}

void roles_end(const char *what)
{
    char name[96];
    for (unsigned i = 0; i < n_roles; i++) {
        drop_file(&roles[i]);
        role_end(&roles[i]);
        close(roles[i].sock); /* an actor that is a forked child reads end of file, and exits */
    }
    n_roles = 0;
    rest(SETTLED_MS);
    snprintf(name, sizeof name, "%s.after", what);
    say(name, (in_use() - at_rest + (long long)MIB / 2) / (long long)MIB);
}
