/* Contexts, memory, virtual memory management and pools. */
#include "conformance.h"

#include <stdio.h>
#include <string.h>

static void check_no_context(void)
{
    size_t size;
    unsigned number;
    CUdevice device;
    CUcontext context;
    CUdeviceptr ptr = 0;
    CUstream stream;
    CUevent event;
    CUmodule module;
    TRY("none.current", cuCtxGetCurrent, &context);
    say("none.current.isnull", !context);
    TRY("none.pop", cuCtxPopCurrent_v2, &context);
    TRY("none.push", cuCtxPushCurrent_v2, NULL);
    TRY("none.set", cuCtxSetCurrent, NULL);
    TRY("none.device", cuCtxGetDevice, &device);
    TRY("none.flags", cuCtxGetFlags, &number);
    TRY("none.version", cuCtxGetApiVersion, NULL, &number);
    TRY("none.synchronize", cuCtxSynchronize);
    TRY("none.limit", cuCtxGetLimit, &size, CU_LIMIT_STACK_SIZE);
    TRY("none.destroy", cuCtxDestroy_v2, NULL);
    TRY("none.info", cuMemGetInfo_v2, &size, &size);
    TRY("none.alloc", cuMemAlloc_v2, &ptr, 1);
    TRY("none.alloc.null", cuMemAlloc_v2, NULL, 0);
    TRY("none.managed", cuMemAllocManaged, &ptr, 1, CU_MEM_ATTACH_GLOBAL);
    TRY("none.free.0", cuMemFree_v2, 0);
    TRY("none.free.unknown", cuMemFree_v2, 0x1000);
    TRY("none.stream", cuStreamCreate, &stream, 0);
    TRY("none.event", cuEventCreate, &event, 0);
    TRY("none.stream.synchronize", cuStreamSynchronize, NULL);
    TRY("none.module", cuModuleLoadData, &module, "");
    TRY("none.pointer", cuPointerGetAttribute, &number, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, 0x1000);
}

static void check_primary(void)
{
    unsigned flags = 9;
    int active = 9;
    CUcontext context = NULL, current = NULL;
    TRY("primary.state", cuDevicePrimaryCtxGetState, 0, &flags, &active);
    say("primary.state.active", active);
    TRY("primary.state.null", cuDevicePrimaryCtxGetState, 0, NULL, NULL);
    TRY("primary.release.unheld", cuDevicePrimaryCtxRelease_v2, 0);
    TRY("primary.retain.null", cuDevicePrimaryCtxRetain, NULL, 0);
    TRY("primary.retain.device", cuDevicePrimaryCtxRetain, &context, 99);
    TRY("primary.flags", cuDevicePrimaryCtxSetFlags_v2, 0, 0);
    TRY("primary.flags.bad", cuDevicePrimaryCtxSetFlags_v2, 0, 0xf000);
    TRY("primary.retain", cuDevicePrimaryCtxRetain, &context, 0);
    CALL(cuCtxGetCurrent, &current);
    say("primary.retain.becomes_current", current == context);
    TRY("primary.set", cuCtxSetCurrent, context);
    CALL(cuDevicePrimaryCtxGetState, 0, &flags, &active);
    say("primary.active", active);
    say("primary.state.flags", flags);
    TRY("primary.destroy", cuCtxDestroy_v2, context);
    TRY("primary.getflags", cuCtxGetFlags, &flags);
    say("primary.getflags.value", flags);
    TRY("primary.apiversion", cuCtxGetApiVersion, context, &flags);
    say("primary.apiversion.value", flags);
    TRY("primary.release", cuDevicePrimaryCtxRelease_v2, 0);
    CUdeviceptr ptr;
    CUdevice device;
    TRY("primary.released.alloc", cuMemAlloc_v2, &ptr, 1);
    TRY("primary.released.device", cuCtxGetDevice, &device);
    TRY("primary.released.synchronize", cuCtxSynchronize);
    TRY("primary.released.push", cuCtxPushCurrent_v2, context);
    CALL(cuCtxGetCurrent, &current);
    say("primary.released.current", current == context);
    TRY("primary.reset", cuDevicePrimaryCtxReset_v2, 0);
    TRY("primary.again", cuDevicePrimaryCtxRetain, &current, 0);
    say("primary.again.same", current == context);
    TRY("primary.again.alloc", cuMemAlloc_v2, &ptr, 1);
    TRY("primary.active.reset", cuDevicePrimaryCtxReset_v2, 0);
    TRY("primary.reset.alloc", cuMemAlloc_v2, &ptr, 1);
    TRY("primary.reset.release", cuDevicePrimaryCtxRelease_v2, 0);
    TRY("primary.reset.release.again", cuDevicePrimaryCtxRelease_v2, 0);
    CALL(cuCtxSetCurrent, NULL);
}

static void check_created(void)
{
    CUcontext first = NULL, second = NULL, current = NULL;
    CUdeviceptr ptr = 0, other = 0;
    use_primary();
    mark();
    TRY("create.null", cuCtxCreate_v2, NULL, 0, 0);
    TRY("create.device", cuCtxCreate_v2, &first, 0, 99);
    TRY("create.flags", cuCtxCreate_v2, &first, 0x8000, 0);
    TRY("create", cuCtxCreate_v2, &first, 0, 0);
    say("create.mib", taken_mib());
    CALL(cuMemAlloc_v2, &ptr, 8 * MIB);
    TRY("create.second", cuCtxCreate_v2, &second, CU_CTX_SCHED_BLOCKING_SYNC, 0);
    CALL(cuMemAlloc_v2, &other, 8 * MIB);
    say("create.second.mib", taken_mib());
    CALL(cuCtxGetCurrent, &current);
    say("create.current", current == second);
    TRY("other.free", cuMemFree_v2, ptr); /* belongs to a context that is not current */
    CALL(cuCtxPushCurrent_v2, first);
    TRY("destroy.notcurrent", cuCtxDestroy_v2, second);
    say("destroy.mib", taken_mib());
    TRY("destroy.twice", cuCtxDestroy_v2, second);
    TRY("destroyed.memory.free", cuMemFree_v2, other);
    TRY("destroyed.push", cuCtxPushCurrent_v2, second);
    TRY("destroyed.set", cuCtxSetCurrent, second);
    TRY("destroy", cuCtxDestroy_v2, first);
    CALL(cuCtxGetCurrent, &current);
    say("destroy.pops", current != first);
    TRY("destroyed.alloc", cuMemAlloc_v2, &ptr, 1);
    TRY("destroyed.pop", cuCtxPopCurrent_v2, &current);
    CALL(cuCtxSetCurrent, NULL);
    while (!CALL(cuCtxPopCurrent_v2, &current))
        ;
    use_primary();
    say("left.mib", taken_mib());
}

void check_contexts(void)
{
    section("context");
    check_no_context();
    check_primary();
    check_created();
    size_t value = 0;
    int least = 9, greatest = 9;
    for (int i = 0; i < 10; i++) {
        char name[32];
        snprintf(name, sizeof name, "limit.%d", i);
        say(name, CALL(cuCtxGetLimit, &value, (CUlimit)i) ? -1 : (long long)value);
    }
    TRY("limit.null", cuCtxGetLimit, NULL, CU_LIMIT_STACK_SIZE);
    TRY("priorities", cuCtxGetStreamPriorityRange, &least, &greatest);
    say("priorities.greatest", greatest);
    TRY("device.null", cuCtxGetDevice, NULL);
    TRY("current.null", cuCtxGetCurrent, NULL);
    TRY("flags.null", cuCtxGetFlags, NULL);
    TRY("pop.null", cuCtxPopCurrent_v2, NULL);
}

static void check_sizes(void)
{
    static const struct {
        const char *name;
        size_t size;
        int n;
    } cases[] = {{"1x1", 1, 1},
                 {"1000x1K", KIB, 1000},
                 {"100x64K", 64 * KIB, 100},
                 {"1x1M", MIB, 1},
                 {"3x1M", MIB, 3},
                 {"1x1M+1", MIB + 1, 1},
                 {"1x2M", 2 * MIB, 1},
                 {"1x3M", 3 * MIB, 1},
                 {"7x700K", 700 * KIB, 7},
                 {"1x100M", 100 * MIB, 1},
                 {"5x513", 513, 5}};
    static CUdeviceptr ptrs[1000];
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        char name[48];
        mark();
        for (int i = 0; i < cases[c].n; i++) CALL(cuMemAlloc_v2, &ptrs[i], cases[c].size);
        snprintf(name, sizeof name, "size.%s.mib", cases[c].name);
        say(name, taken_mib());
        snprintf(name, sizeof name, "size.%s.alignment", cases[c].name);
        say(name, (long long)(ptrs[0] & -ptrs[0] & 511));
        if (cases[c].n > 1 && cases[c].size < MIB) {
            snprintf(name, sizeof name, "size.%s.step", cases[c].name);
            say(name, (long long)(ptrs[1] - ptrs[0]));
        }
        for (int i = 0; i < cases[c].n; i++) CALL(cuMemFree_v2, ptrs[i]);
        snprintf(name, sizeof name, "size.%s.left", cases[c].name);
        say(name, taken_mib());
    }
}

static void check_ranges(void)
{
    CUdeviceptr small = 0, large = 0, base = 0;
    size_t size = 0;
    CALL(cuMemAlloc_v2, &small, 1000);
    CALL(cuMemAlloc_v2, &large, 3 * MIB);
    TRY("range", cuMemGetAddressRange_v2, &base, &size, small + 10);
    say("range.size", (long long)size);
    say("range.base", base == small);
    TRY("range.end", cuMemGetAddressRange_v2, &base, &size, small + 1000);
    TRY("range.large", cuMemGetAddressRange_v2, &base, &size, large + 3 * MIB - 1);
    say("range.large.size", (long long)size);
    TRY("range.large.end", cuMemGetAddressRange_v2, &base, &size, large + 3 * MIB);
    TRY("range.nulls", cuMemGetAddressRange_v2, NULL, NULL, small);
    TRY("range.unknown", cuMemGetAddressRange_v2, &base, &size, 0x1000);
    TRY("free.inside", cuMemFree_v2, large + 512);
    TRY("free.inside.small", cuMemFree_v2, small + 512);
    TRY("free", cuMemFree_v2, large);
    TRY("free.twice", cuMemFree_v2, large);
    TRY("free.unknown", cuMemFree_v2, 0x1000);
    TRY("free.0", cuMemFree_v2, 0);
    TRY("range.freed", cuMemGetAddressRange_v2, &base, &size, large);
    TRY("free.small", cuMemFree_v2, small);
    TRY("free.small.twice", cuMemFree_v2, small);
}

static void check_kinds(void)
{
    CUdeviceptr ptr = 0;
    size_t pitch = 0;
    void *host = NULL;
    static const size_t widths[] = {1, 512, 513, 1000, 4096, 5000};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        char name[32];
        snprintf(name, sizeof name, "pitch.%zu", widths[i]);
        say(name, CALL(cuMemAllocPitch_v2, &ptr, &pitch, widths[i], 7, 4) ? -1 : (long long)pitch);
        CALL(cuMemFree_v2, ptr);
    }
    mark();
    CALL(cuMemAllocPitch_v2, &ptr, &pitch, 1000, 10000, 16);
    say("pitch.mib", taken_mib());
    CALL(cuMemFree_v2, ptr);
    TRY("pitch.element", cuMemAllocPitch_v2, &ptr, &pitch, 100, 10, 5);
    TRY("pitch.width0", cuMemAllocPitch_v2, &ptr, &pitch, 0, 10, 4);
    TRY("pitch.height0", cuMemAllocPitch_v2, &ptr, &pitch, 100, 0, 4);
    TRY("pitch.null", cuMemAllocPitch_v2, &ptr, NULL, 100, 10, 4);
    TRY("pitch.huge", cuMemAllocPitch_v2, &ptr, &pitch, (size_t)1 << 40, (size_t)1 << 40, 4);
    TRY("alloc.null", cuMemAlloc_v2, NULL, 10);
    TRY("alloc.0", cuMemAlloc_v2, &ptr, 0);
    TRY("alloc.huge", cuMemAlloc_v2, &ptr, (size_t)1 << 45);
    TRY("alloc.max", cuMemAlloc_v2, &ptr, ~(size_t)0);
    TRY("info.null", cuMemGetInfo_v2, NULL, NULL);
    mark();
    TRY("managed", cuMemAllocManaged, &ptr, 16 * MIB, CU_MEM_ATTACH_GLOBAL);
    say("managed.mib", taken_mib());
    TRY("managed.free", cuMemFree_v2, ptr);
    TRY("managed.0", cuMemAllocManaged, &ptr, 0, CU_MEM_ATTACH_GLOBAL);
    TRY("managed.null", cuMemAllocManaged, NULL, 10, CU_MEM_ATTACH_GLOBAL);
    TRY("managed.flags0", cuMemAllocManaged, &ptr, 10, 0);
    TRY("managed.flags", cuMemAllocManaged, &ptr, 10, 99);
    TRY("host", cuMemAllocHost_v2, &host, 10);
    TRY("host.free", cuMemFreeHost, host);
    TRY("host.free.twice", cuMemFreeHost, host);
    TRY("host.free.null", cuMemFreeHost, NULL);
    TRY("host.0", cuMemAllocHost_v2, &host, 0);
    TRY("host.flags", cuMemHostAlloc, &host, 10, 0x100);
    TRY("host.null", cuMemHostAlloc, NULL, 10, 0);
}

static void check_copies(void)
{
    CUdeviceptr ptr = 0, other = 0;
    static char out[4096], in[4096];
    CALL(cuMemAlloc_v2, &ptr, 4 * MIB);
    CALL(cuMemAlloc_v2, &other, 4096);
    memset(out, 7, sizeof out);
    TRY("copy.in", cuMemcpyHtoD_v2, ptr + 100, out, sizeof out);
    TRY("copy.across", cuMemcpyDtoD_v2, other, ptr + 100, sizeof out);
    TRY("copy.out", cuMemcpyDtoH_v2, in, other, sizeof in);
    say("copy.same", !memcmp(in, out, sizeof in));
    TRY("copy.any", cuMemcpy, other, ptr, 16);
    TRY("copy.0", cuMemcpyHtoD_v2, ptr, out, 0);
    TRY("copy.0.null", cuMemcpyHtoD_v2, 0, NULL, 0);
    TRY("copy.null", cuMemcpyHtoD_v2, ptr, NULL, 16);
    TRY("copy.unknown", cuMemcpyHtoD_v2, 0x1000, out, 16);
    TRY("copy.past", cuMemcpyHtoD_v2, other, out, 64 * MIB);
    TRY("memset", cuMemsetD8_v2, ptr, 5, 4096);
    TRY("memset.32", cuMemsetD32_v2, ptr, 5, 1024);
    TRY("memset.misaligned", cuMemsetD32_v2, ptr + 1, 5, 4);
    TRY("memset.0", cuMemsetD8_v2, ptr, 5, 0);
    TRY("memset.null", cuMemsetD8_v2, 0, 5, 16);
    TRY("memset.unknown", cuMemsetD8_v2, 0x1000, 5, 16);
    TRY("memset.async", cuMemsetD8Async, ptr, 9, 16, NULL);
    CALL(cuMemcpyDtoH_v2, in, ptr, 32);
    say("memset.value", in[0] == 9 && in[16] == 5);
    CALL(cuMemFree_v2, ptr);
    CALL(cuMemFree_v2, other);
}

static void check_pointers(void)
{
    static const char *const names[] = {"device", "managed", "host", "unknown"};
    CUdeviceptr ptrs[4] = {0, 0, 0, 0x1000};
    void *host = NULL;
    CALL(cuMemAlloc_v2, &ptrs[0], 1000);
    CALL(cuMemAllocManaged, &ptrs[1], 1000, CU_MEM_ATTACH_GLOBAL);
    CALL(cuMemAllocHost_v2, &host, 1000);
    ptrs[2] = (CUdeviceptr)(uintptr_t)host;
    for (int i = 0; i < 4; i++) {
        for (int attribute = 1; attribute < 24; attribute++) {
            char name[48];
            uint64_t value[2] = {0, 0};
            snprintf(name, sizeof name, "pointer.%s.%d", names[i], attribute);
            long long result = CALL(cuPointerGetAttribute, value, (CUpointer_attribute)attribute, ptrs[i]);
            int is_small = value[0] < 4096 && attribute != CU_POINTER_ATTRIBUTE_BUFFER_ID &&
                           attribute != CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID;
            say(name, result ? -result : is_small ? (long long)value[0] : 4096);
        }
        int ordinal = 77;
        uint64_t type = 77, address = 77;
        CUpointer_attribute wanted[3] = {CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                                         CU_POINTER_ATTRIBUTE_DEVICE_POINTER};
        void *data[3] = {&ordinal, &type, &address};
        char name[48];
        snprintf(name, sizeof name, "pointers.%s", names[i]);
        say(name, CALL(cuPointerGetAttributes, 3, wanted, data, ptrs[i]));
        say("pointers.ordinal", ordinal);
        say("pointers.type", (long long)(uint32_t)type);
        say("pointers.address", address == ptrs[i]);
    }
    CALL(cuMemFree_v2, ptrs[0]);
    CALL(cuMemFree_v2, ptrs[1]);
    CALL(cuMemFreeHost, host);
}

void check_memory(void)
{
    section("memory");
    use_primary();
    check_sizes();
    check_ranges();
    check_kinds();
    check_copies();
    check_pointers();
}
