/* Memory that outlives its process. Each scenario has actors: this program again, ordered about over a socket, because
 * this process has called the driver itself and its forks could not. After each step the device's total and the row of
 * each actor in NVML are printed, in MiB. */
#define _GNU_SOURCE
#include "conformance.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MOST_FILES 250
#define ACTORS 4
#define ROWS 64
#ifndef SETTLED_MS
#define SETTLED_MS 400 /* the driver takes up to 100 ms to free what a process leaves behind */
#endif

/* What an actor is told to do. Each answers with one letter; `number` is MiB, a result, a pid or a count. */
enum act {
    ACT_BEGIN,    /* cuInit and the primary context */
    ACT_ALLOCATE, /* cuMemAlloc */
    ACT_FREE,
    ACT_MANAGED, /* cuMemAllocManaged, and a memset over all of it */
    ACT_CREATE,  /* cuMemCreate, for descriptors */
    ACT_MAP,     /* what was created or imported */
    ACT_UNMAP,
    ACT_RELEASE,
    ACT_EXPORT,      /* sends the descriptor, and keeps none */
    ACT_EXPORT_KEEP, /* keeps it */
    ACT_IMPORT,      /* of the descriptor that came along, which it keeps */
    ACT_CLOSE,       /* the descriptor that it kept */
    ACT_DMABUF,      /* of what was allocated; sends it, and keeps none */
    ACT_IPC_GET,
    ACT_IPC_OPEN,
    ACT_IPC_CLOSE,
    ACT_POOL,        /* a pool for descriptors, and an allocation in it */
    ACT_POOL_EXPORT, /* sends the descriptor and the pointer, and keeps none */
    ACT_POOL_IMPORT, /* the descriptor stays open */
    ACT_POOL_POINTER,
    ACT_POOL_FREE,
    ACT_POOL_DESTROY,
    ACT_FORK,        /* a child takes over, with all descriptors; the parent waits for its end */
    ACT_SEND_FILES,  /* the driver's descriptors to a socket that nobody reads */
    ACT_CLOSE_FILES, /* the driver's descriptors */
    ACT_EXECUTE,     /* another program, with the driver's descriptors */
    ACT_RETAIN,      /* the primary context again */
    ACT_RESET,
    ACT_LEAVE,   /* the primary context, for the last time */
    ACT_CONTEXT, /* a second context, which is current from then on */
    ACT_DESTROY,
    ACT_ASYNC, /* cuMemAllocAsync, from the default pool */
    ACT_END,
};

struct order {
    enum act act;
    long long number;
    CUipcMemHandle handle;
    CUmemPoolPtrExportData pointer;
};

/* -- letters, with descriptors */

static int post(int sock, const struct order *order, const int *files, unsigned n)
{
    union {
        char bytes[CMSG_SPACE(MOST_FILES * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {(void *)order, sizeof *order};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    memset(&control, 0, sizeof control);
    if (n) {
        header.msg_control = &control;
        header.msg_controllen = CMSG_SPACE(n * sizeof(int));
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        first->cmsg_level = SOL_SOCKET;
        first->cmsg_type = SCM_RIGHTS;
        first->cmsg_len = CMSG_LEN(n * sizeof(int));
        memcpy(CMSG_DATA(first), files, n * sizeof(int));
    }
    return sendmsg(sock, &header, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* The descriptor that came along, or -1. */
static int collect(int sock, struct order *order)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {order, sizeof *order};
    struct msghdr header = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    int file = -1;
    order->act = ACT_END;
    if (recvmsg(sock, &header, MSG_CMSG_CLOEXEC) <= 0) return -1;
    const struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    if (first && first->cmsg_type == SCM_RIGHTS) memcpy(&file, CMSG_DATA(first), sizeof file);
    return file;
}

/* -- the actor's side */

static struct {
    int sock;
    CUdeviceptr at, mapped, pooled;
    size_t size;
    CUmemGenericAllocationHandle handle;
    CUmemoryPool pool;
    CUcontext second;
    int kept, unread[2];
} actor = {.kept = -1, .unread = {-1, -1}};

/* The driver's nodes; the simulated one has a socket besides. */
static int is_of_driver(const char *target)
{
    const char *name = strrchr(target, '/');
    return !strncmp(name ? name + 1 : target, "nvidia", 6) || !strncmp(target, "socket:", 7);
}

/* This process's descriptors of the driver, and how many there are. */
static unsigned driver_files(int *files)
{
    DIR *list = opendir("/proc/self/fd");
    unsigned n = 0;
    for (struct dirent *entry; list && (entry = readdir(list));) {
        char path[64], target[256];
        int fd = atoi(entry->d_name);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t length = readlink(path, target, sizeof target - 1);
        if (length <= 0 || fd == actor.sock || fd == actor.unread[0] || fd == actor.unread[1]) continue;
        target[length] = 0;
        if (fd < 3 || !is_of_driver(target)) continue;
        if (n < MOST_FILES) files[n++] = fd;
    }
    if (list) closedir(list);
    return n;
}

static long long create(void)
{
    CUmemAllocationProp prop;
    memset(&prop, 0, sizeof prop);
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    return CALL(cuMemCreate, &actor.handle, actor.size, &prop, 0);
}

static long long map(void)
{
    CUmemAccessDesc access = {{.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUresult result = CALL(cuMemAddressReserve, &actor.mapped, actor.size, 0, 0, 0);
    if (!result) result = CALL(cuMemMap, actor.mapped, actor.size, 0, actor.handle, 0);
    return result ? result : CALL(cuMemSetAccess, actor.mapped, actor.size, &access, 1);
}

static long long export(struct order *order, int *file)
{
    *file = -1;
    if (order->act == ACT_DMABUF)
        return CALL(cuMemGetHandleForAddressRange, file, actor.at, actor.size, CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0);
    if (order->act == ACT_POOL_EXPORT) {
        CUresult result =
            CALL(cuMemPoolExportToShareableHandle, file, actor.pool, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
        return result ? result : CALL(cuMemPoolExportPointer, &order->pointer, actor.pooled);
    }
    return CALL(cuMemExportToShareableHandle, file, actor.handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
}

static long long make_pool(void)
{
    CUmemPoolProps props;
    memset(&props, 0, sizeof props);
    props.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    props.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    props.handleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CUresult result = CALL(cuMemPoolCreate, &actor.pool, &props);
    if (!result) result = CALL(cuMemAllocFromPoolAsync, &actor.pooled, actor.size, actor.pool, NULL);
    return result ? result : CALL(cuStreamSynchronize, NULL);
}

static long long allocate_managed(void)
{
    CUresult result = CALL(cuMemAllocManaged, &actor.at, actor.size, CU_MEM_ATTACH_GLOBAL);
    if (!result) result = CALL(cuMemsetD8_v2, actor.at, 1, actor.size);
    return result ? result : CALL(cuCtxSynchronize);
}

static void close_kept(void)
{
    if (actor.kept >= 0) close(actor.kept);
    actor.kept = -1;
}

/* The child answers, as whoever is ordered about from now on. */
static long long become_a_child(void)
{
    pid_t child = fork();
    for (int status; child;) {
        if (waitpid(child, &status, 0) == child) _exit(0);
    }
    return getpid();
}

static long long send_files(void)
{
    int files[MOST_FILES];
    struct order nothing = {.act = ACT_END};
    if (actor.unread[0] < 0 && socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, actor.unread)) return -errno;
    return post(actor.unread[0], &nothing, files, driver_files(files));
}

static long long close_files(void)
{
    int files[MOST_FILES];
    unsigned n = driver_files(files);
    for (unsigned i = 0; i < n; i++) close(files[i]);
    return 0;
}

static long long execute(void)
{
    int files[MOST_FILES];
    char number[16];
    unsigned n = driver_files(files);
    for (unsigned i = 0; i < n; i++) fcntl(files[i], F_SETFD, 0);
    fcntl(actor.sock, F_SETFD, 0);
    snprintf(number, sizeof number, "%d", actor.sock);
    execl("/proc/self/exe", "conformance", "--actor", number, (char *)NULL);
    return -errno;
}

static long long begin(void)
{
    CUcontext context = NULL;
    CUresult result = CALL(cuInit, 0);
    if (!result) result = CALL(cuDevicePrimaryCtxRetain, &context, 0);
    return result ? result : CALL(cuCtxSetCurrent, context);
}

static long long retain(void)
{
    CUcontext context = NULL;
    CUresult result = CALL(cuDevicePrimaryCtxRetain, &context, 0);
    return result ? result : CALL(cuCtxSetCurrent, context);
}

static long long import_pool(int file)
{
    return CALL(cuMemPoolImportFromShareableHandle, &actor.pool, (void *)(intptr_t)file,
                CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
}

static long long allocate_async(void)
{
    CUresult result = CALL(cuMemAllocAsync, &actor.pooled, actor.size, NULL);
    return result ? result : CALL(cuStreamSynchronize, NULL);
}

static long long do_it(struct order *order, int came, int *goes)
{
    CUresult result;
    switch (order->act) {
    case ACT_BEGIN:
        return begin();
    case ACT_ALLOCATE:
        return CALL(cuMemAlloc_v2, &actor.at, actor.size);
    case ACT_FREE:
        return CALL(cuMemFree_v2, actor.at);
    case ACT_MANAGED:
        return allocate_managed();
    case ACT_CREATE:
        return create();
    case ACT_MAP:
        return map();
    case ACT_UNMAP:
        return CALL(cuMemUnmap, actor.mapped, actor.size);
    case ACT_RELEASE:
        return CALL(cuMemRelease, actor.handle);
    case ACT_EXPORT_KEEP:
    case ACT_EXPORT:
    case ACT_DMABUF:
    case ACT_POOL_EXPORT:
        return export(order, goes);
    case ACT_IMPORT:
        actor.kept = came;
        return CALL(cuMemImportFromShareableHandle, &actor.handle, (void *)(intptr_t)came,
                    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    case ACT_CLOSE:
        close_kept();
        return 0;
    case ACT_IPC_GET:
        return CALL(cuIpcGetMemHandle, &order->handle, actor.at);
    case ACT_IPC_OPEN:
        return CALL(cuIpcOpenMemHandle_v2, &actor.mapped, order->handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    case ACT_IPC_CLOSE:
        return CALL(cuIpcCloseMemHandle, actor.mapped);
    case ACT_POOL:
        return make_pool();
    case ACT_POOL_IMPORT:
        actor.kept = came;
        return import_pool(came);
    case ACT_POOL_POINTER:
        return CALL(cuMemPoolImportPointer, &actor.pooled, actor.pool, &order->pointer);
    case ACT_POOL_FREE:
        result = CALL(cuMemFreeAsync, actor.pooled, NULL);
        return result ? (long long)result : (long long)CALL(cuCtxSynchronize);
    case ACT_POOL_DESTROY:
        return CALL(cuMemPoolDestroy, actor.pool);
    case ACT_FORK:
        return become_a_child();
    case ACT_SEND_FILES:
        return send_files();
    case ACT_CLOSE_FILES:
        return close_files();
    case ACT_EXECUTE:
        return execute();
    case ACT_RETAIN:
        return retain();
    case ACT_RESET:
        return CALL(cuDevicePrimaryCtxReset_v2, 0);
    case ACT_LEAVE:
        return CALL(cuDevicePrimaryCtxRelease_v2, 0);
    case ACT_CONTEXT:
        return CALL(cuCtxCreate_v2, &actor.second, 0, 0);
    case ACT_DESTROY:
        return CALL(cuCtxDestroy_v2, actor.second);
    case ACT_ASYNC:
        return allocate_async();
    default:
        return -1;
    }
}

/* Begins with a letter of its own: it is there, by its pid. */
int actor_begins(int sock)
{
    struct order order = {.act = ACT_BEGIN, .number = getpid()};
    actor.sock = sock;
    signal(SIGPIPE, SIG_IGN);
    post(sock, &order, NULL, 0);
    for (;;) {
        int came = collect(sock, &order), goes = -1;
        if (order.act == ACT_END) return 0;
        if (order.number && order.act != ACT_IMPORT) actor.size = (size_t)order.number * MIB;
        order.number = do_it(&order, came, &goes);
        if (came >= 0 && came != actor.kept) close(came);
        post(sock, &order, &goes, goes >= 0);
        if (order.act == ACT_EXPORT_KEEP)
            actor.kept = goes;
        else if (goes >= 0)
            close(goes);
    }
}

/* -- the director's side */

struct role {
    pid_t pid;
    int ended;
    int sock;
    int file; /* that it sent */
    struct order last;
};

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

static void show(const char *what)
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

static struct role *enter(void)
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

static void drop_file(struct role *role)
{
    if (role->file >= 0) close(role->file);
    role->file = -1;
}

static long long tell_with(struct role *role, enum act act, long long number, const struct order *more, int file)
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

static long long tell(struct role *role, enum act act, long long number)
{
    return tell_with(role, act, number, NULL, -1);
}

/* Says the result too, under the name of the step. */
static void ask(const char *what, struct role *role, enum act act, long long number)
{
    say(what, tell(role, act, number));
}

static void ask_with(const char *what, struct role *role, enum act act, const struct role *from)
{
    say(what, tell_with(role, act, 0, &from->last, from->file));
}

static void end(struct role *role)
{
    if (role->ended) return;
    role->ended = 1;
    kill(role->pid, SIGKILL);
    waitpid(role->pid, NULL, 0);
}

static void begins(void)
{
    CALL(nvmlInit_v2);
    CALL(nvmlDeviceGetHandleByIndex_v2, 0, &device);
    rest(SETTLED_MS);
    at_rest = in_use();
    n_roles = 0;
}

/* All of them go, and leave nothing. */
static void ends(const char *what)
{
    char name[96];
    for (unsigned i = 0; i < n_roles; i++) {
        drop_file(&roles[i]);
        end(&roles[i]);
        close(roles[i].sock); /* a child that took over reads its end there */
    }
    n_roles = 0;
    rest(SETTLED_MS);
    snprintf(name, sizeof name, "%s.after", what);
    say(name, (in_use() - at_rest + (long long)MIB / 2) / (long long)MIB);
}

#define SIZE 256

/* A descriptor is all that is left of memory. */
static void check_export(void)
{
    begins();
    struct role *a = enter();
    ask("export.begin", a, ACT_BEGIN, 0);
    show("export.begun");
    ask("export.create", a, ACT_CREATE, SIZE);
    show("export.created");
    ask("export", a, ACT_EXPORT, 0);
    ask("export.release", a, ACT_RELEASE, 0);
    show("export.released");
    drop_file(a);
    show("export.closed");
    ask("export.create2", a, ACT_CREATE, SIZE);
    ask("export.map", a, ACT_MAP, 0);
    ask("export2", a, ACT_EXPORT, 0);
    end(a);
    show("export.killed");
    drop_file(a);
    show("export.killed.closed");
    ends("export");
}

/* Memory that was never made for descriptors has one all the same. */
static void check_dmabuf(void)
{
    begins();
    struct role *a = enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    ask("dmabuf", a, ACT_DMABUF, 0);
    show("dmabuf.exported");
    ask("dmabuf.free", a, ACT_FREE, 0);
    show("dmabuf.freed");
    drop_file(a);
    show("dmabuf.closed");
    tell(a, ACT_ALLOCATE, SIZE);
    ask("dmabuf.again", a, ACT_DMABUF, 0);
    end(a);
    show("dmabuf.killed");
    ends("dmabuf");
}

/* The exporter ends before the importers. */
static void check_import(void)
{
    begins();
    struct role *a = enter(), *b = enter(), *c = enter();
    tell(a, ACT_BEGIN, 0);
    tell(b, ACT_BEGIN, 0);
    tell(c, ACT_BEGIN, 0);
    tell(a, ACT_CREATE, SIZE);
    tell(a, ACT_MAP, 0);
    tell(a, ACT_EXPORT, 0);
    tell(b, ACT_CREATE, SIZE); /* the size of what is imported */
    tell(b, ACT_RELEASE, 0);
    tell(c, ACT_CREATE, SIZE);
    tell(c, ACT_RELEASE, 0);
    show("import.exported");
    ask_with("import.b", b, ACT_IMPORT, a);
    show("import.imported");
    ask("import.b.map", b, ACT_MAP, 0);
    show("import.mapped");
    ask_with("import.c", c, ACT_IMPORT, a);
    ask("import.c.map", c, ACT_MAP, 0);
    show("import.both");
    tell(b, ACT_CLOSE, 0);
    tell(c, ACT_CLOSE, 0);
    end(a);
    show("import.killed"); /* this process has the exporter's descriptor still */
    drop_file(a);
    show("import.closed");
    ask("import.b.unmap", b, ACT_UNMAP, 0);
    show("import.b.unmapped");
    ask("import.b.release", b, ACT_RELEASE, 0);
    show("import.b.released");
    ask("import.c.unmap", c, ACT_UNMAP, 0);
    ask("import.c.release", c, ACT_RELEASE, 0);
    show("import.c.released");
    ends("import");
}

/* An importer keeps the descriptor, and is the last that does. */
static void check_import_keeps(void)
{
    begins();
    struct role *a = enter(), *b = enter();
    tell(a, ACT_BEGIN, 0);
    tell(b, ACT_BEGIN, 0);
    tell(a, ACT_CREATE, SIZE);
    tell(a, ACT_EXPORT, 0);
    tell(b, ACT_CREATE, SIZE);
    tell(b, ACT_RELEASE, 0);
    ask_with("keeps.import", b, ACT_IMPORT, a);
    ask("keeps.map", b, ACT_MAP, 0);
    drop_file(a);
    ask("keeps.a.release", a, ACT_RELEASE, 0);
    show("keeps.released");
    end(a);
    show("keeps.killed");
    ask("keeps.unmap", b, ACT_UNMAP, 0);
    ask("keeps.release", b, ACT_RELEASE, 0);
    show("keeps.let_go");
    tell(b, ACT_CLOSE, 0);
    show("keeps.closed");
    ends("keeps");
}

static void check_ipc(void)
{
    begins();
    struct role *a = enter(), *b = enter();
    tell(a, ACT_BEGIN, 0);
    tell(b, ACT_BEGIN, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    ask("ipc.get", a, ACT_IPC_GET, 0);
    ask_with("ipc.open", b, ACT_IPC_OPEN, a);
    show("ipc.opened");
    ask("ipc.free", a, ACT_FREE, 0);
    show("ipc.freed");
    end(a);
    show("ipc.killed");
    ask("ipc.close", b, ACT_IPC_CLOSE, 0);
    show("ipc.closed");
    ends("ipc");
}

static void check_pool_export(void)
{
    begins();
    struct role *a = enter(), *b = enter();
    tell(a, ACT_BEGIN, 0);
    tell(b, ACT_BEGIN, 0);
    ask("pool", a, ACT_POOL, SIZE);
    show("pool.made");
    ask("pool.export", a, ACT_POOL_EXPORT, 0);
    show("pool.exported");
    ask_with("pool.import", b, ACT_POOL_IMPORT, a);
    ask_with("pool.pointer", b, ACT_POOL_POINTER, a);
    drop_file(a);
    show("pool.imported");
    end(a);
    show("pool.killed");
    ask("pool.free", b, ACT_POOL_FREE, 0);
    show("pool.freed");
    ask("pool.destroy", b, ACT_POOL_DESTROY, 0);
    show("pool.destroyed");
    tell(b, ACT_CLOSE, 0);
    show("pool.closed");
    ends("pool");
}

/* The exporter destroys its pool while another has it. */
static void check_pool_destroyed(void)
{
    begins();
    struct role *a = enter(), *b = enter();
    tell(a, ACT_BEGIN, 0);
    tell(b, ACT_BEGIN, 0);
    tell(a, ACT_POOL, SIZE);
    tell(a, ACT_POOL_EXPORT, 0);
    tell_with(b, ACT_POOL_IMPORT, 0, &a->last, a->file);
    tell_with(b, ACT_POOL_POINTER, 0, &a->last, -1);
    drop_file(a);
    tell(b, ACT_CLOSE, 0);
    show("pool.unkept");
    ask("pool.a.free", a, ACT_POOL_FREE, 0);
    show("pool.a.freed");
    ask("pool.a.destroy", a, ACT_POOL_DESTROY, 0);
    show("pool.a.destroyed");
    ask("pool.b.free", b, ACT_POOL_FREE, 0);
    ask("pool.b.destroy", b, ACT_POOL_DESTROY, 0);
    show("pool.b.destroyed");
    ends("pool.unkept");
}

/* A forked child has the driver's descriptors, and then has them no more. */
static void check_forks(const char *what, enum act act)
{
    char name[64];
    begins();
    struct role *a = enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, act, SIZE);
    tell(a, ACT_FORK, 0);
    snprintf(name, sizeof name, "%s.forked", what);
    show(name);
    end(a);
    snprintf(name, sizeof name, "%s.killed", what);
    show(name);
    tell(a, ACT_CLOSE_FILES, 0);
    snprintf(name, sizeof name, "%s.closed", what);
    show(name);
    ends(what);
}

/* Descriptors that lie in a socket are in no process. */
static void check_unread(void)
{
    begins();
    struct role *a = enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    ask("unread.sent", a, ACT_SEND_FILES, 0);
    tell(a, ACT_FORK, 0);
    tell(a, ACT_CLOSE_FILES, 0);
    show("unread.closed");
    end(a);
    show("unread.killed");
    ends("unread");
}

static void check_execute(void)
{
    begins();
    struct role *a = enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    tell(a, ACT_EXECUTE, 0);
    show("execute.done");
    tell(a, ACT_CLOSE_FILES, 0);
    show("execute.closed");
    ends("execute");
}

void check_outlives(void)
{
    section("outlives");
    check_export();
    check_dmabuf();
    check_import();
    check_import_keeps();
    check_ipc();
    check_pool_export();
    check_pool_destroyed();
    check_forks("fork", ACT_ALLOCATE);
    check_forks("fork_managed", ACT_MANAGED);
    check_unread();
    check_execute();
}

/* The primary context ends, and begins anew. */
static void check_last(const char *what, enum act act)
{
    char name[64];
    begins();
    struct role *a = enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, ACT_CREATE, SIZE);
    tell(a, ACT_MAP, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    tell(a, ACT_ASYNC, SIZE);
    snprintf(name, sizeof name, "%s.before", what);
    show(name);
    ask(what, a, act, 0);
    snprintf(name, sizeof name, "%s.done", what);
    show(name);
    snprintf(name, sizeof name, "%s.retain", what);
    ask(name, a, ACT_RETAIN, 0);
    snprintf(name, sizeof name, "%s.retained", what);
    show(name);
    snprintf(name, sizeof name, "%s.free", what);
    ask(name, a, ACT_POOL_FREE, 0);
    snprintf(name, sizeof name, "%s.freed", what);
    show(name);
    tell(a, ACT_UNMAP, 0);
    tell(a, ACT_RELEASE, 0);
    snprintf(name, sizeof name, "%s.released", what);
    show(name);
    ends(what);
}

/* What goes with a context and what stays. */
void check_endings(void)
{
    section("endings");
    check_last("reset", ACT_RESET);
    check_last("left", ACT_LEAVE);
    begins();
    struct role *a = enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, ACT_CONTEXT, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    tell(a, ACT_ASYNC, SIZE);
    show("second.before");
    ask("second.destroy", a, ACT_DESTROY, 0);
    show("second.destroyed");
    ends("second");
}
