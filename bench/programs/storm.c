/* storm [FOLDER...]: many processes that call cuInit at the same moment. The program prints "ready". For each line
 * COUNT of stdin, it creates COUNT processes, each in the next of the cgroups, lets all of them execute this program at
 * the same moment, and answers with one line: the numbers of struct told of each process. It does not use fgpu;
 * bench/storm.py runs it with and without fgpu. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST 4096
#define NO_DEVICE 100 /* CUDA_ERROR_NO_DEVICE */

/* The numbers of one process. Times are CLOCK_MONOTONIC. */
struct told {
    int64_t pid, result; /* CUresult of the first cuInit */
    int64_t executed_ns; /* just before execve */
    int64_t called_ns;   /* just before cuInit: after linker, preloads, dlopen and lookup */
    int64_t returned_ns; /* cuInit has returned */
    int64_t again_ns;    /* a second cuInit has returned */
};
#define NUMBERS (sizeof(struct told) / sizeof(int64_t))

static const char *self;
static int cgroups[MOST], cgroup_count;

static int64_t now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

/* A write of so few bytes to a pipe is atomic: a process that is killed has written all of its numbers or none. */
static int be_one(int64_t executed)
{
    struct told told = {.pid = getpid(), .executed_ns = executed};
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    int (*init)(unsigned) = lib ? (int (*)(unsigned))dlsym(lib, "cuInit") : NULL;
    told.called_ns = now();
    told.result = init ? init(0) : NO_DEVICE;
    told.returned_ns = now();
    if (!told.result) init(0);
    told.again_ns = now();
    return write(1, &told, sizeof told) != sizeof told;
}

/* The process starts in its cgroup: to move 300 processes would take longer than the measured phases. */
static pid_t fork_into(int cgroup)
{
    struct clone_args args = {.exit_signal = SIGCHLD};
    if (cgroup >= 0) {
        args.flags = CLONE_INTO_CGROUP;
        args.cgroup = (uint64_t)cgroup;
    }
    return (pid_t)syscall(SYS_clone3, &args, sizeof args);
}

/* Wait until no process has the other end of `gate` open, then execute this program. stderr is discarded, because 300
 * processes print too much. */
static void start_one(int out, int gate)
{
    char begun[32], none;
    dup2(out, 1);
    dup2(open("/dev/null", O_WRONLY), 2);
    while (read(gate, &none, 1) > 0) {
    }
    snprintf(begun, sizeof begun, "%" PRId64, now());
    execl(self, self, "--one", begun, (char *)NULL);
    _exit(127);
}

static int storm(int count)
{
    int out[2], gate[2];
    int64_t told[NUMBERS];
    if (count < 1 || count > MOST || pipe2(out, O_CLOEXEC) || pipe2(gate, O_CLOEXEC)) return -1;
    for (int i = 0; i < count; i++) {
        pid_t child = fork_into(cgroup_count ? cgroups[i % cgroup_count] : -1);
        if (child == 0) {
            close(gate[1]);
            start_one(out[1], gate[0]);
        }
        if (child < 0) perror("storm: clone3");
    }
    close(out[1]);
    close(gate[0]);
    usleep(100000); /* until all processes wait */
    close(gate[1]);
    while (read(out[0], told, sizeof told) == sizeof told)
        for (size_t i = 0; i < NUMBERS; i++) printf("%" PRId64 " ", told[i]);
    close(out[0]);
    while (wait(NULL) > 0) {
    }
    putchar('\n');
    return fflush(stdout);
}

int main(int argc, char **argv)
{
    int count;
    self = argv[0];
    if (argc == 3 && !strcmp(argv[1], "--one")) return be_one(strtoll(argv[2], NULL, 10));
    for (int i = 1; i < argc && i <= MOST; i++) {
        int folder = open(argv[i], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (folder < 0) {
            perror(argv[i]);
            return 1;
        }
        cgroups[cgroup_count++] = folder;
    }
    puts("ready");
    fflush(stdout);
    while (scanf("%d", &count) == 1)
        if (storm(count)) return 1;
    return 0;
}
