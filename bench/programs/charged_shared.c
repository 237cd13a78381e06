/* charged_shared: memory that processes share, and that may exist longer than the process that allocated it. See
 * charged.h. */
#include "charged_pairs.h"

/* Export memory and release its handle, so that only a descriptor keeps the memory. Repeat this beyond the limit. */
static void exported_and_released(void)
{
    int files[5];
    role('A', getpid());
    begin();
    for (int i = 0; i < 5; i++) {
        CUmemGenericAllocationHandle handle = create(SIZE, 1);
        files[i] = export_fd(handle);
        if (handle) CU(cuMemRelease, handle);
        if (i % 4 == 0) mark(i ? "5 x 2 GiB exported and released: limit 8 GiB" : "2 GiB exported and released");
    }
    for (int i = 0; i < 5; i++)
        if (files[i] >= 0) close(files[i]);
    mark("descriptors closed");
    finish();
}

/* Kill the exporter A. B has the descriptor, and has never called the driver. */
static void exporter_killed(void)
{
    int sock;
    struct letter letter = {0};
    pid_t first = getpid();
    if (pair(&sock)) {
        begin();
        CUmemGenericAllocationHandle handle = create(SIZE, 1);
        map(handle, SIZE);
        int fd = export_fd(handle);
        mark("A has 2 GiB, exported");
        post(sock, &letter, &fd, fd >= 0);
        wait_for_ever();
    }
    int fd = collect(sock, &letter);
    kill_and_wait(first);
    mark("A killed, B has the descriptor");
    close(fd);
    mark("B closed it");
    finish();
}

/* B imports and maps; A is killed; then B closes the descriptor. */
static void importer_left(void)
{
    int sock;
    struct letter letter = {0};
    pid_t first = getpid();
    if (pair(&sock)) {
        begin();
        CUmemGenericAllocationHandle handle = create(SIZE, 1);
        map(handle, SIZE);
        int fd = export_fd(handle);
        post(sock, &letter, &fd, fd >= 0);
        close(fd);
        wait_for_ever();
    }
    int fd = collect(sock, &letter);
    CUmemGenericAllocationHandle handle = 0;
    begin();
    CU(cuMemImportFromShareableHandle, &handle, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    CUdeviceptr at = map(handle, SIZE);
    mark("A made 2 GiB, B mapped them");
    kill_and_wait(first);
    mark("A killed, B has descriptor and mapping");
    close(fd);
    mark("B closed the descriptor");
    if (at) CU(cuMemUnmap, at, SIZE);
    if (handle) CU(cuMemRelease, handle);
    mark("B unmapped and released");
    finish();
}

/* B opens A's memory by a handle of CUDA's older calls; A frees it or is killed. */
static void opened_by_handle(int is_freed)
{
    int sock;
    struct letter letter = {0};
    CUdeviceptr at = 0;
    pid_t first = getpid();
    if (pair(&sock)) {
        begin();
        at = allocate(SIZE);
        CU(cuIpcGetMemHandle, &letter.handle, at);
        post(sock, &letter, NULL, 0);
        collect(sock, &letter);
        if (is_freed) {
            CU(cuMemFree, at);
            mark("A freed, B has the memory open");
            allocate(SIZE);
            mark("A allocated as much again");
        }
        post(sock, &letter, NULL, 0);
        wait_for_ever();
    }
    collect(sock, &letter);
    begin();
    CU(cuIpcOpenMemHandle, &at, letter.handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    mark("A has 2 GiB, B opened them");
    post(sock, &letter, NULL, 0);
    collect(sock, &letter);
    kill_and_wait(first);
    mark("A killed, B has the memory open");
    if (at) CU(cuIpcCloseMemHandle, at);
    mark("B closed it");
    finish();
}

static void ipc_freed(void) { opened_by_handle(1); }
static void ipc_killed(void) { opened_by_handle(0); }

/* Export plain memory as a DMA-BUF descriptor. */
static void dma_buf(void)
{
    int fd = -1;
    role('A', getpid());
    begin();
    CUdeviceptr at = allocate(SIZE);
    CU(cuMemGetHandleForAddressRange, &fd, at, SIZE, CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0);
    mark("2 GiB and a DMA-BUF of them");
    CU(cuMemFree, at);
    mark("freed, the descriptor is open");
    if (fd >= 0) close(fd);
    mark("descriptor closed");
    finish();
}

static CUmemoryPool shared_pool(void)
{
    CUmemPoolProps kind;
    CUmemoryPool pool = NULL;
    memset(&kind, 0, sizeof kind);
    kind.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    kind.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    kind.handleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CU(cuMemPoolCreate, &pool, &kind);
    return pool;
}

/* A pool that B imports; A is killed. */
static void pool_exported(void)
{
    int sock, fd = -1;
    struct letter letter = {0};
    CUmemoryPool pool = NULL;
    CUdeviceptr at = 0;
    pid_t first = getpid();
    if (pair(&sock)) {
        begin();
        pool = shared_pool();
        CU(cuMemAllocFromPoolAsync, &at, SIZE, pool, NULL);
        CU(cuStreamSynchronize, NULL);
        CU(cuMemPoolExportToShareableHandle, &fd, pool, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
        CU(cuMemPoolExportPointer, &letter.pointer, at);
        post(sock, &letter, &fd, fd >= 0);
        wait_for_ever();
    }
    fd = collect(sock, &letter);
    begin();
    if (fd >= 0)
        CU(cuMemPoolImportFromShareableHandle, &pool, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
           0);
    if (pool) CU(cuMemPoolImportPointer, &at, pool, &letter.pointer);
    mark("A's pool has 2 GiB, B imported them");
    kill_and_wait(first);
    mark("A killed");
    if (at) CU(cuMemFreeAsync, at, NULL);
    CU(cuCtxSynchronize);
    if (pool) CU(cuMemPoolDestroy, pool);
    mark("B freed and destroyed, the descriptor is open");
    if (fd >= 0) close(fd);
    mark("descriptor closed");
    finish();
}

int main(int argc, char **argv)
{
    static const struct scenario table[] = {
        {"exp_fd", exported_and_released}, {"exp_dead", exporter_killed},
        {"imp_dead", importer_left},       {"ipc_free", ipc_freed},
        {"ipc_dead", ipc_killed},          {"dma_buf", dma_buf},
        {"pool_exp", pool_exported},       {NULL, NULL},
    };
    return run_one(table, argc, argv);
}
