/* Functions that the shim hooks to request the memory that launches need: limits of a context, unloads of code, kernels
 * that become nodes. Each is called with valid, unknown and missing arguments. */
#include "conformance.h"

#include <string.h>

static const char code[] = ".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry noop()\n{\n ret;\n}\n";

static void check_limits(void)
{
    CUstream stream;
    CUgraph graph;
    size_t size = 0;
    TRY("limit.unknown", cuCtxSetLimit, (CUlimit)99, 1);
    TRY("limit.stack", cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 2000);
    CALL(cuCtxGetLimit, &size, CU_LIMIT_STACK_SIZE);
    say("limit.stack.is", (long long)size);
    CALL(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    CALL(cuStreamBeginCapture_v2, stream, CU_STREAM_CAPTURE_MODE_RELAXED);
    TRY("limit.capturing", cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 1024);
    TRY("limit.capturing.end", cuStreamEndCapture, stream, &graph);
    CALL(cuStreamDestroy_v2, stream);
    TRY("limit.stack.again", cuCtxSetLimit, CU_LIMIT_STACK_SIZE, 1024);
}

static void check_nodes(CUfunction function, CUkernel kernel)
{
    CUgraph graph;
    CUgraphNode node;
    CUDA_KERNEL_NODE_PARAMS_v1 old;
    CUgraphNodeParams any;
    memset(&old, 0, sizeof old);
    memset(&any, 0, sizeof any);
    old.func = any.kernel.func = function;
    old.gridDimX = old.gridDimY = old.gridDimZ = old.blockDimX = old.blockDimY = old.blockDimZ = 1;
    any.kernel.gridDimX = any.kernel.gridDimY = any.kernel.gridDimZ = 1;
    any.kernel.blockDimX = any.kernel.blockDimY = any.kernel.blockDimZ = 1;
    any.type = CU_GRAPH_NODE_TYPE_KERNEL;
    CALL(cuGraphCreate, &graph, 0);
    TRY("node.old", cuGraphAddKernelNode, &node, graph, NULL, 0, &old);
    TRY("node.old.null", cuGraphAddKernelNode, &node, graph, NULL, 0, NULL);
    TRY("node.any", cuGraphAddNode, &node, graph, NULL, 0, &any);
    TRY("node.any.v2", cuGraphAddNode_v2, &node, graph, NULL, NULL, 0, &any);
    any.kernel.func = NULL;
    any.kernel.kern = kernel;
    TRY("node.any.kernel", cuGraphAddNode_v2, &node, graph, NULL, NULL, 0, &any);
    any.kernel.gridDimX = 0;
    TRY("node.any.grid0", cuGraphAddNode_v2, &node, graph, NULL, NULL, 0, &any);
    CALL(cuGraphDestroy, graph);
}

static void check_loads(void)
{
    CUmodule module = NULL;
    CUlibrary library;
    TRY("load.file.none", cuModuleLoad, &module, "/nowhere");
    TRY("load.ex", cuModuleLoadDataEx, &module, code, 0, NULL, NULL);
    CALL(cuModuleUnload, module);
    TRY("load.fat.text", cuModuleLoadFatBinary, &module, code);
    TRY("library.file.none", cuLibraryLoadFromFile, &library, "/nowhere", NULL, NULL, 0, NULL, NULL, 0);
}

static void check_library(CUlibrary library, CUkernel kernel)
{
    CUmodule module;
    CUfunction function;
    CUdeviceptr at;
    size_t size;
    TRY("library.module", cuLibraryGetModule, &module, library);
    TRY("library.module.null", cuLibraryGetModule, &module, NULL);
    TRY("library.global.none", cuLibraryGetGlobal, &at, &size, library, "none");
    TRY("library.function", cuKernelGetFunction, &function, kernel);
    TRY("library.function.null", cuKernelGetFunction, &function, NULL);
}

void check_hooks(void)
{
    CUmodule module;
    CUlibrary library;
    CUfunction function;
    CUkernel kernel;
    section("hooks2");
    use_primary();
    check_limits();
    CALL(cuModuleLoadData, &module, code);
    CALL(cuModuleGetFunction, &function, module, "noop");
    CALL(cuLibraryLoadData, &library, code, NULL, NULL, 0, NULL, NULL, 0);
    CALL(cuLibraryGetKernel, &kernel, library, "noop");
    check_nodes(function, kernel);
    TRY("module.unload", cuModuleUnload, module);
    TRY("module.unload.null", cuModuleUnload, NULL);
    TRY("library.unload", cuLibraryUnload, library);
    TRY("library.unload.null", cuLibraryUnload, NULL);
}

/* Loads code in every way, and makes the calls that load a library's data into a context. */
void check_code(void)
{
    CUlibrary library;
    CUkernel kernel;
    section("hooks3");
    use_primary();
    check_loads();
    CALL(cuLibraryLoadData, &library, code, NULL, NULL, 0, NULL, NULL, 0);
    CALL(cuLibraryGetKernel, &kernel, library, "noop");
    check_library(library, kernel);
    CALL(cuLibraryUnload, library);
}
