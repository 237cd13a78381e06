/* An actor: a process that executes the director's orders. */
#define _GNU_SOURCE
#include "conformance_actors.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static struct {
    int sock;
    CUdeviceptr at, mapped, pooled;
    size_t size;
    CUmemGenericAllocationHandle handle;
    CUmemoryPool pool;
    CUcontext second;
    int kept, unread[2];
    int is_forked;
} actor = {.kept = -1, .unread = {-1, -1}};

/* Returns whether a descriptor is of a device node. The simulated driver also has a socket. */
static int is_of_driver(const char *target)
{
    const char *name = strrchr(target, '/');
    return !strncmp(name ? name + 1 : target, "nvidia", 6) || !strncmp(target, "socket:", 7);
}

/* Finds this process's descriptors of the driver, and returns their number. */
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

/* Forks. Only the child returns, and is the actor from now on. */
static long long become_a_child(void)
{
    pid_t child = fork();
    for (int status; child;) {
        if (waitpid(child, &status, 0) == child) _exit(0);
    }
    actor.is_forked = 1;
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

static long long retain(void)
{
    CUcontext context = NULL;
    CUresult result = CALL(cuDevicePrimaryCtxRetain, &context, 0);
    return result ? result : CALL(cuCtxSetCurrent, context);
}

static long long begin(void)
{
    CUresult result = CALL(cuInit, 0);
    return result ? result : retain();
}

static long long import_pool(int file)
{
    return CALL(cuMemPoolImportFromShareableHandle, &actor.pool, (void *)(intptr_t)file,
                CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
}

static long long free_async(void)
{
    CUresult result = CALL(cuMemFreeAsync, actor.pooled, NULL);
    return result ? result : CALL(cuCtxSynchronize);
}

static long long allocate_async(void)
{
    CUresult result = CALL(cuMemAllocAsync, &actor.pooled, actor.size, NULL);
    return result ? result : CALL(cuStreamSynchronize, NULL);
}

static long long act_on_memory(enum act act)
{
    switch (act) {
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
    default:
        return CALL(cuMemRelease, actor.handle);
    }
}

static long long share(struct order *order, int came, int *goes)
{
    switch (order->act) {
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
    default:
        return export(order, goes);
    }
}

static long long act_on_pools(struct order *order, int came, int *goes)
{
    switch (order->act) {
    case ACT_POOL:
        return make_pool();
    case ACT_POOL_EXPORT:
        return export(order, goes);
    case ACT_POOL_IMPORT:
        actor.kept = came;
        return import_pool(came);
    case ACT_POOL_POINTER:
        return CALL(cuMemPoolImportPointer, &actor.pooled, actor.pool, &order->pointer);
    case ACT_POOL_FREE:
        return free_async();
    case ACT_POOL_DESTROY:
        return CALL(cuMemPoolDestroy, actor.pool);
    default:
        return allocate_async();
    }
}

static long long act_on_process(enum act act)
{
    switch (act) {
    case ACT_FORK:
        return become_a_child();
    case ACT_SEND_FILES:
        return send_files();
    case ACT_CLOSE_FILES:
        return close_files();
    default:
        return execute();
    }
}

static long long act_on_contexts(enum act act)
{
    switch (act) {
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
    default:
        return -1;
    }
}

/* Executes an order. In enum act, the orders of one kind follow each other. */
static long long obey(struct order *order, int came, int *goes)
{
    if (order->act <= ACT_RELEASE) return act_on_memory(order->act);
    if (order->act <= ACT_IPC_CLOSE) return share(order, came, goes);
    if (order->act <= ACT_ASYNC) return act_on_pools(order, came, goes);
    if (order->act <= ACT_EXECUTE) return act_on_process(order->act);
    return act_on_contexts(order->act);
}

/* Sends its pid when it has started, and then executes orders until ACT_END. */
int actor_begins(int sock)
{
    struct order order = {.act = ACT_BEGIN, .number = getpid()};
    actor.sock = sock;
    signal(SIGPIPE, SIG_IGN);
    post(sock, &order, NULL, 0);
    for (;;) {
        int came = collect(sock, &order), goes = -1;
        if (order.act == ACT_END) {
            /* A sanitizer's search for leaks waits for the threads of the parent, which a forked child does not have.
             */
            if (actor.is_forked) _exit(0);
            return 0;
        }
        if (order.number && order.act != ACT_IMPORT) actor.size = (size_t)order.number * MIB;
        order.number = obey(&order, came, &goes);
        if (came >= 0 && came != actor.kept) close(came);
        post(sock, &order, &goes, goes >= 0);
        if (order.act == ACT_EXPORT_KEEP)
            actor.kept = goes;
        else if (goes >= 0)
            close(goes);
    }
}
