/* charged_alone: memory that the driver allocates in calls that are not allocations, and destroyed contexts. See
 * charged.h. */
#include "charged.h"

#include <sys/mman.h>

#define HEAD ".version 7.0\n.target sm_70\n.address_size 64\n"
static const char noop[] = HEAD ".visible .entry noop()\n{\n ret;\n}\n";
static const char local[] = HEAD ".visible .entry local(.param .u64 p, .param .u32 n)\n{\n"
                                 " .local .align 16 .b8 buf[8192];\n .reg .b64 %rd<8>;\n .reg .b32 %r<4>;\n"
                                 " ld.param.u32 %r1, [n];\n mov.u64 %rd1, buf;\n cvt.u64.u32 %rd2, %r1;\n"
                                 " and.b64 %rd3, %rd2, 8188;\n add.u64 %rd4, %rd1, %rd3;\n"
                                 " st.local.u32 [%rd4], %r1;\n ld.local.u32 %r2, [%rd1+16];\n"
                                 " ld.param.u64 %rd5, [p];\n cvta.to.global.u64 %rd6, %rd5;\n"
                                 " st.global.u32 [%rd6], %r2;\n ret;\n}\n";
static const char prints[] =
    HEAD ".extern .func (.param .b32 r) vprintf (.param .b64 f, .param .b64 a);\n"
         ".global .align 4 .b8 fmt[4] = {0, 0, 0, 0};\n"
         ".visible .entry prints()\n{\n .reg .b64 %rd<4>;\n .reg .b32 %r<2>;\n mov.u64 %rd1, fmt;\n"
         " cvta.global.u64 %rd2, %rd1;\n mov.u64 %rd3, 0;\n {\n .param .b64 a0;\n st.param.b64 [a0+0], %rd2;\n"
         " .param .b64 a1;\n st.param.b64 [a1+0], %rd3;\n .param .b32 rv;\n call.uni (rv), vprintf, (a0, a1);\n"
         " ld.param.b32 %r1, [rv+0];\n }\n ret;\n}\n";
static const char allocates[] = HEAD
    ".extern .func (.param .b64 r) malloc (.param .b64 s);\n"
    ".visible .entry allocates(.param .u64 p)\n{\n .reg .b64 %rd<6>;\n mov.u64 %rd1, 64;\n {\n .param .b64 a0;\n"
    " st.param.b64 [a0+0], %rd1;\n .param .b64 rv;\n call.uni (rv), malloc, (a0);\n ld.param.b64 %rd2, [rv+0];\n }\n"
    " ld.param.u64 %rd3, [p];\n cvta.to.global.u64 %rd4, %rd3;\n st.global.u64 [%rd4], %rd2;\n ret;\n}\n";
static const char data[] =
    HEAD ".visible .global .align 16 .b8 big[1073741824];\n"
         ".visible .entry data()\n{\n .reg .b64 %rd<2>;\n .reg .b32 %r<2>;\n mov.u64 %rd1, big;\n mov.u32 %r1, 7;\n"
         " st.global.u32 [%rd1], %r1;\n ret;\n}\n";

static CUfunction load(const char *image, const char *name, CUmodule *module)
{
    CUfunction function = NULL;
    *module = NULL;
    if (!CU(cuModuleLoadData, module, image)) CU(cuModuleGetFunction, &function, *module, name);
    return function;
}

static void launch(CUfunction function, void **arguments)
{
    if (function) CU(cuLaunchKernel, function, 1, 1, 1, 32, 1, 1, 0, NULL, arguments, NULL);
    CU(cuCtxSynchronize);
}

/* 48 KiB for each of an H200's 270,336 threads is 12.4 GiB: more than the limit. */
static void stack(void)
{
    CUmodule module;
    role('A', getpid());
    begin();
    CUfunction function = load(noop, "noop", &module);
    launch(function, NULL);
    mark("a kernel ran");
    CU(cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 8 * 1024);
    launch(function, NULL);
    mark("stack of 8 KiB, launched");
    CU(cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 48 * 1024);
    launch(function, NULL);
    mark("stack of 48 KiB, launched: limit 8 GiB");
    CU(cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 1024);
    mark("stack of 1 KiB");
    finish();
}

static void local_memory(void)
{
    CUmodule module;
    unsigned number = 12;
    role('A', getpid());
    begin();
    CUdeviceptr at = allocate(MIB);
    void *arguments[] = {&at, &number};
    CUfunction function = load(local, "local", &module);
    mark("loaded: 8 KiB of local memory a thread");
    launch(function, arguments);
    mark("launched");
    if (module) CU(cuModuleUnload, module);
    mark("unloaded");
    finish();
}

static void heap(void)
{
    CUmodule module;
    role('A', getpid());
    begin();
    CUdeviceptr at = allocate(MIB);
    void *arguments[] = {&at};
    CU(cuCtxSetLimit, CU_LIMIT_MALLOC_HEAP_SIZE, SIZE);
    CUfunction function = load(allocates, "allocates", &module);
    mark("heap of 2 GiB set, loaded");
    launch(function, arguments);
    mark("launched");
    finish();
}

static void fifo(void)
{
    CUmodule module;
    role('A', getpid());
    begin();
    CU(cuCtxSetLimit, CU_LIMIT_PRINTF_FIFO_SIZE, GIB);
    CUfunction function = load(prints, "prints", &module);
    mark("printf FIFO of 1 GiB set, loaded");
    launch(function, NULL);
    mark("launched");
    finish();
}

static void module_data(void)
{
    CUmodule module;
    role('A', getpid());
    begin();
    CUfunction function = load(data, "data", &module);
    launch(function, NULL);
    mark("a module with 1 GiB of data, launched");
    if (module) CU(cuModuleUnload, module);
    mark("unloaded");
    finish();
}

static void managed(void)
{
    CUdeviceptr at = 0;
    CUmemLocation host = {.type = CU_MEM_LOCATION_TYPE_HOST};
    role('A', getpid());
    begin();
    CU(cuMemAllocManaged, &at, SIZE, CU_MEM_ATTACH_GLOBAL);
    host_bytes = SIZE;
    mark("2 GiB managed, untouched");
    CU(cuMemsetD8, at, 1, SIZE);
    CU(cuCtxSynchronize);
    host_bytes = 0;
    mark("touched on the device");
    host_bytes = SIZE;
    CU(cuMemPrefetchAsync, at, SIZE, host, 0, NULL);
    CU(cuCtxSynchronize);
    mark("prefetched to the host");
    CU(cuMemFree, at);
    host_bytes = 0;
    mark("freed");
    finish();
}

/* Register 8 GiB of addresses, which map the same 64 MiB of host memory: the device needs memory for page tables. */
static void registered(void)
{
    role('A', getpid());
    begin();
    int fd = memfd_create("charged", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, 64 * MIB)) finish();
    for (int i = 0; i < 128; i++) {
        void *at = mmap(NULL, 64 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
        if (at == MAP_FAILED || CU(cuMemHostRegister, at, 64 * MIB, CU_MEMHOSTREGISTER_DEVICEMAP)) break;
    }
    mark("8 GiB of addresses registered");
    finish();
}

static void streams(void)
{
    CUmodule module;
    role('A', getpid());
    begin();
    CUfunction function = load(noop, "noop", &module);
    launch(function, NULL);
    for (int i = 0; i < 512 && function; i++) {
        CUstream stream;
        if (CU(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING)) break;
        CU(cuLaunchKernel, function, 1, 1, 1, 32, 1, 1, 0, stream, NULL, NULL);
    }
    CU(cuCtxSynchronize);
    mark("512 streams");
    finish();
}

static void graph_nodes(void)
{
    CUmodule module;
    CUgraph graph = NULL;
    CUgraphExec executable = NULL;
    CUgraphNode node, last = NULL;
    CUDA_KERNEL_NODE_PARAMS kernel;
    role('A', getpid());
    begin();
    memset(&kernel, 0, sizeof kernel);
    kernel.func = load(noop, "noop", &module);
    kernel.gridDimX = kernel.gridDimY = kernel.gridDimZ = kernel.blockDimX = kernel.blockDimY = kernel.blockDimZ = 1;
    CU(cuGraphCreate, &graph, 0);
    for (int i = 0; i < 30000 && kernel.func; i++, last = node)
        if (CU(cuGraphAddKernelNode, &node, graph, last ? &last : NULL, last ? 1 : 0, &kernel)) break;
    mark("a graph of 30,000 nodes");
    if (!CU(cuGraphInstantiate, &executable, graph, 0)) CU(cuGraphUpload, executable, NULL);
    CU(cuCtxSynchronize);
    mark("instantiated and uploaded");
    if (executable) CU(cuGraphExecDestroy, executable);
    CU(cuCtxSynchronize);
    mark("destroyed");
    finish();
}

static void graph_memory(void)
{
    CUgraph graph = NULL;
    CUgraphExec executable = NULL;
    CUgraphNode node;
    CUDA_MEM_ALLOC_NODE_PARAMS kind;
    role('A', getpid());
    begin();
    memset(&kind, 0, sizeof kind);
    kind.poolProps.allocType = CU_MEM_ALLOCATION_TYPE_PINNED;
    kind.poolProps.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    kind.bytesize = SIZE;
    CU(cuGraphCreate, &graph, 0);
    CU(cuGraphAddMemAllocNode, &node, graph, NULL, 0, &kind);
    if (!CU(cuGraphInstantiate, &executable, graph, 0)) CU(cuGraphLaunch, executable, NULL);
    CU(cuCtxSynchronize);
    mark("a graph allocated 2 GiB");
    if (executable) CU(cuGraphExecDestroy, executable);
    if (graph) CU(cuGraphDestroy, graph);
    mark("graph destroyed");
    if (kind.dptr) CU(cuMemFree, kind.dptr);
    CU(cuCtxSynchronize);
    CU(cuDeviceGraphMemTrim, 0);
    mark("freed by its address, trimmed");
    finish();
}

static void reset(void)
{
    CUcontext context;
    CUdeviceptr at = 0;
    role('A', getpid());
    begin();
    CUmemGenericAllocationHandle kept = create(GIB, 0), mapped = create(GIB, 0);
    map(mapped, GIB);
    if (mapped) CU(cuMemRelease, mapped);
    allocate(GIB);
    CU(cuMemAllocAsync, &at, GIB, NULL);
    CU(cuStreamSynchronize, NULL);
    mark("handle, mapping, allocation, pool: 1 GiB each");
    CU(cuDevicePrimaryCtxReset, 0);
    mark("primary context reset");
    CU(cuDevicePrimaryCtxRetain, &context, 0);
    CU(cuCtxSetCurrent, context);
    mark("retained again");
    if (kept) CU(cuMemRelease, kept);
    CU(cuMemFreeAsync, at, NULL);
    CU(cuStreamSynchronize, NULL);
    mark("handle released, pool freed");
    finish();
}

static void contexts(void)
{
    CUcontext second = NULL;
    CUresult (*make)(CUcontext *, unsigned, CUdevice) =
        (CUresult(*)(CUcontext *, unsigned, CUdevice))driver_symbol("cuCtxCreate_v2");
    CUdeviceptr at = 0;
    role('A', getpid());
    begin();
    if (!make || make(&second, 0, 0)) note("no second context");
    allocate(SIZE);
    CU(cuMemAllocAsync, &at, GIB, NULL);
    CU(cuStreamSynchronize, NULL);
    mark("a second context has 2 GiB and 1 GiB in a pool");
    if (second) CU(cuCtxDestroy, second);
    mark("second context destroyed");
    CU(cuCtxSynchronize);
    mark("synchronised");
    finish();
}

int main(int argc, char **argv)
{
    static const struct scenario table[] = {
        {"stack", stack},
        {"lmem", local_memory},
        {"heap", heap},
        {"fifo", fifo},
        {"globals", module_data},
        {"managed", managed},
        {"hostreg", registered},
        {"streams", streams},
        {"graph_nodes", graph_nodes},
        {"reset", reset},
        {"graph_mem", graph_memory},
        {"contexts", contexts},
        {NULL, NULL},
    };
    return run_one(table, argc, argv);
}
