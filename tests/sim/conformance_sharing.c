/* Memory of two processes: this process, and a child that runs this program again. */
#define _GNU_SOURCE
#include "conformance.h"

#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

struct message {
    CUipcMemHandle handle;
    char what;
};

static void send_message(int sock, const struct message *message, int file)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec part = {(void *)message, sizeof *message};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    if (file >= 0) {
        header.msg_control = &control;
        header.msg_controllen = sizeof control;
        struct cmsghdr *first = CMSG_FIRSTHDR(&header);
        first->cmsg_level = SOL_SOCKET;
        first->cmsg_type = SCM_RIGHTS;
        first->cmsg_len = CMSG_LEN(sizeof file);
        memcpy(CMSG_DATA(first), &file, sizeof file);
    }
    if (sendmsg(sock, &header, 0) < 0) perror("sendmsg");
}

static int receive_message(int sock, struct message *message)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {message, sizeof *message};
    struct msghdr header = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    int file = -1;
    if (recvmsg(sock, &header, 0) <= 0) message->what = 'q';
    const struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    if (first && first->cmsg_type == SCM_RIGHTS) memcpy(&file, CMSG_DATA(first), sizeof file);
    return file;
}

static CUdeviceptr map(CUmemGenericAllocationHandle handle, size_t size)
{
    CUmemAccessDesc access = {{.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUdeviceptr at = 0;
    TRY("map.reserve", cuMemAddressReserve, &at, size, 0, 0, 0);
    TRY("map", cuMemMap, at, size, 0, handle, 0);
    TRY("map.access", cuMemSetAccess, at, size, &access, 1);
    return at;
}

static int first_byte(CUdeviceptr at)
{
    unsigned char byte = 99;
    CALL(cuMemcpyDtoH_v2, &byte, at, 1);
    return byte;
}

static void child_opens(const struct message *message)
{
    CUdeviceptr at = 0, again = 0;
    mark();
    TRY("open.flags0", cuIpcOpenMemHandle_v2, &at, message->handle, 0);
    TRY("open", cuIpcOpenMemHandle_v2, &at, message->handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    TRY("open.again", cuIpcOpenMemHandle_v2, &again, message->handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    say("open.same", at == again);
    say("open.mib", taken_mib());
    say("open.value", at ? first_byte(at) : -1);
    TRY("open.free", cuMemFree_v2, at);
    CALL(cuMemsetD8_v2, at, 8, 1);
    CALL(cuCtxSynchronize);
    TRY("close", cuIpcCloseMemHandle, at);
    TRY("close.second", cuIpcCloseMemHandle, at);
    TRY("close.third", cuIpcCloseMemHandle, at);
}

/* Opens the memory again and keeps it open, so that a later order can print its contents. */
static CUdeviceptr child_holds(const struct message *message)
{
    CUdeviceptr at = 0;
    TRY("hold", cuIpcOpenMemHandle_v2, &at, message->handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    return at;
}

static void child_imports(int file)
{
    CUmemGenericAllocationHandle handle = 0, again = 0;
    mark();
    TRY("import", cuMemImportFromShareableHandle, &handle, (void *)(intptr_t)file,
        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    TRY("import.again", cuMemImportFromShareableHandle, &again, (void *)(intptr_t)file,
        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    say("import.same", handle == again);
    say("import.mib", taken_mib());
    close(file);
    if (!handle) return;
    CUdeviceptr at = map(handle, 4 * MIB);
    say("import.value", first_byte(at));
    CALL(cuMemsetD8_v2, at, 9, 1);
    TRY("import.release", cuMemRelease, handle);
    CALL(cuMemRelease, again);
}

int sharing_child(int sock)
{
    struct message message;
    CUdeviceptr held = 0;
    section("sharing.child");
    TRY("init", cuInit, 0);
    use_primary();
    memset(&message, 0, sizeof message);
    send_message(sock, &message, -1);
    for (;;) {
        int file = receive_message(sock, &message);
        if (message.what == 'q') break;
        if (message.what == 'o') child_opens(&message);
        if (message.what == 'h') held = child_holds(&message);
        if (message.what == 'v') say("held.value", first_byte(held));
        if (message.what == 'i') child_imports(file);
        send_message(sock, &message, -1);
    }
    return 0;
}

static int start_child(pid_t *child)
{
    int ends[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends)) return -1;
    *child = fork();
    if (!*child) {
        char number[16];
        close(ends[0]);
        snprintf(number, sizeof number, "%d", ends[1]);
        execl("/proc/self/exe", "conformance", "--sharing-child", number, (char *)NULL);
        _exit(127);
    }
    close(ends[1]);
    return ends[0];
}

static void tell(int sock, struct message *message, char what, int file)
{
    message->what = what;
    send_message(sock, message, file);
    receive_message(sock, message);
}

static void check_handles(int sock)
{
    struct message message = {0};
    CUdeviceptr at = 0, small = 0, managed = 0, opened = 0;
    void *host = NULL;
    CALL(cuMemAlloc_v2, &at, 8 * MIB);
    CALL(cuMemAlloc_v2, &small, 1000);
    CALL(cuMemAllocManaged, &managed, 1000, CU_MEM_ATTACH_GLOBAL);
    CALL(cuMemAllocHost_v2, &host, 1000);
    CALL(cuMemsetD8_v2, at, 7, 1);
    CALL(cuMemsetD8_v2, small, 6, 1);
    TRY("get.null", cuIpcGetMemHandle, NULL, at);
    TRY("get.unknown", cuIpcGetMemHandle, &message.handle, 0x1000);
    TRY("get.managed", cuIpcGetMemHandle, &message.handle, managed);
    TRY("get.host", cuIpcGetMemHandle, &message.handle, (CUdeviceptr)(uintptr_t)host);
    TRY("get.inside", cuIpcGetMemHandle, &message.handle, at + 512);
    TRY("get.small", cuIpcGetMemHandle, &message.handle, small);
    tell(sock, &message, 'o', -1);
    TRY("get", cuIpcGetMemHandle, &message.handle, at);
    TRY("open.own", cuIpcOpenMemHandle_v2, &opened, message.handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    CUipcMemHandle nothing;
    memset(&nothing, 0, sizeof nothing);
    TRY("open.nothing", cuIpcOpenMemHandle_v2, &opened, nothing, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    TRY("close.own", cuIpcCloseMemHandle, at);
    tell(sock, &message, 'o', -1);
    say("written", first_byte(at));
    CALL(cuMemFree_v2, at);
    CALL(cuMemFree_v2, small);
}

/* Frees memory that another process has open. The driver's documentation does not define the effect, so this runs last.
 */
static void check_free(int sock)
{
    struct message message = {0};
    CUdeviceptr at = 0;
    CALL(cuMemAlloc_v2, &at, 8 * MIB);
    CALL(cuMemsetD8_v2, at, 5, 1);
    TRY("freed.get", cuIpcGetMemHandle, &message.handle, at);
    tell(sock, &message, 'h', -1);
    mark();
    TRY("free", cuMemFree_v2, at);
    say("freed.mib", taken_mib());
    tell(sock, &message, 'v', -1);
}

static void check_descriptors(int sock)
{
    struct message message = {0};
    CUmemGenericAllocationHandle handle = 0, plain = 0;
    CUmemAllocationProp prop;
    int file = -1;
    memset(&prop, 0, sizeof prop);
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    CALL(cuMemCreate, &plain, 4 * MIB, &prop, 0);
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    mark();
    TRY("create", cuMemCreate, &handle, 4 * MIB, &prop, 0);
    TRY("export.plain", cuMemExportToShareableHandle, &file, plain, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    TRY("export.flags", cuMemExportToShareableHandle, &file, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 1);
    TRY("export.type", cuMemExportToShareableHandle, &file, handle, CU_MEM_HANDLE_TYPE_WIN32, 0);
    TRY("export", cuMemExportToShareableHandle, &file, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    say("export.file", file >= 0);
    CUdeviceptr at = map(handle, 4 * MIB);
    CALL(cuMemsetD8_v2, at, 7, 1);
    CALL(cuCtxSynchronize);
    tell(sock, &message, 'i', file);
    say("imported.written", first_byte(at));
    TRY("unmap", cuMemUnmap, at, 4 * MIB);
    TRY("release", cuMemRelease, handle);
    say("released.mib", taken_mib());
    TRY("import.back", cuMemImportFromShareableHandle, &handle, (void *)(intptr_t)file,
        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    close(file);
    CALL(cuMemRelease, handle);
    TRY("import.closed", cuMemImportFromShareableHandle, &handle, (void *)(intptr_t)-1,
        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    CALL(cuMemRelease, plain);
}

void check_sharing(void)
{
    pid_t child = -1;
    section("sharing");
    int sock = start_child(&child), status = 0;
    struct message message;
    receive_message(sock, &message); /* the child is ready */
    use_primary();
    check_handles(sock);
    check_descriptors(sock);
    check_free(sock);
    message = (struct message){.what = 'q'};
    send_message(sock, &message, -1);
    waitpid(child, &status, 0);
    say("child", status);
}
