/* charged_kept: memory of an exited process or thread, kept by descriptors or by another thread. See charged.h. */
#include "charged_pairs.h"

#include <pthread.h>
#include <sys/syscall.h>

/* Fork B from A while A has memory. B inherits all descriptors. */
static void forked(int is_managed)
{
    pid_t first = getpid();
    CUdeviceptr at = 0;
    role('A', first);
    begin();
    if (is_managed) {
        CU(cuMemAllocManaged, &at, SIZE, CU_MEM_ATTACH_GLOBAL);
        CU(cuMemsetD8, at, 1, SIZE);
        CU(cuCtxSynchronize);
    } else {
        allocate(SIZE);
    }
    if (fork()) wait_for_ever();
    alarm(SECONDS);
    role('B', getpid());
    mark("A has 2 GiB, B was forked from A");
    kill_and_wait(first);
    mark("A killed");
    close_driver_files(-1);
    mark("B closed its descriptors");
    finish();
}

static void fork_plain(void) { forked(0); }
static void fork_managed(void) { forked(1); }

/* Descriptors of the driver are unread in a socket: no process has them open. */
static void in_a_queue(void)
{
    int sock, files[MOST_FILES];
    struct letter letter = {0};
    pid_t first = getpid();
    if (pair(&sock)) {
        begin();
        allocate(SIZE);
        unsigned count = driver_files(files, MOST_FILES, sock);
        note("A sends %u descriptors", count);
        post(sock, &letter, NULL, 0);
        post(sock, &letter, files, count);
        mark("A has 2 GiB, sent its descriptors");
        kill(getpid(), SIGKILL);
        wait_for_ever();
    }
    collect(sock, &letter);
    while (!kill(first, 0)) usleep(1000);
    mark("A killed, its descriptors unread in B's socket");
    close(sock);
    mark("B closed the socket");
    finish();
}

/* The process executes another program, which inherits the descriptors. */
static void executed(void)
{
    int files[MOST_FILES];
    role('A', getpid());
    begin();
    allocate(SIZE);
    mark("A has 2 GiB");
    unsigned count = driver_files(files, MOST_FILES, -1);
    for (unsigned i = 0; i < count; i++) fcntl(files[i], F_SETFD, 0);
    execl("/proc/self/exe", "charged_kept", "after_exec", (char *)NULL);
    note("execl: %s", strerror(errno));
    finish();
}

static void after_exec(void)
{
    role('A', getpid());
    mark("A executed another program with its descriptors");
    close_driver_files(-1);
    mark("A closed them");
    finish();
}

/* A process of another tenant gets A's pid. The reader of the line `reuse` starts that process. */
static void reused(void)
{
    pid_t first = getpid();
    role('A', first);
    begin();
    allocate(SIZE);
    if (fork()) wait_for_ever();
    alarm(SECONDS);
    role('B', getpid());
    setsid(); /* a pid is in use as long as it names a session */
    kill_and_wait(first);
    mark("A killed, B was forked from A");
    say("reuse", "");
    mark("A's pid is a process of another tenant");
    close_driver_files(-1);
    mark("B closed its descriptors");
    finish();
}

/* The first thread exits, and another thread continues. */
static void *second_thread(void *context)
{
    usleep(100000);
    CU(cuCtxSetCurrent, (CUcontext)context);
    mark("the first thread ended, 2 GiB");
    allocate(SIZE);
    mark("the second thread took 2 GiB more");
    finish();
    return NULL;
}

static void leader(void)
{
    pthread_t thread;
    role('A', getpid());
    CUcontext context = begin();
    allocate(SIZE);
    pthread_create(&thread, NULL, second_thread, context);
    syscall(SYS_exit, 0); /* of this thread alone */
}

int main(int argc, char **argv)
{
    static const struct scenario table[] = {
        {"fork_fd", fork_plain},    {"fork_managed", fork_managed},
        {"scm", in_a_queue},        {"exec_keep", executed},
        {"after_exec", after_exec}, {"reuse", reused},
        {"leader", leader},         {NULL, NULL},
    };
    return run_one(table, argc, argv);
}
