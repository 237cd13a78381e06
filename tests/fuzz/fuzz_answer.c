/*
 * fuzz_answer.c: any answer to the shim's hello, with any contents of its pages. The shim gets pages that it can read,
 * or none. The fuzzer runs the shim's own hello, views and lists of processes. The functions of the driver below return
 * what a driver without errors returns.
 *
 * An input: the number of descriptors (1 byte), the kind of each (1 byte each, enum file), then changes to a valid
 * answer and valid pages: offset in all of them together (2 bytes) and value (8 bytes).
 */
#include "../../shim/link/hello.c"

#include <stdlib.h>

#include "../../shim/account/account.h"
#include "../../shim/account/orphans.h"
#include "../../shim/link/link.h"
#include "../../shim/standalone/standalone.h"

#define FILES 10
#define USAGE (2 * FGPU_PAGE_BYTES)
#define CHECK(true)                                                                                                    \
    if (!(true)) __builtin_trap()

enum file { WHOLE, SHORT, EMPTY, PIPE, FOLDER, SOCKET, KINDS };

static struct {
    struct fgpu_answer answer;
    char pages[FILES][FGPU_PAGE_BYTES] __attribute__((aligned(8)));
} right, sent;
static int files[FILES], odd[KINDS];
static char *contents[FILES];
static struct fgpu_view view;
static const uint8_t uuid[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};

/* -- stand-ins for the rest of the shim, and for the driver */

uint64_t fgpu_now(void)
{
    static uint64_t now;
    return now += 1000; /* the fuzzer does not test times */
}
struct fgpu_view fgpu_look(void) { return view; }
unsigned fgpu_standalone_rows(int index, struct fgpu_row *rows, unsigned most)
{
    return (void)index, (void)rows, (void)most, 0;
}
void fgpu_standalone_refresh(void) {}
void fgpu_hold(void) {}
int fgpu_standalone_device(const uint8_t wanted[16]) { return (void)wanted, -1; }

/* Functions that send requests to the kernel must not be called here. */
#define NEVER(type, name, ...)                                                                                         \
    type name(__VA_ARGS__) { __builtin_trap(); }
__thread bool fgpu_calls_second;
_Atomic bool fgpu_contexts_ended;
NEVER(struct fgpu_asked, fgpu_announce, void)
NEVER(void, fgpu_arrive, struct fgpu_asked)
NEVER(bool, fgpu_current_is_gone, void)
NEVER(bool, fgpu_has_orphans, struct fgpu_view, int)
NEVER(struct fgpu_view, fgpu_glance, void)
NEVER(struct fgpu_view, fgpu_insist, void)
NEVER(uint64_t, fgpu_ticket, void)
NEVER(void, fgpu_nap, long)
NEVER(bool, fgpu_pools_yield, CUdevice)
NEVER(int, fgpu_ask, struct fgpu_view, unsigned, uint64_t, unsigned, uint64_t)
NEVER(bool, fgpu_standalone_charge, unsigned, uint64_t)
NEVER(void, fgpu_standalone_release, unsigned, uint64_t)
NEVER(void, fgpu_grant_made, unsigned, uint64_t, unsigned, uint64_t, uint64_t)
NEVER(void, fgpu_admit_here, unsigned, uint64_t, unsigned, uint64_t)
NEVER(void, fgpu_report_crowd, void)
NEVER(void, fgpu_release_here, unsigned, uint64_t, unsigned, uint64_t)

static CUresult fake_memory(size_t *left, size_t *total)
{
    *left = 10ull << 30;
    *total = 16ull << 30;
    return CUDA_SUCCESS;
}
static CUresult fake_total(size_t *bytes, CUdevice device)
{
    (void)device;
    *bytes = 16ull << 30;
    return CUDA_SUCCESS;
}
static CUresult fake_device(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
static CUresult fake_uuid(CUuuid *out, CUdevice device) { return (void)device, memcpy(out, uuid, 16), CUDA_SUCCESS; }
static nvmlReturn_t fake_uuid_text(nvmlDevice_t device, char *text, unsigned room)
{
    (void)device;
    CHECK(room > 40);
    strcpy(text, "GPU-01020304-0506-0708-090a-0b0c0d0e0f10");
    return NVML_SUCCESS;
}
static nvmlReturn_t fake_info(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    (void)device;
    memory->total = 16ull << 30;
    memory->free = 10ull << 30;
    return NVML_SUCCESS;
}
static nvmlReturn_t fake_list(nvmlDevice_t device, unsigned *count, void *infos)
{
    (void)device, (void)infos;
    *count = 0;
    return NVML_SUCCESS;
}
static nvmlReturn_t fake_utilization(nvmlDevice_t device, nvmlProcessUtilizationSample_t *samples, unsigned *count,
                                     unsigned long long since)
{
    (void)device, (void)since;
    for (unsigned i = 0; i < *count; i++) samples[i].pid = i;
    return NVML_SUCCESS;
}

void *fgpu_real(enum fgpu_name at)
{
    switch (at) {
    case FGPU_AT_cuMemGetInfo_v2:
        return fake_memory;
    case FGPU_AT_cuDeviceTotalMem_v2:
        return fake_total;
    case FGPU_AT_cuCtxGetDevice:
        return fake_device;
    case FGPU_AT_cuDeviceGetUuid_v2:
    case FGPU_AT_cuDeviceGetUuid:
        return fake_uuid;
    case FGPU_AT_nvmlDeviceGetUUID:
        return fake_uuid_text;
    case FGPU_AT_nvmlDeviceGetMemoryInfo_v2:
        return fake_info;
    case FGPU_AT_nvmlDeviceGetComputeRunningProcesses_v3:
        return fake_list;
    case FGPU_AT_nvmlDeviceGetProcessUtilization:
        return fake_utilization;
    default:
        return NULL;
    }
}

/* -- one answer */

static void make_right(void)
{
    struct fgpu_control_page *control = (void *)right.pages[0];
    right.answer = (struct fgpu_answer){.magic = FGPU_MAGIC,
                                        .version = FGPU_LAYOUT,
                                        .size = sizeof right.answer,
                                        .code = FGPU_CODE_MANAGED,
                                        .epoch = 7,
                                        .devices = 1};
    control->version = FGPU_LAYOUT;
    control->flags = FGPU_MANAGED;
    control->device_count = 1;
    control->devices[0].index = 3;
    memcpy(control->devices[0].uuid, uuid, 16);
    control->row_count = 2;
    for (int i = 0; i < 2; i++) control->rows[i] = (struct fgpu_row){100 + i, 3, 1 << 20};
    for (int i = 2; i < FILES; i++) {
        struct fgpu_usage_page *usage = (void *)right.pages[i];
        usage->version = FGPU_LAYOUT;
        usage->devices[3] = (struct fgpu_usage){.limit = 1 << 30, .used = 1 << 20};
    }
}

static void begin(void)
{
    int ends[2];
    make_right();
    for (int i = 0; i < FILES; i++) {
        files[i] = memfd_create("page", MFD_CLOEXEC);
        CHECK(files[i] >= 0 && !ftruncate(files[i], FGPU_PAGE_BYTES));
        contents[i] = mmap(NULL, FGPU_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, files[i], 0);
        CHECK(contents[i] != MAP_FAILED);
    }
    odd[SHORT] = memfd_create("short", MFD_CLOEXEC);
    odd[EMPTY] = memfd_create("empty", MFD_CLOEXEC);
    CHECK(!ftruncate(odd[SHORT], FGPU_PAGE_BYTES - 1) && !pipe2(ends, O_CLOEXEC));
    odd[PIPE] = ends[0];
    odd[FOLDER] = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    odd[SOCKET] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
}

static void send_answer(int to, const int *descriptors, size_t count, size_t size)
{
    union {
        char bytes[CMSG_SPACE(16 * sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec part = {&sent, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(header), descriptors, count * sizeof(int));
    }
    sendmsg(to, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

static void read_views(void)
{
    size_t left = 0, total = 0;
    unsigned count = 0, samples = 5;
    nvmlMemory_v2_t memory = {0};
    nvmlProcessUtilizationSample_t utilization[5] = {0};
    nvmlDevice_t device = (void *)1;
    CHECK(cuMemGetInfo_v2(&left, &total) == CUDA_SUCCESS && left <= total && total <= 16ull << 30);
    CHECK(cuDeviceTotalMem_v2(&total, 0) == CUDA_SUCCESS && total <= 16ull << 30);
    nvmlDeviceGetMemoryInfo_v2(device, &memory);
    CHECK(memory.used <= memory.total && memory.free <= memory.total && memory.reserved <= memory.total);
    nvmlProcessInfo_t *infos = malloc(FGPU_ROWS * sizeof *infos);
    nvmlDeviceGetComputeRunningProcesses_v3(device, &count, NULL);
    CHECK(count <= FGPU_ROWS);
    nvmlDeviceGetComputeRunningProcesses_v3(device, &count, infos);
    CHECK(count <= FGPU_ROWS);
    nvmlDeviceGetProcessUtilization(device, utilization, &samples, 0);
    CHECK(samples <= 5);
    free(infos);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bool begun;
    if (!begun) begin();
    begun = true;
    int ends[2], descriptors[16];
    size_t count = size ? data[0] % 17 : 0, at = 1;
    sent = right;
    sent.answer.levels = count > 2 ? (uint32_t)count - 2 : 0;
    for (size_t i = 0; i < count; i++, at++) {
        enum file kind = at < size ? data[at] % KINDS : WHOLE;
        descriptors[i] = kind == WHOLE ? files[i % FILES] : odd[kind];
    }
    for (; at + 10 <= size; at += 10)
        memcpy((char *)&sent + (data[at] | data[at + 1] << 8) % (sizeof sent - 8), data + at + 2, 8);
    for (int i = 0; i < FILES; i++) memcpy(contents[i], sent.pages[i], FGPU_PAGE_BYTES);
    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends));
    send_answer(ends[1], descriptors, count, at < size ? sizeof sent.answer - (size - at) * 16 : sizeof sent.answer);
    close(ends[1]);
    struct fgpu_note note;
    unsigned levels = 0;
    enum fgpu_outcome outcome = once(ends[0], UINT64_MAX, 0, &note, &levels);
    close(ends[0]);
    view = (struct fgpu_view){.link = FGPU_UNMANAGED, .control = (const void *)fgpu_set(0)};
    if (outcome == FGPU_IS_HELD) {
        CHECK(levels && levels <= FGPU_LEVELS);
        view.link = FGPU_HELD;
        view.levels = levels;
        view.usage = (const void *)(fgpu_set(0) + USAGE);
    }
    if (outcome == FGPU_IS_HELD || outcome == FGPU_IS_FREE) read_views();
    return 0;
}
