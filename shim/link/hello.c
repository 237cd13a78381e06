/*
 * hello.c: one registration with the gatekeeper: sends the hello, receives the reply and maps the pages. Owns the
 * region of the pages.
 *
 * System calls are made directly. The library functions are cancellation points, and a thread cancelled in one of them
 * would leave a descriptor open. All descriptors are closed before a function returns, whatever the reply was.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "link/hello.h"

#define SET_PAGES (2 + FGPU_LEVELS)
#define SET_BYTES (SET_PAGES * FGPU_PAGE_BYTES)
#define FIRST_RETRY_NS 10000000ULL
#define LAST_RETRY_NS 100000000ULL
#define MOST_DESCRIPTORS 8
#define REFUSED(error) "fgpu: the socket to the agent is refused (" error ", a sandbox?): device memory is refused\n"

#ifdef __x86_64__ /* the instruction in probe.S, unless a probe has replaced it by a breakpoint */
#define NOP 0x90
#define CODE_BITS 0xff
#else
#define NOP 0xd503201fu
#define CODE_BITS 0xffffffffu
#endif

struct place {
    char folder[20], parent[24], socket[32], mps[48];
};
#define MPS "CUDA_MPS_PIPE_DIRECTORY="
#define PLACE(folder)                                                                                                  \
    {                                                                                                                  \
        folder, folder "/..", folder "/shim.sock", MPS folder "/mps"                                                   \
    }

struct answer {
    /* A newer gatekeeper may send a longer reply; the first bytes have the same meaning. */
    union {
        struct fgpu_answer head;
        char bytes[2 * sizeof(struct fgpu_answer)];
    };
    int descriptors[MOST_DESCRIPTORS];
    unsigned count;
};

static _Atomic(char *) region;
const char *_Atomic fgpu_silence;

char *fgpu_set(unsigned set)
{
    char *base = atomic_load_explicit(&region, memory_order_acquire);
    return base ? base + set * SET_BYTES : NULL;
}

/* Reserve the region, once, also for forked children: a child maps its own pages over those that it inherited. */
static bool reserve(void)
{
    if (atomic_load_explicit(&region, memory_order_acquire)) return true;
    char *base = mmap(NULL, 2 * SET_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0), *none = NULL;
    if (base == MAP_FAILED) return false;
    if (!atomic_compare_exchange_strong(&region, &none, base)) munmap(base, 2 * SET_BYTES);
    return true;
}

void fgpu_read_note(const struct fgpu_control_page *control, struct fgpu_note *note)
{
    const uint64_t *boot = (const uint64_t *)(const void *)control->boot;
    uint64_t epoch = __atomic_load_n(&control->epoch, __ATOMIC_RELAXED);
    for (int i = 0; i < 2; i++)
        atomic_store_explicit(&note->boot[i], __atomic_load_n(&boot[i], __ATOMIC_RELAXED), memory_order_relaxed);
    atomic_store_explicit(&note->epoch, epoch, memory_order_relaxed);
}

/* Return whether the path is the root of a mount. */
static bool is_mount(const char *path)
{
    struct statx status;
    return !syscall(SYS_statx, AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, 0, &status) &&
           status.stx_attributes & STATX_ATTR_MOUNT_ROOT;
}

/* Return the path of the folder with the socket. Inits of containers and sandboxes mount over /run, but not over the
 * folder beside the shim. That folder counts only if it is a mount, because a tenant may be able to create a folder
 * there. On the host, and in containers that were started before that mount existed, the folder is only under /run. */
static const struct place *place(void)
{
    static const struct place places[] = {PLACE("/var/lib/fgpu/run"), PLACE(FGPU_SOCKET_DIR)};
    return &places[!is_mount(places[0].folder)];
}

/* Return whether an agent runs or has run on this host. A host without the service has no such directory. `fgpu detach`
 * sets the sticky bit on the directory that containers have mounted. A directory that was removed while it was mounted
 * still exists, with a link count of 0: an agent has run here and does not respond. */
static bool agent_here(const struct place *at)
{
    struct stat status;
    if (syscall(SYS_newfstatat, AT_FDCWD, at->folder, &status, AT_SYMLINK_NOFOLLOW))
        return errno != ENOENT && errno != ENOTDIR;
    return S_ISDIR(status.st_mode) && !(status.st_mode & S_ISVTX);
}

/* Return whether any user could have created the directory. In an image that has a limit, any user may be able to put a
 * folder into /run/fgpu, with a socket that never replies to other processes. The agent's directory belongs to root or
 * is mounted, whatever user owns it in a user namespace. */
static bool anybodys(const struct place *at)
{
    struct stat status, around;
    if (syscall(SYS_newfstatat, AT_FDCWD, at->folder, &status, AT_SYMLINK_NOFOLLOW)) return false;
    if (status.st_mode & (S_IWGRP | S_IWOTH)) return true;
    if (!status.st_uid || syscall(SYS_newfstatat, AT_FDCWD, at->parent, &around, 0)) return false;
    return around.st_mode & (S_IWGRP | S_IWOTH) && status.st_dev == around.st_dev;
}

/* Return whether the socket exists. A gatekeeper that exits leaves its socket, and the next gatekeeper renames its own
 * socket over it. A folder that was removed counts as a folder with a socket. */
static bool socket_here(const struct place *at)
{
    struct stat status;
    if (!syscall(SYS_newfstatat, AT_FDCWD, at->socket, &status, 0) || errno != ENOENT) return true;
    return !syscall(SYS_newfstatat, AT_FDCWD, at->folder, &status, AT_SYMLINK_NOFOLLOW) && !status.st_nlink;
}

/* Return the environment variable that makes the driver use the host's MPS; NULL: the host has none. */
const char *fgpu_mps(void)
{
    struct stat status;
    const char *variable = place()->mps;
    return syscall(SYS_newfstatat, AT_FDCWD, variable + sizeof MPS - 1, &status, 0) ? NULL : variable;
}

/* Return whether an agent has put the shim into this process: its code has probes, and the file or the list that
 * preloads it is a mount, or out of reach in a chroot. Then a folder that is not the agent's does not mean a host
 * without an agent: a mount or the chroot hides the agent's folder, or the folder was moved. */
bool fgpu_is_hidden(void)
{
    const uint32_t *code = (const uint32_t *)(uintptr_t)fgpu_admit_here;
    if ((__atomic_load_n(code, __ATOMIC_RELAXED) & CODE_BITS) == NOP) return false;
    bool is_injected = is_mount("/etc/ld.so.preload") || is_mount("/var/lib/fgpu/shim/current/libfgpu.so");
    if (!is_injected && is_mount("/")) return false; /* else a chroot */
    fgpu_silence = "fgpu: /run/fgpu/shim is hidden from this program: device memory is refused\n";
    return true;
}

/* Write a message to stderr. stderr may be a pipe without a reader (SIGPIPE), a full pipe (the write would block), or
 * another file of the program by now, such as a data file that it opened after it had closed descriptors 0 to 2. */
void fgpu_say(const char *text)
{
    struct stat status;
    struct pollfd ready = {.fd = 2, .events = POLLOUT};
    struct timespec none = {0, 0};
    if (syscall(SYS_fstat, 2, &status) || S_ISSOCK(status.st_mode) || S_ISBLK(status.st_mode)) return;
    if (S_ISREG(status.st_mode) && (syscall(SYS_fcntl, 2, F_GETFL) & (O_ACCMODE | O_APPEND)) == O_RDWR) return;
    if (syscall(SYS_ppoll, &ready, 1, &none, NULL, 0) == 1 && ready.revents == POLLOUT)
        syscall(SYS_write, 2, text, strlen(text));
}

/* Wait for a reply (or, without a socket, for time to pass), but not beyond the deadline. */
static bool wait_for(int socket, uint64_t deadline)
{
    struct pollfd event = {.fd = socket, .events = POLLIN};
    for (uint64_t now; (now = fgpu_now()) < deadline;) {
        struct timespec left = {(time_t)((deadline - now) / 1000000000), (long)((deadline - now) % 1000000000)};
        long ready = syscall(SYS_ppoll, &event, 1, &left, NULL, 0);
        if (ready > 0) return true;
        if (ready >= 0 || errno == EINTR) continue;
        fgpu_nap(1000000); /* a sandbox refuses ppoll */
        if (socket < 0) continue;
        if (syscall(SYS_recvfrom, socket, NULL, 0, MSG_PEEK | MSG_DONTWAIT, NULL, NULL) >= 0 || errno != EAGAIN)
            return true;
    }
    return false;
}

static struct fgpu_hello hello_of(const struct fgpu_note *before)
{
    struct fgpu_hello hello = {.magic = FGPU_MAGIC, .version = FGPU_LAYOUT, .size = sizeof hello};
    const uint64_t boot[2] = {before->boot[0], before->boot[1]};
    memcpy(hello.boot, boot, sizeof hello.boot);
    return hello;
}

/*
 * Send a hello. It does not identify the sender: the gatekeeper asks the kernel for the peer's identity. The socket
 * does not block: the queue of a gatekeeper that hangs is full, and the program must not hang too.
 */
static bool ask(int socket, const struct fgpu_note *before)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct fgpu_hello hello = hello_of(before);
    memcpy(address.sun_path, place()->socket, sizeof place()->socket);
    if (syscall(SYS_connect, socket, &address, sizeof address)) return false;
    return syscall(SYS_sendto, socket, &hello, sizeof hello, MSG_NOSIGNAL, NULL, 0) == sizeof hello;
}

/* Send a hello if a sandbox refuses the socket. The probe reports one end of a socket pair to the gatekeeper, which
 * takes that end from this process. The kernel has recorded this process as the peer of both ends. */
static void ask_by_probe(struct fgpu_asked *asked, const struct fgpu_note *before)
{
    struct fgpu_hello hello = hello_of(before);
    int ends[2];
    if (syscall(SYS_socketpair, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends)) return;
    *asked = (struct fgpu_asked){ends[0], ends[1]};
    if (syscall(SYS_write, asked->socket, &hello, sizeof hello) == sizeof hello)
        fgpu_admit_here((unsigned)asked->far, 0, FGPU_HELLO | FGPU_KNOCK, fgpu_ticket());
}

/* Receive a reply. RETRY: the connection ended without a reply. SILENT: a reply that is not valid. */
static enum fgpu_outcome receive(int socket, struct answer *answer)
{
    union {
        char bytes[CMSG_SPACE(MOST_DESCRIPTORS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec vector = {answer->bytes, sizeof answer->bytes};
    struct msghdr message = {
        .msg_iov = &vector, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    long length = syscall(SYS_recvmsg, socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    if (length < 0) return FGPU_IS_RETRY;
    /* Collect all descriptors before validating the message: this process must close them in any case. */
    for (struct cmsghdr *part = CMSG_FIRSTHDR(&message); part; part = CMSG_NXTHDR(&message, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
        size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count && answer->count < MOST_DESCRIPTORS; i++)
            memcpy(&answer->descriptors[answer->count++], CMSG_DATA(part) + i * sizeof(int), sizeof(int));
    }
    if (!length)
        return FGPU_IS_RETRY; /* the end of the connection, or an empty message, which may carry descriptors too */
    const struct fgpu_answer *head = &answer->head;
    if (message.msg_flags & (MSG_CTRUNC | MSG_TRUNC)) return FGPU_IS_SILENT;
    if ((size_t)length < sizeof *head || head->magic != FGPU_MAGIC || head->version != FGPU_LAYOUT ||
        head->size != length)
        return FGPU_IS_SILENT;
    if (head->code == FGPU_CODE_UNMANAGED && answer->count) return FGPU_IS_FREE;
    if (head->code == FGPU_CODE_MANAGED && head->levels && head->levels <= FGPU_LEVELS &&
        answer->count == 2 + head->levels)
        return FGPU_IS_HELD;
    if (head->code != FGPU_CODE_REFUSED) return FGPU_IS_SILENT;
    fgpu_silence = "fgpu: a limit of this program is not in force: device memory is refused\n";
    return FGPU_IS_REFUSED;
}

/* Map a page of a reply. The first read of a file that is too short would kill the program by SIGBUS. A BPF map reports
 * size 0 and checks its own length. */
static bool map_page(char *at, int descriptor, int protection)
{
    struct stat status;
    if (syscall(SYS_fstat, descriptor, &status)) return false;
    if (S_ISREG(status.st_mode) && status.st_size < FGPU_PAGE_BYTES) return false;
    return mmap(at, FGPU_PAGE_BYTES, protection, MAP_SHARED | MAP_FIXED, descriptor, 0) == at;
}

/*
 * Map all pages or none. The set is not in use yet; the caller puts it in use only after all checks here have passed. A
 * usage page without a version was never written by BPF programs, and would refuse everything.
 */
static enum fgpu_outcome map_set(const struct answer *answer, unsigned set, enum fgpu_outcome outcome)
{
    char *base = fgpu_set(set);
    unsigned pages = outcome == FGPU_IS_HELD ? 2 + answer->head.levels : 1;
    for (unsigned i = 0; i < pages; i++) {
        char *at = base + i * FGPU_PAGE_BYTES;
        if (map_page(at, answer->descriptors[i], i == 1 ? PROT_READ | PROT_WRITE : PROT_READ)) continue;
        /* A failed replacement may leave a hole, and a thread that has slept during two registrations might still read
         * there. */
        mmap(at, FGPU_PAGE_BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        return FGPU_IS_SILENT;
    }
    const struct fgpu_control_page *control = (const void *)base;
    bool managed = control->flags & FGPU_MANAGED;
    if (control->version != FGPU_LAYOUT || control->device_count > FGPU_DEVICES) return FGPU_IS_SILENT;
    const struct fgpu_usage_page *usage = (const void *)(base + 2 * FGPU_PAGE_BYTES);
    for (unsigned i = 2; i < pages; i++)
        if (usage[i - 2].version != FGPU_LAYOUT) return FGPU_IS_SILENT;
    return managed == (outcome == FGPU_IS_HELD) ? outcome : FGPU_IS_SILENT;
}

/* Return the message for an error of the socket; NULL: sandboxes do not refuse system calls with this error. */
static const char *refusal(int error)
{
    switch (error) {
    case EPERM:
        return REFUSED("EPERM");
    case EACCES:
        return REFUSED("EACCES");
    case EAFNOSUPPORT:
        return REFUSED("EAFNOSUPPORT");
    case ENOSYS:
        return REFUSED("ENOSYS");
    default:
        return NULL;
    }
}

void fgpu_forget(struct fgpu_asked *asked)
{
    if (asked->socket >= 0) syscall(SYS_close, asked->socket);
    if (asked->far >= 0) syscall(SYS_close, asked->far);
    *asked = FGPU_NOT_ASKED;
}

struct fgpu_asked fgpu_knock(const struct fgpu_note *before)
{
    struct fgpu_asked asked = FGPU_NOT_ASKED;
    asked.socket = (int)syscall(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (asked.socket >= 0 && ask(asked.socket, before)) return asked;
    fgpu_silence = refusal(errno);
    fgpu_forget(&asked);
    if (fgpu_silence) ask_by_probe(&asked, before);
    return asked;
}

static enum fgpu_outcome once(int socket, uint64_t deadline, unsigned set, struct fgpu_note *note, unsigned *levels)
{
    struct answer answer = {.count = 0};
    enum fgpu_outcome outcome = FGPU_IS_RETRY;
    if (socket < 0) return FGPU_IS_RETRY;
    if (!wait_for(socket, deadline)) goto out;
    outcome = receive(socket, &answer);
    if (outcome == FGPU_IS_FREE || outcome == FGPU_IS_HELD) {
        outcome = reserve() ? map_set(&answer, set, outcome) : FGPU_IS_SILENT;
        *levels = answer.head.levels;
    }
    if (outcome == FGPU_IS_FREE || outcome == FGPU_IS_HELD) {
        fgpu_read_note((const void *)fgpu_set(set), note);
        note->epoch = answer.head.epoch; /* the epoch in the reply; the page may already have a later epoch */
    }
out:
    for (unsigned i = 0; i < answer.count; i++) syscall(SYS_close, answer.descriptors[i]);
    return outcome;
}

enum fgpu_outcome fgpu_hello(struct fgpu_asked *asked, uint64_t deadline, const struct fgpu_note *before, unsigned set,
                             struct fgpu_note *note, unsigned *levels)
{
    /* Look up the directory each time: it may be removed during the wait. */
    for (uint64_t step = FIRST_RETRY_NS;; step = step < LAST_RETRY_NS / 2 ? 2 * step : LAST_RETRY_NS) {
        const struct place *at = place();
        if (!agent_here(at)) return FGPU_IS_ABSENT;
        if (anybodys(at)) return FGPU_IS_EMPTY;
        if (asked->socket < 0) *asked = fgpu_knock(before);
        enum fgpu_outcome outcome = once(asked->socket, deadline, set, note, levels);
        fgpu_forget(asked);
        if (outcome != FGPU_IS_RETRY) return outcome;
        bool empty = !socket_here(at); /* an agent that starts creates the folder first */
        uint64_t now = fgpu_now();
        if (now + (empty ? LAST_RETRY_NS : FIRST_RETRY_NS) >= deadline) return empty ? FGPU_IS_EMPTY : FGPU_IS_SILENT;
        /* Each pause is longer and has a random part, so that processes that are refused at the same time do not retry
         * at the same time. The last try is just before the deadline. */
        uint64_t pause = step / 2 + (now * 0x9e3779b97f4a7c15ULL >> 32) % (step / 2);
        uint64_t left = deadline - FIRST_RETRY_NS - now;
        wait_for(-1, now + (pause < left ? pause : left));
    }
}
