/* storm [FOLDER...]: many processes that call cuInit at one moment. Says "ready", then for every COUNT of stdin makes
 * so many processes, each in the next of the cgroups, lets them execute it anew all at once, and answers with one line:
 * for each the numbers of struct told. It knows nothing of fgpu; bench/storm.py runs it with and without. */
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

/* Of one process, all by CLOCK_MONOTONIC. */
struct told {
    int64_t pid, result; /* CUresult of its first cuInit */
    int64_t executed_ns; /* when it was about to execve */
    int64_t called_ns;   /* the linker and preloads, dlopen and lookup are done: calls cuInit */
    int64_t returned_ns; /* has it back */
    int64_t again_ns;    /* has it back a second time */
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

/* So few bytes a pipe takes whole; who dies without a word leaves none. */
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

/* It starts in its cgroup: to move 300 processes takes longer than what is measured. */
static pid_t fork_into(int cgroup)
{
    struct clone_args args = {.exit_signal = SIGCHLD};
    if (cgroup >= 0) {
        args.flags = CLONE_INTO_CGROUP;
        args.cgroup = (uint64_t)cgroup;
    }
    return (pid_t)syscall(SYS_clone3, &args, sizeof args);
}

/* Waits until no process has the gate's other end. It prints nothing but its result: 300 processes print too much. */
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
    usleep(100000); /* all of them wait now */
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
