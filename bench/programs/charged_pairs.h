/* Two processes, A and B, that pass descriptors and handles to each other; for bench/programs/charged_shared.c and
 * bench/programs/charged_kept.c. */
#ifndef FGPU_BENCH_CHARGED_PAIRS_H
#define FGPU_BENCH_CHARGED_PAIRS_H

#include "charged.h"

#define MOST_FILES 250 /* one message carries 253 */

struct letter {
    int step;
    CUipcMemHandle handle;
    CUmemPoolPtrExportData pointer;
};

union control {
    char bytes[CMSG_SPACE(MOST_FILES * sizeof(int))];
    struct cmsghdr align;
};

/* Fork B before A has called the driver. Returns B's pid in A, and 0 in B. `sock` is connected to the other process. */
static inline pid_t pair(int *sock)
{
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) _exit(92);
    role('A', getpid());
    pid_t child = fork();
    if (child < 0) _exit(93);
    role('B', child ? child : getpid());
    *sock = ends[child ? 0 : 1];
    close(ends[child ? 1 : 0]);
    if (!child) alarm(SECONDS);
    return child;
}

static inline void post(int sock, struct letter *letter, const int *files, unsigned count)
{
    union control control;
    struct iovec part = {letter, sizeof *letter};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    memset(&control, 0, sizeof control);
    if (count) {
        header.msg_control = &control;
        header.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        first->cmsg_level = SOL_SOCKET;
        first->cmsg_type = SCM_RIGHTS;
        first->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(first), files, count * sizeof(int));
    }
    if (sendmsg(sock, &header, MSG_NOSIGNAL) < 0) note("sendmsg of %u descriptors: %s", count, strerror(errno));
}

/* Receive a letter. Returns the descriptor that came with the letter, or -1. */
static inline int collect(int sock, struct letter *letter)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {letter, sizeof *letter};
    struct msghdr header = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    int file = -1;
    if (recvmsg(sock, &header, 0) <= 0) return -1;
    struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    if (first && first->cmsg_type == SCM_RIGHTS) memcpy(&file, CMSG_DATA(first), sizeof file);
    return file;
}

static inline void wait_for_ever(void)
{
    for (;;) pause();
}

/* Kill A, and wait until its parent has reaped it. */
static inline void kill_and_wait(pid_t pid)
{
    kill(pid, SIGKILL);
    while (!kill(pid, 0)) usleep(1000);
}

/* Find the descriptors of the driver: device nodes, or the simulated driver's sockets and its file in /run. */
static inline unsigned driver_files(int *files, unsigned room, int except)
{
    DIR *list = opendir("/proc/self/fd");
    unsigned count = 0;
    for (struct dirent *entry; list && (entry = readdir(list));) {
        char path[300], target[256];
        int fd = atoi(entry->d_name);
        snprintf(path, sizeof path, "/proc/self/fd/%s", entry->d_name);
        ssize_t length = readlink(path, target, sizeof target - 1);
        if (fd < 3 || fd == except || fd == dirfd(list) || length <= 0) continue;
        target[length] = 0;
        const char *name = strrchr(target, '/') ? strrchr(target, '/') + 1 : target;
        if ((!strncmp(name, "nvidia", 6) || !strncmp(target, "socket:", 7)) && count < room) files[count++] = fd;
    }
    if (list) closedir(list);
    return count;
}

static inline void close_driver_files(int except)
{
    int files[MOST_FILES];
    unsigned count = driver_files(files, MOST_FILES, except);
    for (unsigned i = 0; i < count; i++) close(files[i]);
    note("B closes %u descriptors", count);
}

#endif
