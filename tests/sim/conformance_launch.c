/* Launches of every kind, also during a capture. */
#include "conformance.h"

#include <stdio.h>
#include <string.h>

static const char image[] = ".version 6.0\n.target sm_50\n.address_size 64\n.visible .entry spin_0us() { ret; }\n";

static CUmodule module;
static CUfunction kernel;
static CUstream stream;

/* The shapes with which each kind of launch is called. */
static const struct shape {
    const char *name;
    unsigned grid[3], block[3], shared;
} shapes[] = {{"one", {1, 1, 1}, {1, 1, 1}, 0},
              {"all", {2, 3, 4}, {8, 8, 8}, 1024},
              {"grid.x0", {0, 1, 1}, {1, 1, 1}, 0},
              {"grid.y0", {1, 0, 1}, {1, 1, 1}, 0},
              {"grid.z0", {1, 1, 0}, {1, 1, 1}, 0},
              {"block.x0", {1, 1, 1}, {0, 1, 1}, 0},
              {"block.z65", {1, 1, 1}, {1, 1, 65}, 0},
              {"block.2048", {1, 1, 1}, {64, 32, 1}, 0},
              {"grid.y65536", {1, 65536, 1}, {1, 1, 1}, 0},
              {"shared.48k1", {1, 1, 1}, {1, 1, 1}, 49153},
              {"shared.huge", {1, 1, 1}, {1, 1, 1}, 1u << 20}};

#define FLAT(s) (s).grid[0], (s).grid[1], (s).grid[2], (s).block[0], (s).block[1], (s).block[2], (s).shared
#define ASKED(s, stream)                                                                                               \
    {                                                                                                                  \
        .gridDimX = (s).grid[0], .gridDimY = (s).grid[1], .gridDimZ = (s).grid[2], .blockDimX = (s).block[0],          \
        .blockDimY = (s).block[1], .blockDimZ = (s).block[2], .sharedMemBytes = (s).shared, .hStream = stream          \
    }

static void report(const char *how, const char *what, CUresult result)
{
    char name[64];
    snprintf(name, sizeof name, "%s.%s", how, what);
    say(name, result);
}

static void check_shapes(void)
{
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const struct shape s = shapes[i];
        CUlaunchConfig config = ASKED(s, stream), own = ASKED(s, NULL);
        report("plain.ptsz", s.name, CALL(cuLaunchKernel_ptsz, kernel, FLAT(s), NULL, NULL, NULL));
        report("ex", s.name, CALL(cuLaunchKernelEx, &config, kernel, NULL, NULL));
        report("ex.ptsz", s.name, CALL(cuLaunchKernelEx_ptsz, &own, kernel, NULL, NULL));
        report("cooperative", s.name, CALL(cuLaunchCooperativeKernel, kernel, FLAT(s), stream, NULL));
        report("cooperative.ptsz", s.name, CALL(cuLaunchCooperativeKernel_ptsz, kernel, FLAT(s), NULL, NULL));
    }
    TRY("wait", cuCtxSynchronize);
}

static CUresult with(CUlaunchAttribute attribute, unsigned grid)
{
    const struct shape s = {"", {grid, 1, 1}, {32, 1, 1}, 0};
    CUlaunchConfig config = ASKED(s, stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    return CALL(cuLaunchKernelEx, &config, kernel, NULL, NULL);
}

static void check_attributes(void)
{
    CUlaunchAttribute cooperative = {.id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE, .value.cooperative = 1};
    CUlaunchAttribute cluster = {.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION};
    cluster.value.clusterDim.x = 2;
    cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1;
    say("attribute.ignored", with((CUlaunchAttribute){.id = CU_LAUNCH_ATTRIBUTE_IGNORE}, 1));
    say("attribute.cooperative", with(cooperative, 1));
    say("attribute.cooperative.large", with(cooperative, 1u << 20));
    say("attribute.cluster", with(cluster, 4));
    say("attribute.cluster.odd", with(cluster, 3));
    cluster.value.clusterDim.x = 64;
    say("attribute.cluster.large", with(cluster, 64));
    TRY("attribute.wait", cuCtxSynchronize);
}

static void check_cooperation(void)
{
    TRY("cooperative.large", cuLaunchCooperativeKernel, kernel, 1u << 20, 1, 1, 1024, 1, 1, 0, stream, NULL);
    TRY("cooperative.large.ptsz", cuLaunchCooperativeKernel_ptsz, kernel, 1u << 20, 1, 1, 1024, 1, 1, 0, NULL, NULL);
    CUDA_LAUNCH_PARAMS many[2];
    memset(many, 0, sizeof many);
    for (int i = 0; i < 2; i++) {
        many[i].function = kernel;
        many[i].gridDimX = many[i].gridDimY = many[i].gridDimZ = 1;
        many[i].blockDimX = many[i].blockDimY = many[i].blockDimZ = 1;
        many[i].hStream = stream;
    }
    TRY("devices", cuLaunchCooperativeKernelMultiDevice, many, 1, 0);
    TRY("devices.flags", cuLaunchCooperativeKernelMultiDevice, many, 1, 4);
    TRY("devices.0", cuLaunchCooperativeKernelMultiDevice, many, 0, 0);
    TRY("devices.same", cuLaunchCooperativeKernelMultiDevice, many, 2, 0);
    many[0].hStream = NULL;
    TRY("devices.legacy", cuLaunchCooperativeKernelMultiDevice, many, 1, 0);
    many[0].hStream = stream;
    many[0].gridDimX = 0;
    TRY("devices.grid0", cuLaunchCooperativeKernelMultiDevice, many, 1, 0);
    many[0].gridDimX = 1u << 20;
    TRY("devices.large", cuLaunchCooperativeKernelMultiDevice, many, 1, 0);
    TRY("devices.wait", cuCtxSynchronize);
}

/* Launches from before CUDA 4.0, which set the shape of a function first. */
static void check_old_launches(void)
{
    CUfunction fresh = NULL;
    CUmodule second = NULL;
    CALL(cuModuleLoadData, &second, image);
    CALL(cuModuleGetFunction, &fresh, second, "spin_0us");
    TRY("old.shapeless", cuLaunch, fresh);
    TRY("old.shape", cuFuncSetBlockShape, fresh, 32, 1, 1);
    TRY("old.shape.0", cuFuncSetBlockShape, fresh, 0, 1, 1);
    TRY("old", cuLaunch, fresh);
    TRY("old.grid", cuLaunchGrid, fresh, 2, 2);
    TRY("old.grid.0", cuLaunchGrid, fresh, 0, 1);
    TRY("old.async", cuLaunchGridAsync, fresh, 2, 2, stream);
    TRY("old.async.0", cuLaunchGridAsync, fresh, 1, 0, stream);
    TRY("old.shape.large", cuFuncSetBlockShape, fresh, 1025, 1, 1);
    TRY("old.large", cuLaunch, fresh);
    TRY("old.wait", cuCtxSynchronize);
    CALL(cuModuleUnload, second);
}

static CUresult act(int which)
{
    const struct shape s = {"", {1, 1, 1}, {1, 1, 1}, 0};
    CUlaunchConfig config = ASKED(s, stream);
    CUDA_LAUNCH_PARAMS one = {.function = kernel, .gridDimX = 1, .gridDimY = 1, .gridDimZ = 1};
    one.blockDimX = one.blockDimY = one.blockDimZ = 1;
    one.hStream = stream;
    switch (which) {
    case 0:
        return CALL(cuLaunchKernelEx, &config, kernel, NULL, NULL);
    case 1:
        return CALL(cuLaunchCooperativeKernel, kernel, FLAT(s), stream, NULL);
    case 2:
        return CALL(cuLaunchCooperativeKernelMultiDevice, &one, 1, 0);
    case 3:
        return CALL(cuLaunchGridAsync, kernel, 1, 1, stream);
    case 4:
        return CALL(cuLaunchGrid, kernel, 1, 1);
    case 5:
        return CALL(cuLaunch, kernel);
    case 6:
        return CALL(cuLaunchKernel_ptsz, kernel, FLAT(s), NULL, NULL, NULL);
    default:
        return CALL(cuLaunchKernelEx_ptsz, &config, kernel, NULL, NULL);
    }
}

static void check_captured(CUstreamCaptureMode mode, unsigned flags, const char *how)
{
    static const char *const names[] = {"ex",   "cooperative", "devices",    "async",
                                        "grid", "old",         "plain.ptsz", "ex.ptsz"};
    CALL(cuFuncSetBlockShape, kernel, 1, 1, 1);
    for (int i = 0; i < 8; i++) {
        CUgraph graph = NULL;
        size_t n = 0;
        CALL(cuStreamCreate, &stream, flags);
        CALL(cuStreamBeginCapture_v2, stream, mode);
        CUresult result = act(i), end = CALL(cuStreamEndCapture, stream, &graph);
        if (graph) CALL(cuGraphGetNodes, graph, NULL, &n);
        printf("%s.%s %d %d %zu\n", how, names[i], (int)result, (int)end, n);
        if (graph) CALL(cuGraphDestroy, graph);
        CALL(cuStreamDestroy_v2, stream);
    }
    fflush(stdout);
}

void check_launches(void)
{
    section("launch");
    use_primary();
    CALL(cuModuleLoadData, &module, image);
    CALL(cuModuleGetFunction, &kernel, module, "spin_0us");
    CALL(cuStreamCreate, &stream, CU_STREAM_NON_BLOCKING);
    check_shapes();
    check_attributes();
    check_cooperation();
    check_old_launches();
    CALL(cuStreamDestroy_v2, stream);
    check_captured(CU_STREAM_CAPTURE_MODE_GLOBAL, CU_STREAM_NON_BLOCKING, "launch.captured.aside");
    check_captured(CU_STREAM_CAPTURE_MODE_GLOBAL, 0, "launch.captured.blocking");
    CALL(cuCtxSynchronize);
    CALL(cuModuleUnload, module);
}

/* Launches during a capture in relaxed mode, and launches with more shared memory than a function may have by default.
 */
void check_relaxed(void)
{
    section("relaxed");
    use_primary();
    CALL(cuModuleLoadData, &module, image);
    CALL(cuModuleGetFunction, &kernel, module, "spin_0us");
    check_captured(CU_STREAM_CAPTURE_MODE_RELAXED, CU_STREAM_NON_BLOCKING, "relaxed.aside");
    check_captured(CU_STREAM_CAPTURE_MODE_RELAXED, 0, "relaxed.blocking");
    const struct shape *more = &shapes[9], *huge = &shapes[10];
    int most = 0, all = 0;
    const CUfunction_attribute shared = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    CALL(cuFuncGetAttribute, &most, shared, kernel);
    say("shared", most);
    TRY("shared.more", cuFuncSetAttribute, kernel, shared, (int)more->shared);
    CALL(cuFuncGetAttribute, &most, shared, kernel);
    say("shared.more.now", most);
    TRY("shared.more.launch", cuLaunchKernel, kernel, FLAT(*more), NULL, NULL, NULL);
    TRY("shared.more.cooperative", cuLaunchCooperativeKernel, kernel, FLAT(*more), NULL, NULL);
    CALL(cuDeviceGetAttribute, &all, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 0);
    TRY("shared.all", cuFuncSetAttribute, kernel, shared, all);
    TRY("shared.past", cuFuncSetAttribute, kernel, shared, all + 1);
    TRY("shared.negative", cuFuncSetAttribute, kernel, shared, -1);
    TRY("shared.huge.launch", cuLaunchKernel, kernel, FLAT(*huge), NULL, NULL, NULL);
    TRY("shared.0", cuFuncSetAttribute, kernel, shared, 0);
    TRY("shared.0.launch", cuLaunchKernel, kernel, FLAT(shapes[1]), NULL, NULL, NULL);
    TRY("shared.wait", cuCtxSynchronize);
    CALL(cuModuleUnload, module);
}
