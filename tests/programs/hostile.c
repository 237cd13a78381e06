/*
 * hostile SEED SECONDS FOLDER CGROUP LIBCUDA MOST_MIB [KIND...]: a tenant that attacks fgpu and its neighbours for
 * SECONDS. All its choices follow from SEED. If it is started as root, it becomes user 65534 and makes this user the
 * owner of CGROUP. LIBCUDA is a copy of the driver's library. A bypass allocates up to MOST_MIB, and adds its pid to
 * FOLDER/bypasses. The named KINDs of act are left out.
 *
 * Prints a line `KIND TRIED DONE KILLED REFUSED` for each kind of act: how many acts were begun, succeeded, were ended
 * by SIGKILL, and were refused. Then prints `accepted N`, the number of requests that the control socket has granted.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <inttypes.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TENANT 65534
#define MOST_CHILDREN 10
#define MOST_BYPASSES 2 /* so that the device has room for the neighbours, however much bypasses allocate */
#define MOST_KEPT 8
#define MIB (1ull << 20)

enum outcome { GOOD, BAD, ACCEPTED, REFUSED }; /* exit status of an act */

static const char *folder, *cgroup, *libcuda, *self;
static uint64_t state;
static int exports[2], bypasses;
static uint64_t most_mib;

static uint64_t any(void) /* xorshift64* */
{
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545f4914f6cdd1dULL;
}

static uint64_t between(uint64_t least, uint64_t most) { return least + any() % (most - least + 1); }

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000ll + ts.tv_nsec / 1000000;
}

static void pause_ms(uint64_t ms) { usleep((useconds_t)ms * 1000); }

#include "hostile_acts.h"

/* -- the kinds of act, and their results */

static struct kind {
    const char *name;
    enum outcome (*act)(void);
    unsigned often;
    unsigned long tries, good, killed, refused;
} kinds[] = {{"work", work, 4, 0, 0, 0, 0},
             {"status_bytes", write_status, 3, 0, 0, 0, 0},
             {"shim_calls", call_shim, 3, 0, 0, 0, 0},
             {"hello_garbage", say_garbage, 3, 0, 0, 0, 0},
             {"hello_partial", say_part, 3, 0, 0, 0, 0},
             {"hello_silent", say_nothing, 3, 0, 0, 0, 0},
             {"cgroup_make", make_cgroup, 3, 0, 0, 0, 0},
             {"cgroup_move", move_about, 3, 0, 0, 0, 0},
             {"cgroup_remove", remove_cgroup, 3, 0, 0, 0, 0},
             {"forks", fork_often, 2, 0, 0, 0, 0},
             {"crowd", make_crowd, 1, 0, 0, 0, 0},
             {"exec", execute, 2, 0, 0, 0, 0},
             {"threads", use_threads, 2, 0, 0, 0, 0},
             {"bypass", bypass, 3, 0, 0, 0, 0},
             {"export", export_memory, 3, 0, 0, 0, 0},
             {"stop", stop_in_turn, 2, 0, 0, 0, 0},
             {"control", ask_control, 2, 0, 0, 0, 0}};
#define KINDS (sizeof kinds / sizeof *kinds)

static struct child {
    pid_t pid; /* 0: none */
    struct kind *kind;
} children[MOST_CHILDREN];
static struct kept {
    int fd;
    int64_t until_ms;
} kept[MOST_KEPT];
static unsigned long accepted;

static void note(const struct child *child, int status)
{
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) child->kind->killed++;
    if (!WIFEXITED(status)) return;
    child->kind->good += WEXITSTATUS(status) == GOOD;
    child->kind->refused += WEXITSTATUS(status) == REFUSED;
    accepted += WEXITSTATUS(status) == ACCEPTED;
}

/* Keeps descriptors of exported memory open for 0.3 to 2.5 s, also after the exit of the exporting process. `all_go`:
 * closes all of them. */
static void keep_exports(bool all_go)
{
    int64_t now = now_ms();
    for (struct kept *one = kept; one < kept + MOST_KEPT; one++) {
        if (one->until_ms && (all_go || now > one->until_ms)) {
            close(one->fd);
            one->until_ms = 0;
        }
        int fd = one->until_ms ? -1 : receive_descriptor(exports[0]);
        if (fd >= 0) *one = (struct kept){fd, now + (int64_t)between(300, 2500)};
    }
}

static void reap(void)
{
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        for (struct child *child = children; child < children + MOST_CHILDREN; child++)
            if (child->pid == pid) {
                note(child, status);
                child->pid = 0;
            }
}

static unsigned number_of(const struct kind *kind)
{
    unsigned number = 0;
    for (const struct child *child = children; child < children + MOST_CHILDREN; child++)
        number += child->pid && (!kind || child->kind == kind);
    return number;
}

static struct kind *choose(void)
{
    unsigned sum = 0;
    for (const struct kind *kind = kinds; kind < kinds + KINDS; kind++) sum += kind->often;
    uint64_t drawn = any() % sum;
    struct kind *kind = kinds;
    while (drawn >= kind->often) drawn -= kind++->often;
    return kind;
}

static bool has_room(const struct kind *kind)
{
    if (kind->act == make_crowd && number_of(kind)) return false;
    return number_of(NULL) < MOST_CHILDREN && (kind->act != bypass || number_of(kind) < MOST_BYPASSES);
}

static void begin(struct kind *kind, uint64_t seed)
{
    struct child *child = children;
    while (child->pid) child++;
    kind->tries++;
    child->kind = kind;
    child->pid = fork();
    if (child->pid < 0)
        child->pid = 0;
    else if (!child->pid) {
        state = seed;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        alarm(10);
        _exit(kind->act());
    }
}

static void live(double seconds)
{
    int64_t end = now_ms() + (int64_t)(seconds * 1000);
    while (now_ms() < end) {
        struct kind *kind = choose();
        uint64_t seed = any() | 1, pause = between(0, 60);
        while (!has_room(kind)) {
            pause_ms(2);
            reap();
            keep_exports(false);
        }
        begin(kind, seed);
        pause_ms(pause);
        reap();
        keep_exports(false);
    }
}

static bool become_tenant(void)
{
    char file[4096];
    snprintf(file, sizeof file, "%s/cgroup.procs", cgroup);
    if (getuid()) return true;
    if (chown(cgroup, TENANT, TENANT) || chown(file, TENANT, TENANT)) return false;
    return !setgroups(0, NULL) && !setgid(TENANT) && !setuid(TENANT);
}

static bool leave_out(char **names)
{
    for (; *names; names++) {
        struct kind *kind = kinds;
        while (kind < kinds + KINDS && strcmp(kind->name, *names)) kind++;
        if (kind == kinds + KINDS) return false;
        kind->often = 0;
    }
    return true;
}

int main(int argc, char **argv)
{
    self = argv[0];
    if (argc == 2) return take("libcuda.so.1", MIB) ? GOOD : BAD;
    if (argc == 5) {
        most_mib = strtoull(argv[2], NULL, 0), state = strtoull(argv[3], NULL, 0) | 1, bypasses = atoi(argv[4]);
        return take_without_asking(argv[1]);
    }
    if (argc < 7 || !leave_out(argv + 7)) return 2;
    state = strtoull(argv[1], NULL, 0) | 1;
    folder = argv[3], cgroup = argv[4], libcuda = argv[5], most_mib = strtoull(argv[6], NULL, 0);
    bypasses = chdir(folder) ? -1 : open("bypasses", O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (bypasses < 0 || !become_tenant() || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, exports)) return 3;
    live(strtod(argv[2], NULL));
    while (number_of(NULL)) {
        pause_ms(5);
        reap();
    }
    keep_exports(true);
    for (const struct kind *kind = kinds; kind < kinds + KINDS; kind++)
        if (kind->often)
            printf("%s %lu %lu %lu %lu\n", kind->name, kind->tries, kind->good, kind->killed, kind->refused);
    printf("accepted %lu\n", accepted);
    return 0;
}
