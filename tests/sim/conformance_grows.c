/* Device memory that comes by itself, without a call that asks for it: for stacks and local memory, the device's heap,
 * printf, data of modules, streams, graphs, registered host memory; and managed memory, page by page. All sizes are
 * what the device has lost since the section, or the context, began. */
#define _GNU_SOURCE
#include "conformance.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HEAD ".version 7.0\n.target sm_70\n.address_size 64\n"

static const char noop_code[] = HEAD ".visible .entry noop()\n{\n ret;\n}\n";

/* With so many bytes of local memory, none of which a compiler can do without. */
static const char local_code[] =
    HEAD ".visible .entry lmem(.param .u64 p, .param .u32 n)\n{\n .local .align 16 .b8 buf[%u];\n .reg .b64 %%rd<8>;\n"
         " .reg .b32 %%r<4>;\n ld.param.u32 %%r1, [n];\n mov.u64 %%rd1, buf;\n cvt.u64.u32 %%rd2, %%r1;\n"
         " add.u64 %%rd4, %%rd1, %%rd2;\n st.local.u32 [%%rd4], %%r1;\n ld.local.u32 %%r2, [%%rd1+16];\n"
         " ld.param.u64 %%rd5, [p];\n cvta.to.global.u64 %%rd6, %%rd5;\n st.global.u32 [%%rd6], %%r2;\n ret;\n}\n";

static const char printf_code[] =
    HEAD ".extern .func (.param .b32 r) vprintf (.param .b64 f, .param .b64 a);\n"
         ".global .align 4 .b8 fmt[4] = {0, 0, 0, 0};\n"
         ".visible .entry pr()\n{\n .reg .b64 %rd<4>;\n .reg .b32 %r<2>;\n mov.u64 %rd1, fmt;\n"
         " cvta.global.u64 %rd2, %rd1;\n mov.u64 %rd3, 0;\n {\n .param .b64 a0;\n st.param.b64 [a0+0], %rd2;\n"
         " .param .b64 a1;\n st.param.b64 [a1+0], %rd3;\n .param .b32 rv;\n call.uni (rv), vprintf, (a0, a1);\n"
         " ld.param.b32 %r1, [rv+0];\n }\n ret;\n}\n";

static const char malloc_code[] = HEAD
    ".extern .func (.param .b64 r) malloc (.param .b64 s);\n"
    ".visible .entry mal(.param .u64 p)\n{\n .reg .b64 %rd<6>;\n mov.u64 %rd1, 64;\n {\n .param .b64 a0;\n"
    " st.param.b64 [a0+0], %rd1;\n .param .b64 rv;\n call.uni (rv), malloc, (a0);\n ld.param.b64 %rd2, [rv+0];\n }\n"
    " ld.param.u64 %rd3, [p];\n cvta.to.global.u64 %rd4, %rd3;\n st.global.u64 [%rd4], %rd2;\n ret;\n}\n";

static const char data_code[] =
    HEAD ".visible .global .align 16 .b8 big[%u];\n"
         ".visible .entry glob()\n{\n .reg .b64 %%rd<2>;\n .reg .b32 %%r<2>;\n mov.u64 %%rd1, big;\n mov.u32 %%r1, 7;\n"
         " st.global.u32 [%%rd1], %%r1;\n ret;\n}\n";

static void say_number(const char *what, unsigned number, const char *of, long long value)
{
    char name[96];
    snprintf(name, sizeof name, "%s.%u%s%s", what, number, of[0] ? "." : "", of);
    say(name, value);
}

static CUfunction load(const char *code, const char *name, CUmodule *module)
{
    CUfunction function = NULL;
    *module = NULL;
    if (!CALL(cuModuleLoadData, module, code)) CALL(cuModuleGetFunction, &function, *module, name);
    return function;
}

static CUfunction load_sized(const char *format, unsigned bytes, const char *name, CUmodule *module)
{
    char code[2048];
    snprintf(code, sizeof code, format, bytes);
    return load(code, name, module);
}

static CUresult launch(CUfunction function, void **arguments)
{
    if (!function) return 999;
    CUresult result = CALL(cuLaunchKernel, function, 1, 1, 1, 32, 1, 1, 0, NULL, arguments, NULL);
    return result ? result : CALL(cuCtxSynchronize);
}

static CUfunction noop;

/* A context of its own, which a kernel has run in. */
static CUcontext begin(void)
{
    CUcontext context = NULL;
    CUmodule module;
    CALL(cuCtxCreate_v2, &context, 0, 0);
    noop = load(noop_code, "noop", &module);
    launch(noop, NULL);
    mark();
    return context;
}

static void check_stack(void)
{
    static const unsigned sizes[] = {1024, 1025, 1040, 1100, 1536, 2000, 2048, 4096, 3000, 1024, 512, 8192};
    CUcontext context = begin();
    size_t got = 0;
    TRY("limit.get", cuCtxGetLimit, &got, CU_LIMIT_STACK_SIZE);
    say("limit", (long long)got);
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        say_number("set", i, "", (long long)CALL(cuCtxSetLimit, CU_LIMIT_STACK_SIZE, sizes[i]));
        CALL(cuCtxGetLimit, &got, CU_LIMIT_STACK_SIZE);
        say_number("set", i, "limit", (long long)got);
        say_number("set", i, "mib", taken_mib());
    }
    launch(noop, NULL);
    say("launched.mib", taken_mib());
    TRY("huge", cuCtxSetLimit, CU_LIMIT_STACK_SIZE, (size_t)1 << 20);
    CALL(cuCtxGetLimit, &got, CU_LIMIT_STACK_SIZE);
    say("huge.limit", (long long)got);
    say("huge.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
}

static void run_local(const char *what, unsigned bytes)
{
    CUmodule module;
    CUdeviceptr at = 0;
    unsigned n = 12;
    int local = -1;
    CALL(cuMemAlloc_v2, &at, 4096);
    void *arguments[] = {&at, &n};
    CUfunction function = load_sized(local_code, bytes, "lmem", &module);
    say_number(what, bytes, "loaded.mib", taken_mib());
    if (function) CALL(cuFuncGetAttribute, &local, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function);
    say_number(what, bytes, "local", local);
    say_number(what, bytes, "asked.mib", taken_mib());
    say_number(what, bytes, "launch", (long long)launch(function, arguments));
    say_number(what, bytes, "mib", taken_mib());
    if (module) CALL(cuModuleUnload, module);
    say_number(what, bytes, "unloaded.mib", taken_mib());
    CALL(cuMemFree_v2, at);
}

static void check_local(void)
{
    static const unsigned sizes[] = {256, 1008, 1024, 1040, 1500, 2048, 4096, 8192, 2064};
    CUcontext context = begin();
    CUmodule module;
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) run_local("local", sizes[i]);
    launch(noop, NULL);
    CALL(cuCtxSynchronize);
    say("local.after.mib", taken_mib());
    CALL(cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 1024);
    say("local.set.1024.mib", taken_mib());
    CALL(cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 10240);
    say("local.set.10240.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
    context = begin(); /* a limit first, then kernels on both sides of it */
    CALL(cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 4096);
    say("stack.4096.mib", taken_mib());
    run_local("stack.local", 2048);
    run_local("stack.local", 6144);
    load_sized(local_code, 16384, "lmem", &module);
    say("unlaunched.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
    context = begin();
    run_local("straight", 8192);
    CALL(cuCtxDestroy_v2, context);
}

static void check_heap(void)
{
    CUcontext context = begin();
    CUmodule module;
    CUdeviceptr at = 0;
    size_t got = 0;
    CALL(cuMemAlloc_v2, &at, 4096);
    void *arguments[] = {&at};
    TRY("heap.get", cuCtxGetLimit, &got, CU_LIMIT_MALLOC_HEAP_SIZE);
    say("heap.limit", (long long)got);
    mark();
    CUfunction function = load(malloc_code, "mal", &module);
    say("heap.loaded.mib", taken_mib());
    say("heap.launch", (long long)launch(function, arguments));
    say("heap.launched.mib", taken_mib());
    TRY("heap.late", cuCtxSetLimit, CU_LIMIT_MALLOC_HEAP_SIZE, 64 * MIB);
    CALL(cuModuleUnload, module);
    say("heap.unloaded.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
    context = begin();
    TRY("heap.set", cuCtxSetLimit, CU_LIMIT_MALLOC_HEAP_SIZE, 256 * MIB);
    CALL(cuCtxGetLimit, &got, CU_LIMIT_MALLOC_HEAP_SIZE);
    say("heap.set.limit", (long long)got);
    say("heap.set.mib", taken_mib());
    launch(noop, NULL);
    say("heap.set.noop.mib", taken_mib());
    CALL(cuMemAlloc_v2, &at, 4096);
    function = load(malloc_code, "mal", &module);
    say("heap.set.loaded.mib", taken_mib());
    launch(noop, NULL);
    say("heap.set.noop2.mib", taken_mib());
    TRY("heap.set.more", cuCtxSetLimit, CU_LIMIT_MALLOC_HEAP_SIZE, 512 * MIB);
    TRY("heap.set.less", cuCtxSetLimit, CU_LIMIT_MALLOC_HEAP_SIZE, 100 * MIB + 5);
    CALL(cuCtxGetLimit, &got, CU_LIMIT_MALLOC_HEAP_SIZE);
    say("heap.set.less.limit", (long long)got);
    say("heap.set.launch", (long long)launch(function, arguments));
    say("heap.set.launched.mib", taken_mib());
    CALL(cuModuleUnload, module);
    say("heap.set.unloaded.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
}

static void check_printf(void)
{
    CUcontext context = begin();
    CUmodule module;
    CUfunction function = load(printf_code, "pr", &module);
    say("printf.loaded.mib", taken_mib());
    say("printf.launch", (long long)launch(function, NULL));
    say("printf.launched.mib", taken_mib());
    TRY("printf.late", cuCtxSetLimit, CU_LIMIT_PRINTF_FIFO_SIZE, 64 * MIB);
    CALL(cuCtxDestroy_v2, context);
    context = begin();
    TRY("printf.set", cuCtxSetLimit, CU_LIMIT_PRINTF_FIFO_SIZE, 512 * MIB);
    say("printf.set.mib", taken_mib());
    function = load(printf_code, "pr", &module);
    say("printf.set.loaded.mib", taken_mib());
    launch(function, NULL);
    say("printf.set.launched.mib", taken_mib());
    CALL(cuModuleUnload, module);
    say("printf.set.unloaded.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
}

static void check_data(void)
{
    static const unsigned sizes[] = {64 << 10, 1 << 20, (1 << 20) + 16, 3 << 20, 100 << 20};
    CUcontext context = begin();
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        CUmodule module = NULL;
        CUfunction function = NULL;
        CUdeviceptr at = 0;
        size_t bytes = 0;
        char code[1024];
        unsigned size = sizes[i];
        snprintf(code, sizeof code, data_code, size);
        say_number("data", size, "load", (long long)CALL(cuModuleLoadData, &module, code));
        say_number("data", size, "loaded.mib", taken_mib());
        CALL(cuModuleGetFunction, &function, module, "glob");
        say_number("data", size, "function.mib", taken_mib());
        say_number("data", size, "global", (long long)CALL(cuModuleGetGlobal_v2, &at, &bytes, module, "big"));
        say_number("data", size, "bytes", (long long)bytes);
        say_number("data", size, "launch", (long long)launch(function, NULL));
        say_number("data", size, "launched.mib", taken_mib());
        CALL(cuModuleUnload, module);
        say_number("data", size, "unloaded.mib", taken_mib());
    }
    CUlibrary library = NULL;
    CUkernel kernel = NULL;
    CUfunction function = NULL;
    char code[1024];
    snprintf(code, sizeof code, data_code, 64u << 20);
    TRY("library.load", cuLibraryLoadData, &library, code, NULL, NULL, 0, NULL, NULL, 0);
    say("library.loaded.mib", taken_mib());
    TRY("library.kernel", cuLibraryGetKernel, &kernel, library, "glob");
    say("library.kernel.mib", taken_mib());
    TRY("library.function", cuKernelGetFunction, &function, kernel);
    say("library.function.mib", taken_mib());
    say("library.launch", (long long)launch((CUfunction)kernel, NULL));
    say("library.launched.mib", taken_mib());
    TRY("library.unload", cuLibraryUnload, library);
    say("library.unloaded.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
}

static void check_many_streams(void)
{
    static const unsigned steps[] = {1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512};
    static CUstream streams[512];
    static CUevent events[20000];
    unsigned n = 0;
    CUcontext context = begin();
    for (unsigned i = 0; i < sizeof steps / sizeof *steps; i++) {
        for (; n < steps[i]; n++) {
            CALL(cuStreamCreate, &streams[n], CU_STREAM_NON_BLOCKING);
            CALL(cuLaunchKernel, noop, 1, 1, 1, 32, 1, 1, 0, streams[n], NULL, NULL);
        }
        CALL(cuCtxSynchronize);
        say_number("streams", n, "mib", taken_mib());
    }
    for (n = 0; n < 512; n++) CALL(cuStreamDestroy_v2, streams[n]);
    say("streams.destroyed.mib", taken_mib());
    for (n = 0; n < 512; n++) {
        CALL(cuStreamCreate, &streams[n], CU_STREAM_NON_BLOCKING);
        CALL(cuLaunchKernel, noop, 1, 1, 1, 32, 1, 1, 0, streams[n], NULL, NULL);
    }
    CALL(cuCtxSynchronize);
    say("streams.again.mib", taken_mib());
    for (n = 0; n < 20000; n++) {
        CALL(cuEventCreate, &events[n], 0);
        CALL(cuEventRecord, events[n], streams[n % 512]);
        if (n == 999 || n == 4999 || n == 9999) say_number("events", n + 1, "mib", taken_mib());
    }
    CALL(cuCtxSynchronize);
    say("events.20000.mib", taken_mib());
    for (n = 0; n < 20000; n++) CALL(cuEventDestroy_v2, events[n]);
    say("events.destroyed.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
    context = begin();
    for (n = 0; n < 64; n++) CALL(cuStreamCreate, &streams[n], CU_STREAM_NON_BLOCKING);
    say("unused.64.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
}

static void check_nodes(void)
{
    static const unsigned sizes[] = {100, 1000, 5000, 10000, 30000};
    CUcontext context = begin();
    CUDA_KERNEL_NODE_PARAMS params;
    memset(&params, 0, sizeof params);
    params.func = noop;
    params.gridDimX = params.gridDimY = params.gridDimZ = params.blockDimX = params.blockDimY = params.blockDimZ = 1;
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        CUgraph graph = NULL;
        CUgraphExec exec = NULL;
        CUgraphNode last = NULL, node;
        CALL(cuGraphCreate, &graph, 0);
        for (unsigned n = 0; n < sizes[i]; n++) {
            CALL(cuGraphAddKernelNode_v2, &node, graph, last ? &last : NULL, last ? 1 : 0, &params);
            last = node;
        }
        say_number("nodes", sizes[i], "made.mib", taken_mib());
        CALL(cuGraphInstantiateWithFlags, &exec, graph, 0);
        say_number("nodes", sizes[i], "instantiated.mib", taken_mib());
        CALL(cuGraphUpload, exec, NULL);
        CALL(cuCtxSynchronize);
        say_number("nodes", sizes[i], "uploaded.mib", taken_mib());
        CALL(cuGraphLaunch, exec, NULL);
        CALL(cuCtxSynchronize);
        say_number("nodes", sizes[i], "launched.mib", taken_mib());
        CALL(cuGraphExecDestroy, exec);
        CALL(cuGraphDestroy, graph);
        CALL(cuCtxSynchronize);
        say_number("nodes", sizes[i], "destroyed.mib", taken_mib());
    }
    CALL(cuCtxDestroy_v2, context);
}

static void check_registered(void)
{
    CUcontext context = begin();
    void *at[33];
    int file = memfd_create("conformance", 0);
    if (ftruncate(file, 64 * (long long)MIB)) return;
    for (int i = 0; i < 33; i++) {
        at[i] = mmap(NULL, 64 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
        CALL(cuMemHostRegister_v2, at[i], 64 * MIB, CU_MEMHOSTREGISTER_DEVICEMAP);
        if (i == 0 || i == 7 || i == 15 || i == 31) say_number("registered", (unsigned)i + 1, "mib", taken_mib());
    }
    for (int i = 0; i < 33; i++) {
        CALL(cuMemHostUnregister, at[i]);
        munmap(at[i], 64 * MIB);
    }
    say("unregistered.mib", taken_mib());
    close(file);
    CALL(cuCtxDestroy_v2, context);
}

void check_grows(void)
{
    section("grows.stack");
    check_stack();
    section("grows");
    check_local();
    check_heap();
    check_printf();
    check_data();
}

void check_queues(void)
{
    section("queues");
    check_many_streams();
    check_nodes();
    check_registered();
}

/* Managed memory is on the device from when it is touched there. */
void check_resident(void)
{
    section("resident");
    CUcontext context = begin();
    CUmemLocation host = {.type = CU_MEM_LOCATION_TYPE_HOST}, there = {.type = CU_MEM_LOCATION_TYPE_DEVICE};
    CUdeviceptr at = 0, plain = 0, other = 0;
    static char bytes[4096];
    CALL(cuMemAllocManaged, &at, 256 * MIB, CU_MEM_ATTACH_GLOBAL);
    say("made.mib", taken_mib());
    CALL(cuMemsetD8_v2, at, 1, 1);
    CALL(cuCtxSynchronize);
    say("byte.mib", taken_mib());
    CALL(cuMemsetD8_v2, at, 1, 2 * MIB);
    CALL(cuCtxSynchronize);
    say("block.mib", taken_mib());
    CALL(cuMemsetD8_v2, at + 10 * MIB, 1, 1);
    CALL(cuCtxSynchronize);
    say("apart.mib", taken_mib());
    CALL(cuMemsetD8_v2, at, 1, 64 * MIB);
    CALL(cuCtxSynchronize);
    say("quarter.mib", taken_mib());
    CALL(cuMemcpyHtoD_v2, at + 100 * MIB, bytes, sizeof bytes);
    CALL(cuCtxSynchronize);
    say("copied.mib", taken_mib());
    memset((void *)(uintptr_t)(at + 128 * MIB), 1, 8 * MIB);
    say("host.mib", taken_mib());
    TRY("prefetch", cuMemPrefetchAsync_v2, at + 128 * MIB, 128 * MIB, there, 0, NULL);
    CALL(cuCtxSynchronize);
    say("prefetch.mib", taken_mib());
    TRY("back", cuMemPrefetchAsync_v2, at, 256 * MIB, host, 0, NULL);
    CALL(cuCtxSynchronize);
    say("back.mib", taken_mib());
    memset((void *)(uintptr_t)at, 1, 256 * MIB);
    say("back.touched.mib", taken_mib());
    CALL(cuMemAllocManaged, &other, 64 * MIB, CU_MEM_ATTACH_GLOBAL);
    CALL(cuMemsetD8_v2, other, 1, 64 * MIB);
    CALL(cuCtxSynchronize);
    say("other.mib", taken_mib());
    TRY("free", cuMemFree_v2, at);
    say("freed.mib", taken_mib());
    TRY("free.async", cuMemFreeAsync, other, NULL);
    CALL(cuCtxSynchronize);
    say("freed.async.mib", taken_mib());
    CALL(cuMemAlloc_v2, &plain, 64 * MIB);
    say("plain.mib", taken_mib());
    TRY("plain.free.async", cuMemFreeAsync, plain, NULL);
    CALL(cuCtxSynchronize);
    say("plain.freed.mib", taken_mib());
    CALL(cuMemAllocManaged, &at, 64 * MIB, CU_MEM_ATTACH_GLOBAL);
    CALL(cuMemsetD8_v2, at, 1, 64 * MIB);
    CALL(cuCtxSynchronize);
    say("left.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
    use_primary();
    mark();
    CALL(cuMemAllocManaged, &at, 8 * MIB, CU_MEM_ATTACH_GLOBAL);
    CALL(cuMemPrefetchAsync_v2, at, 8 * MIB, there, 0, NULL);
    CALL(cuCtxSynchronize);
    say("small.mib", taken_mib());
    CALL(cuMemFree_v2, at);
    say("small.freed.mib", taken_mib());
}

/* Names by which a pool goes to another process, and mistakes with them. */
void check_pool_handles(void)
{
    section("pool_handles");
    CUmemoryPool pool = NULL, plain = NULL, again = NULL;
    CUmemPoolProps props;
    CUmemPoolPtrExportData data;
    CUdeviceptr at = 0, of = 0, got = 0;
    int file = -1, other = -1;
    use_primary();
    memset(&props, 0, sizeof props);
    memset(&data, 0, sizeof data);
    props.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    props.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    CALL(cuMemPoolCreate, &plain, &props);
    props.handleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    TRY("create", cuMemPoolCreate, &pool, &props);
    CALL(cuMemAllocFromPoolAsync, &at, MIB, pool, NULL);
    CALL(cuMemAllocFromPoolAsync, &of, MIB, plain, NULL);
    CALL(cuStreamSynchronize, NULL);
    int type = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    TRY("export.plain", cuMemPoolExportToShareableHandle, &file, plain, type, 0);
    TRY("export.null", cuMemPoolExportToShareableHandle, NULL, pool, type, 0);
    TRY("export.flags", cuMemPoolExportToShareableHandle, &file, pool, type, 1);
    TRY("export.type", cuMemPoolExportToShareableHandle, &file, pool, CU_MEM_HANDLE_TYPE_WIN32, 0);
    TRY("export", cuMemPoolExportToShareableHandle, &file, pool, type, 0);
    TRY("export.again", cuMemPoolExportToShareableHandle, &other, pool, type, 0);
    say("export.same", file == other);
    TRY("pointer.null", cuMemPoolExportPointer, NULL, at);
    TRY("pointer.unknown", cuMemPoolExportPointer, &data, 0x1000);
    TRY("pointer.other", cuMemPoolExportPointer, &data, of);
    TRY("pointer", cuMemPoolExportPointer, &data, at);
    TRY("import.null", cuMemPoolImportFromShareableHandle, NULL, (void *)(intptr_t)file, type, 0);
    TRY("import.flags", cuMemPoolImportFromShareableHandle, &again, (void *)(intptr_t)file, type, 1);
    TRY("import.closed", cuMemPoolImportFromShareableHandle, &again, (void *)(intptr_t)-1, type, 0);
    TRY("import.own", cuMemPoolImportFromShareableHandle, &again, (void *)(intptr_t)file, type, 0);
    if (again) TRY("import.own.pointer", cuMemPoolImportPointer, &got, again, &data);
    say("import.own.same", got == at);
    TRY("import.pointer.pool", cuMemPoolImportPointer, &got, plain, &data);
    CALL(cuMemFreeAsync, at, NULL);
    CALL(cuMemFreeAsync, of, NULL);
    CALL(cuCtxSynchronize);
    if (again) TRY("import.own.destroy", cuMemPoolDestroy, again);
    TRY("destroy", cuMemPoolDestroy, pool);
    CALL(cuMemPoolDestroy, plain);
    close(file);
    close(other);
}
