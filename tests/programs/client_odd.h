/* Commands that do what programs rarely do, for test_odd.py. Only client.c includes this file. */

#include "sandbox.h"

#define NOWHERE 8 /* an address that nothing is ever mapped at */

/* -- reuse BYTES N: two threads allocate and free BYTES without a pause, N times each. Prints how often a thread got
 * the pointer that the other thread had freed last or was about to free, and the number of failed calls. */

struct reuser {
    pthread_t thread;
    _Atomic CUdeviceptr freeing;
    struct reuser *other;
    uint64_t bytes, times, again, failures;
};

static void *reuse(void *argument)
{
    struct reuser *r = argument;
    r->failures = cu.cuCtxSetCurrent(context) != CUDA_SUCCESS;
    for (uint64_t i = 0; i < r->times; i++) {
        CUdeviceptr pointer = 0;
        if (cu.cuMemAlloc_v2(&pointer, r->bytes)) r->failures++;
        r->again += pointer == r->other->freeing;
        r->freeing = pointer;
        if (cu.cuMemFree_v2(pointer)) r->failures++;
    }
    return NULL;
}

static void do_reuse(const uint64_t *n)
{
    struct reuser both[2] = {{.other = &both[1], .bytes = n[0], .times = n[1]},
                             {.other = &both[0], .bytes = n[0], .times = n[1]}};
    CUresult result = need_context();
    if (result) {
        answer("%s", name_of(result));
        return;
    }
    for (int i = 0; i < 2; i++)
        if (pthread_create(&both[i].thread, NULL, reuse, &both[i])) exit(1);
    for (int i = 0; i < 2; i++) pthread_join(both[i].thread, NULL);
    answer("ok %" PRIu64 " %" PRIu64, both[0].again + both[1].again, both[0].failures + both[1].failures);
}

/* -- leap BYTES: in a call, the driver writes to an invalid address from the program. The handler of SIGSEGV leaves the
 * call by siglongjmp. */

static sigjmp_buf out;

static void leap(int number)
{
    (void)number;
    siglongjmp(out, 1);
}

static bool left(uint64_t bytes)
{
    struct sigaction action = {.sa_handler = leap}, before;
    volatile bool came_back = false;
    sigaction(SIGSEGV, &action, &before);
    if (!sigsetjmp(out, 1)) {
        cu.cuMemAlloc_v2((CUdeviceptr *)NOWHERE, bytes);
        came_back = true;
    }
    sigaction(SIGSEGV, &before, NULL);
    return !came_back;
}

static void do_leap(const uint64_t *n)
{
    CUresult result = need_context();
    if (result)
        answer("%s", name_of(result));
    else
        answer(left(n[0]) ? "ok" : "it came back");
}

static void *leap_and_end(void *bytes)
{
    return cu.cuCtxSetCurrent(context) || !left(*(const uint64_t *)bytes) ? bytes : NULL;
}

/* brieflyleap BYTES: the same in a thread that exits after it. */
static void do_brief_leap(const uint64_t *n)
{
    pthread_t thread;
    void *wrong = NULL;
    uint64_t bytes = n[0];
    if (need_context() || pthread_create(&thread, NULL, leap_and_end, &bytes) || pthread_join(thread, &wrong) || wrong)
        answer("no leap");
    else
        answer("ok");
}

/* -- contexts beside the primary one */

static void do_new_context(const uint64_t *n)
{
    CUcontext made = NULL;
    CUresult result = need_context();
    (void)n;
    if (!result) result = cu.cuCtxCreate_v2(&made, 0, 0);
    if (!result) result = cu.cuCtxPopCurrent_v2(&made);
    if (result)
        answer("%s", name_of(result));
    else
        answer("ok %" PRIu64, (uint64_t)made);
}

/* newmanaged BYTES TIMES: creates a context with TIMES allocations of BYTES of managed memory. */
static void do_new_managed(const uint64_t *n)
{
    CUcontext made = NULL;
    CUdeviceptr at;
    CUresult result = need_context();
    if (!result) result = cu.cuCtxCreate_v2(&made, 0, 0);
    for (uint64_t i = 0; !result && i < n[1]; i++) result = cu.cuMemAllocManaged(&at, n[0], CU_MEM_ATTACH_GLOBAL);
    if (!result) result = cu.cuCtxPopCurrent_v2(&made);
    if (result)
        answer("%s", name_of(result));
    else
        answer("ok %" PRIu64, (uint64_t)made);
}

static void do_end_context(const uint64_t *n) { plain_answer(cu.cuCtxDestroy_v2((CUcontext)n[0])); }

/* -- memory of one process in another */

static void do_share(const uint64_t *n)
{
    CUipcMemHandle handle;
    uint64_t w[8];
    CUresult result = cu.cuIpcGetMemHandle(&handle, n[0]);
    memcpy(w, &handle, sizeof w);
    if (result)
        answer("%s", name_of(result));
    else
        answer("ok %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64, w[0],
               w[1], w[2], w[3], w[4], w[5], w[6], w[7]);
}

static void do_open(const uint64_t *n)
{
    CUipcMemHandle handle;
    CUdeviceptr at = 0;
    CUresult result = need_context();
    memcpy(&handle, n, sizeof handle);
    if (!result) result = cu.cuIpcOpenMemHandle_v2(&at, handle, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
    if (result)
        answer("%s", name_of(result));
    else
        answer("ok %llu", at);
}

static void do_close(const uint64_t *n) { plain_answer(cu.cuIpcCloseMemHandle(n[0])); }

/* export BYTES: allocates memory and exports it as a descriptor. Prints the handle and the descriptor. */
static void do_export(const uint64_t *n)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};
    CUmemGenericAllocationHandle handle = 0;
    int file = -1;
    CUresult result = need_context();
    if (!result) result = cu.cuMemCreate(&handle, n[0], &prop, 0);
    if (!result) result = cu.cuMemExportToShareableHandle(&file, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
    if (result)
        answer("%s", name_of(result));
    else
        answer("ok %llu %d", handle, file);
}

/* import PID DESCRIPTOR: imports exported memory from another process of the same pid namespace. */
static void do_import(const uint64_t *n)
{
    CUmemGenericAllocationHandle handle = 0;
    CUresult result = need_context();
    int process = (int)syscall(SYS_pidfd_open, (pid_t)n[0], 0);
    int file = (int)syscall(SYS_pidfd_getfd, process, (int)n[1], 0);
    if (!result)
        result = cu.cuMemImportFromShareableHandle(&handle, (void *)(uintptr_t)file,
                                                   CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    close(file);
    close(process);
    if (result)
        answer("%s", name_of(result));
    else
        answer("ok %llu", handle);
}

/* -- forbid: from now on the kernel kills this program if the shim opens a socket. */

static void do_forbid(const uint64_t *n)
{
    (void)n;
    answer(forbid_sockets(SECCOMP_RET_KILL_PROCESS) ? "no filter" : "ok");
}
