/* Device memory that the driver takes without a call that requests it: for stacks and local memory, the device's heap,
 * printf and data of modules. Each size is the memory taken since the beginning of the section or the context. */
#define _GNU_SOURCE
#include "conformance_code.h"

#include <stdio.h>

/* Code with this many bytes of local memory, which a compiler cannot remove. */
static const char local_code[] = CODE_HEAD
    ".visible .entry lmem(.param .u64 p, .param .u32 n)\n{\n .local .align 16 .b8 buf[%u];\n .reg .b64 %%rd<8>;\n"
    " .reg .b32 %%r<4>;\n ld.param.u32 %%r1, [n];\n mov.u64 %%rd1, buf;\n cvt.u64.u32 %%rd2, %%r1;\n"
    " add.u64 %%rd4, %%rd1, %%rd2;\n st.local.u32 [%%rd4], %%r1;\n ld.local.u32 %%r2, [%%rd1+16];\n"
    " ld.param.u64 %%rd5, [p];\n cvta.to.global.u64 %%rd6, %%rd5;\n st.global.u32 [%%rd6], %%r2;\n ret;\n}\n";

static const char printf_code[] =
    CODE_HEAD ".extern .func (.param .b32 r) vprintf (.param .b64 f, .param .b64 a);\n"
              ".global .align 4 .b8 fmt[4] = {0, 0, 0, 0};\n"
              ".visible .entry pr()\n{\n .reg .b64 %rd<4>;\n .reg .b32 %r<2>;\n mov.u64 %rd1, fmt;\n"
              " cvta.global.u64 %rd2, %rd1;\n mov.u64 %rd3, 0;\n {\n .param .b64 a0;\n st.param.b64 [a0+0], %rd2;\n"
              " .param .b64 a1;\n st.param.b64 [a1+0], %rd3;\n .param .b32 rv;\n call.uni (rv), vprintf, (a0, a1);\n"
              " ld.param.b32 %r1, [rv+0];\n }\n ret;\n}\n";

static const char malloc_code[] = CODE_HEAD
    ".extern .func (.param .b64 r) malloc (.param .b64 s);\n"
    ".visible .entry mal(.param .u64 p)\n{\n .reg .b64 %rd<6>;\n mov.u64 %rd1, 64;\n {\n .param .b64 a0;\n"
    " st.param.b64 [a0+0], %rd1;\n .param .b64 rv;\n call.uni (rv), malloc, (a0);\n ld.param.b64 %rd2, [rv+0];\n }\n"
    " ld.param.u64 %rd3, [p];\n cvta.to.global.u64 %rd4, %rd3;\n st.global.u64 [%rd4], %rd2;\n ret;\n}\n";

static const char data_code[] = CODE_HEAD
    ".visible .global .align 16 .b8 big[%u];\n"
    ".visible .entry glob()\n{\n .reg .b64 %%rd<2>;\n .reg .b32 %%r<2>;\n mov.u64 %%rd1, big;\n mov.u32 %%r1, 7;\n"
    " st.global.u32 [%%rd1], %%r1;\n ret;\n}\n";

static void check_stack(void)
{
    static const unsigned sizes[] = {1024, 1025, 1040, 1100, 1536, 2000, 2048, 4096, 3000, 1024, 512, 8192};
    CUcontext context = own_context();
    size_t got = 0;
    TRY("limit.get", cuCtxGetLimit, &got, CU_LIMIT_STACK_SIZE);
    say("limit", (long long)got);
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        say_number("set", i, "", (long long)CALL(cuCtxSetLimit, CU_LIMIT_STACK_SIZE, sizes[i]));
        CALL(cuCtxGetLimit, &got, CU_LIMIT_STACK_SIZE);
        say_number("set", i, "limit", (long long)got);
        say_number("set", i, "mib", taken_mib());
    }
    launch_once(noop_kernel, NULL);
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
    CUfunction function = load_sized_code(local_code, bytes, "lmem", &module);
    say_number(what, bytes, "loaded.mib", taken_mib());
    if (function) CALL(cuFuncGetAttribute, &local, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES, function);
    say_number(what, bytes, "local", local);
    say_number(what, bytes, "asked.mib", taken_mib());
    say_number(what, bytes, "launch", (long long)launch_once(function, arguments));
    say_number(what, bytes, "mib", taken_mib());
    if (module) CALL(cuModuleUnload, module);
    say_number(what, bytes, "unloaded.mib", taken_mib());
    CALL(cuMemFree_v2, at);
}

static void check_local(void)
{
    static const unsigned sizes[] = {256, 1008, 1024, 1040, 1500, 2048, 4096, 8192, 2064};
    CUcontext context = own_context();
    CUmodule module;
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) run_local("local", sizes[i]);
    launch_once(noop_kernel, NULL);
    CALL(cuCtxSynchronize);
    say("local.after.mib", taken_mib());
    CALL(cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 1024);
    say("local.set.1024.mib", taken_mib());
    CALL(cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 10240);
    say("local.set.10240.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
    context = own_context(); /* first a limit, then kernels below and above it */
    CALL(cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 4096);
    say("stack.4096.mib", taken_mib());
    run_local("stack.local", 2048);
    run_local("stack.local", 6144);
    load_sized_code(local_code, 16384, "lmem", &module);
    say("unlaunched.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
    context = own_context();
    run_local("straight", 8192);
    CALL(cuCtxDestroy_v2, context);
}

static void check_heap(void)
{
    CUcontext context = own_context();
    CUmodule module;
    CUdeviceptr at = 0;
    size_t got = 0;
    CALL(cuMemAlloc_v2, &at, 4096);
    void *arguments[] = {&at};
    TRY("heap.get", cuCtxGetLimit, &got, CU_LIMIT_MALLOC_HEAP_SIZE);
    say("heap.limit", (long long)got);
    mark();
    CUfunction function = load_code(malloc_code, "mal", &module);
    say("heap.loaded.mib", taken_mib());
    say("heap.launch", (long long)launch_once(function, arguments));
    say("heap.launched.mib", taken_mib());
    TRY("heap.late", cuCtxSetLimit, CU_LIMIT_MALLOC_HEAP_SIZE, 64 * MIB);
    CALL(cuModuleUnload, module);
    say("heap.unloaded.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
    context = own_context();
    TRY("heap.set", cuCtxSetLimit, CU_LIMIT_MALLOC_HEAP_SIZE, 256 * MIB);
    CALL(cuCtxGetLimit, &got, CU_LIMIT_MALLOC_HEAP_SIZE);
    say("heap.set.limit", (long long)got);
    say("heap.set.mib", taken_mib());
    launch_once(noop_kernel, NULL);
    say("heap.set.noop.mib", taken_mib());
    CALL(cuMemAlloc_v2, &at, 4096);
    function = load_code(malloc_code, "mal", &module);
    say("heap.set.loaded.mib", taken_mib());
    launch_once(noop_kernel, NULL);
    say("heap.set.noop2.mib", taken_mib());
    TRY("heap.set.more", cuCtxSetLimit, CU_LIMIT_MALLOC_HEAP_SIZE, 512 * MIB);
    TRY("heap.set.less", cuCtxSetLimit, CU_LIMIT_MALLOC_HEAP_SIZE, 100 * MIB + 5);
    CALL(cuCtxGetLimit, &got, CU_LIMIT_MALLOC_HEAP_SIZE);
    say("heap.set.less.limit", (long long)got);
    say("heap.set.launch", (long long)launch_once(function, arguments));
    say("heap.set.launched.mib", taken_mib());
    CALL(cuModuleUnload, module);
    say("heap.set.unloaded.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
}

static void check_printf(void)
{
    CUcontext context = own_context();
    CUmodule module;
    CUfunction function = load_code(printf_code, "pr", &module);
    say("printf.loaded.mib", taken_mib());
    say("printf.launch", (long long)launch_once(function, NULL));
    say("printf.launched.mib", taken_mib());
    TRY("printf.late", cuCtxSetLimit, CU_LIMIT_PRINTF_FIFO_SIZE, 64 * MIB);
    CALL(cuCtxDestroy_v2, context);
    context = own_context();
    TRY("printf.set", cuCtxSetLimit, CU_LIMIT_PRINTF_FIFO_SIZE, 512 * MIB);
    say("printf.set.mib", taken_mib());
    function = load_code(printf_code, "pr", &module);
    say("printf.set.loaded.mib", taken_mib());
    launch_once(function, NULL);
    say("printf.set.launched.mib", taken_mib());
    CALL(cuModuleUnload, module);
    say("printf.set.unloaded.mib", taken_mib());
    CALL(cuCtxDestroy_v2, context);
}

static void check_data(void)
{
    static const unsigned sizes[] = {64 << 10, 1 << 20, (1 << 20) + 16, 3 << 20, 100 << 20};
    CUcontext context = own_context();
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
        say_number("data", size, "launch", (long long)launch_once(function, NULL));
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
    say("library.launch", (long long)launch_once((CUfunction)kernel, NULL));
    say("library.launched.mib", taken_mib());
    TRY("library.unload", cuLibraryUnload, library);
    say("library.unloaded.mib", taken_mib());
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
