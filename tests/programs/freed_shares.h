/* freed_shares.h: the part of freed.c that exports memory, or opens memory of another process. Only freed.c includes
 * this file.
 *
 * `freed export SORT BYTES` allocates memory, writes a letter to stdout, and at the end of stdin frees its own
 * reference and exits. From then on the memory belongs to the process that has opened it, and is freed when that
 * process closes it. A pool must not be freed before its importers have freed it, so the exporter of a pool only exits.
 */

#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define HANDLE_TYPE CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
#define CHARGED_US 700000 /* after this time the agent has charged the importer */

static void exported(size_t bytes) /* and closed, so that no other process can open it */
{
    CUmemAllocationProp how = pinned;
    CUmemGenericAllocationHandle handle;
    int file;
    how.requestedHandleTypes = HANDLE_TYPE;
    TRY(cuMemCreate, &handle, bytes / PIECE * PIECE, &how, 0);
    TRY(cuMemExportToShareableHandle, &file, handle, HANDLE_TYPE, 0);
    close(file);
    TRY(cuMemRelease, handle);
}

struct letter {
    CUresult result;
    int file; /* in the exporting process */
    CUipcMemHandle handle;
    CUmemPoolPtrExportData pointer;
};

/* -- the process that exports */

static void wait_for_the_end(const struct letter *letter)
{
    char end;
    if (write(1, letter, sizeof *letter) == sizeof *letter && read(0, &end, 1)) exit(1);
}

static void export_pointer(size_t bytes, struct letter *letter)
{
    CUdeviceptr at;
    TRY(cuMemAlloc_v2, &at, bytes);
    TRY(cuIpcGetMemHandle, &letter->handle, at);
    wait_for_the_end(letter);
    TRY(cuMemFree_v2, at);
}

static void export_handle(size_t bytes, struct letter *letter)
{
    CUmemAllocationProp how = pinned;
    CUmemGenericAllocationHandle handle;
    how.requestedHandleTypes = HANDLE_TYPE;
    TRY(cuMemCreate, &handle, bytes, &how, 0);
    TRY(cuMemExportToShareableHandle, &letter->file, handle, HANDLE_TYPE, 0);
    wait_for_the_end(letter);
    close(letter->file);
    TRY(cuMemRelease, handle);
}

static void export_pool(size_t bytes, struct letter *letter)
{
    CUmemPoolProps how = {.allocType = CU_MEM_ALLOCATION_TYPE_PINNED, .handleTypes = HANDLE_TYPE, .location = here};
    CUmemoryPool made;
    CUdeviceptr at;
    TRY(cuMemPoolCreate, &made, &how);
    TRY(cuMemAllocFromPoolAsync, &at, bytes, made, NULL);
    TRY(cuStreamSynchronize, NULL);
    TRY(cuMemPoolExportToShareableHandle, &letter->file, made, HANDLE_TYPE, 0);
    TRY(cuMemPoolExportPointer, &letter->pointer, at);
    wait_for_the_end(letter);
}

static int export(char sort, size_t bytes)
{
    struct letter letter = {.file = -1};
    (sort == 'i' ? export_pointer : sort == 'h' ? export_handle : export_pool)(bytes, &letter);
    letter.result = result;
    if (result) wait_for_the_end(&letter);
    return (int)result;
}

/* -- the process that opens */

struct exporter {
    pid_t pid;
    int order; /* its stdin */
};

static void begin(struct exporter *exporter, const char *sort, size_t bytes, struct letter *letter)
{
    int in[2], out[2];
    char size[24];
    snprintf(size, sizeof size, "%zu", bytes);
    failed = "exporter";
    result = CUDA_ERROR_UNKNOWN;
    if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC)) return;
    exporter->pid = fork();
    if (!exporter->pid) {
        dup2(in[0], 0);
        dup2(out[1], 1);
        execl("/proc/self/exe", "freed", "export", sort, size, NULL);
        _exit(127);
    }
    close(in[0]);
    close(out[1]);
    exporter->order = in[1];
    if (read(out[0], letter, sizeof *letter) == sizeof *letter) result = letter->result;
    close(out[0]);
    if (result || letter->file < 0) return;
    int process = (int)syscall(SYS_pidfd_open, exporter->pid, 0);
    letter->file = (int)syscall(SYS_pidfd_getfd, process, letter->file, 0);
    close(process);
}

/* Ends the exporter. In every second round, the memory is then charged to this process before it is closed. */
static void end(struct exporter *exporter)
{
    static unsigned rounds;
    close(exporter->order);
    waitpid(exporter->pid, NULL, 0);
    exporter->pid = 0;
    if (rounds++ % 2) usleep(CHARGED_US);
}

static void open_pointer(struct exporter *exporter, const struct letter *letter)
{
    CUdeviceptr at;
    TRY(cuIpcOpenMemHandle_v2, &at, letter->handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    end(exporter);
    TRY(cuIpcCloseMemHandle, at);
}

static void open_handle(struct exporter *exporter, const struct letter *letter, size_t bytes)
{
    CUmemGenericAllocationHandle handle;
    CUdeviceptr at;
    TRY(cuMemImportFromShareableHandle, &handle, (void *)(intptr_t)letter->file, HANDLE_TYPE);
    TRY(cuMemAddressReserve, &at, bytes, 0, 0, 0);
    TRY(cuMemMap, at, bytes, 0, handle, 0);
    TRY(cuMemRelease, handle);
    close(letter->file);
    end(exporter);
    TRY(cuMemUnmap, at, bytes);
    TRY(cuMemAddressFree, at, bytes);
}

static void open_pool(struct exporter *exporter, struct letter *letter)
{
    CUmemoryPool opened;
    CUdeviceptr at;
    TRY(cuMemPoolImportFromShareableHandle, &opened, (void *)(intptr_t)letter->file, HANDLE_TYPE, 0);
    TRY(cuMemPoolImportPointer, &at, opened, &letter->pointer);
    close(letter->file);
    end(exporter);
    TRY(cuMemFreeAsync, at, NULL);
    TRY(cuMemPoolDestroy, opened);
    TRY(cuStreamSynchronize, NULL);
}

/* Opens and closes memory, and allocates as much. */
static void opened(const char *sort, size_t bytes)
{
    struct exporter exporter = {0};
    struct letter letter = {.file = -1};
    begin(&exporter, sort, bytes, &letter);
    if (!result && *sort == 'i') open_pointer(&exporter, &letter);
    if (!result && *sort == 'h') open_handle(&exporter, &letter, bytes);
    if (!result && *sort == 'p') open_pool(&exporter, &letter);
    if (exporter.pid > 0) kill(exporter.pid, SIGKILL);
    if (exporter.pid > 0) end(&exporter);
    if (!result) plain(bytes);
}

static void ipc(size_t bytes) { opened("i", bytes); }
static void imported(size_t bytes) { opened("h", bytes); }
/* The driver frees memory of an exited process later, so two rounds need room at the same time. */
static void pool_imported(size_t bytes) { opened("p", bytes / 2); }
