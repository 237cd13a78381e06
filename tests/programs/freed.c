/*
 * freed SHARE [NAME...]: allocates memory and frees it, in each way that the driver has. For each way, prints one line
 *
 *   NAME PASSED ROUNDS TOTAL BEFORE AFTER
 *
 * In PASSED of the ROUNDS no call failed. TOTAL, BEFORE and AFTER are the driver's figures in MiB: the memory of the
 * device, and the free memory before the first round and at most two seconds after the last round. A round allocates
 * SHARE percent of the memory that is free before the first round. With more than 50, the memory of two rounds does not
 * fit. For a round that fails, the name of the failed call and its result are printed on stderr. `freed ways` prints
 * the names.
 */
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define ROUNDS 12
#define MIB (1ull << 20)
#define PIECE (16 * MIB)

#define DRIVER(X)                                                                                                      \
    X(cuInit)                                                                                                          \
    X(cuDevicePrimaryCtxRetain)                                                                                        \
    X(cuDevicePrimaryCtxRelease_v2)                                                                                    \
    X(cuDevicePrimaryCtxReset_v2)                                                                                      \
    X(cuCtxSetCurrent)                                                                                                 \
    X(cuCtxSynchronize)                                                                                                \
    X(cuCtxCreate_v2)                                                                                                  \
    X(cuCtxDestroy_v2)                                                                                                 \
    X(cuMemGetInfo_v2)                                                                                                 \
    X(cuMemAlloc_v2)                                                                                                   \
    X(cuMemAllocPitch_v2)                                                                                              \
    X(cuMemAllocManaged)                                                                                               \
    X(cuMemFree_v2)                                                                                                    \
    X(cuMemAllocAsync)                                                                                                 \
    X(cuMemFreeAsync)                                                                                                  \
    X(cuMemAllocFromPoolAsync)                                                                                         \
    X(cuMemPoolCreate)                                                                                                 \
    X(cuMemPoolDestroy)                                                                                                \
    X(cuMemPoolTrimTo)                                                                                                 \
    X(cuDeviceGetDefaultMemPool)                                                                                       \
    X(cuStreamSynchronize)                                                                                             \
    X(cuMemAddressReserve)                                                                                             \
    X(cuMemAddressFree)                                                                                                \
    X(cuMemCreate)                                                                                                     \
    X(cuMemRelease)                                                                                                    \
    X(cuMemMap)                                                                                                        \
    X(cuMemUnmap)                                                                                                      \
    X(cuMemSetAccess)                                                                                                  \
    X(cuArrayCreate_v2)                                                                                                \
    X(cuArrayDestroy)                                                                                                  \
    X(cuMipmappedArrayCreate)                                                                                          \
    X(cuMipmappedArrayDestroy)                                                                                         \
    X(cuGraphCreate)                                                                                                   \
    X(cuGraphAddMemAllocNode)                                                                                          \
    X(cuGraphAddMemFreeNode)                                                                                           \
    X(cuGraphInstantiateWithFlags)                                                                                     \
    X(cuGraphLaunch)                                                                                                   \
    X(cuGraphExecDestroy)                                                                                              \
    X(cuGraphDestroy)                                                                                                  \
    X(cuDeviceGraphMemTrim)                                                                                            \
    X(cuModuleLoadData)                                                                                                \
    X(cuModuleUnload)                                                                                                  \
    X(cuLibraryLoadData)                                                                                               \
    X(cuLibraryGetGlobal)                                                                                              \
    X(cuLibraryUnload)                                                                                                 \
    X(cuIpcGetMemHandle)                                                                                               \
    X(cuIpcOpenMemHandle_v2)                                                                                           \
    X(cuIpcCloseMemHandle)                                                                                             \
    X(cuMemExportToShareableHandle)                                                                                    \
    X(cuMemImportFromShareableHandle)                                                                                  \
    X(cuMemPoolExportToShareableHandle)                                                                                \
    X(cuMemPoolImportFromShareableHandle)                                                                              \
    X(cuMemPoolExportPointer)                                                                                          \
    X(cuMemPoolImportPointer)

static struct {
#define SLOT(name) __typeof__(&name) name;
    DRIVER(SLOT)
} cu;

static const char *failed; /* the call that failed last, and its result */
static CUresult result;
static CUcontext primary;

#define TRY(name, ...)                                                                                                 \
    do {                                                                                                               \
        failed = #name;                                                                                                \
        result = cu.name ? cu.name(__VA_ARGS__) : CUDA_ERROR_NOT_FOUND;                                                \
        if (result) return;                                                                                            \
    } while (0)

static const CUmemLocation here = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0};
static const CUmemAllocationProp pinned = {.type = CU_MEM_ALLOCATION_TYPE_PINNED, .location = here};

/* -- one round each: allocates `bytes` and frees them; returns at the first call that fails */

static void plain(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAlloc_v2, &at, bytes);
    TRY(cuMemFree_v2, at);
}

static void pitched(size_t bytes)
{
    CUdeviceptr at;
    size_t pitch;
    TRY(cuMemAllocPitch_v2, &at, &pitch, 1 << 16, bytes >> 16, 4);
    TRY(cuMemFree_v2, at);
}

static void managed(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAllocManaged, &at, bytes, CU_MEM_ATTACH_GLOBAL);
    TRY(cuMemFree_v2, at);
}

static void async(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAllocAsync, &at, bytes, NULL);
    TRY(cuMemFreeAsync, at, NULL);
    TRY(cuStreamSynchronize, NULL);
}

/* The program does not wait for the free: the driver releases the pool's memory at a later call that needs memory. */
static void unwaited(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAllocAsync, &at, bytes, NULL);
    TRY(cuMemFreeAsync, at, NULL);
}

static void plain_async(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAlloc_v2, &at, bytes);
    TRY(cuMemFreeAsync, at, NULL);
    TRY(cuStreamSynchronize, NULL);
}

static void async_plain(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAllocAsync, &at, bytes, NULL);
    TRY(cuMemFree_v2, at);
}

/* Memory of a pool is freed at once, and as many bytes are then allocated as plain memory. */
static void async_and_plain(size_t bytes)
{
    CUdeviceptr at;
    TRY(cuMemAllocAsync, &at, bytes, NULL);
    TRY(cuMemFree_v2, at);
    TRY(cuMemAlloc_v2, &at, bytes);
    TRY(cuMemFree_v2, at);
}

/* `first`: the pool is destroyed while its memory is in use. */
static void pool_of(size_t bytes, bool first)
{
    CUmemPoolProps how = {.allocType = CU_MEM_ALLOCATION_TYPE_PINNED, .location = here};
    CUmemoryPool made;
    CUdeviceptr at;
    TRY(cuMemPoolCreate, &made, &how);
    TRY(cuMemAllocFromPoolAsync, &at, bytes, made, NULL);
    if (first) TRY(cuMemPoolDestroy, made);
    TRY(cuMemFreeAsync, at, NULL);
    if (!first) TRY(cuMemPoolDestroy, made);
    TRY(cuStreamSynchronize, NULL);
}

static void pool(size_t bytes) { pool_of(bytes, false); }
static void pool_first(size_t bytes) { pool_of(bytes, true); }

static size_t map_pieces(CUdeviceptr at, size_t bytes)
{
    static const CUmemAccessDesc access = {.location = here, .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUmemGenericAllocationHandle handle;
    size_t had = 0;
    for (failed = "cuMemCreate"; had < bytes; had += PIECE) {
        if ((result = cu.cuMemCreate(&handle, PIECE, &pinned, 0))) break;
        if ((result = cu.cuMemMap(at + had, PIECE, 0, handle, 0))) break;
        if ((result = cu.cuMemSetAccess(at + had, PIECE, &access, 1))) break;
        if ((result = cu.cuMemRelease(handle))) break;
    }
    return had;
}

/* `ranges` calls unmap all pieces. 0: one call for each piece. */
static void mapped(size_t bytes, unsigned ranges)
{
    CUdeviceptr at;
    bytes = bytes / (4 * PIECE) * (4 * PIECE);
    TRY(cuMemAddressReserve, &at, bytes, 0, 0, 0);
    size_t had = map_pieces(at, bytes);
    CUresult mapping = result;
    const char *call = failed;
    size_t step = !ranges || had < bytes ? PIECE : bytes / ranges;
    for (size_t done = 0; done < had; done += step) TRY(cuMemUnmap, at + done, step);
    TRY(cuMemAddressFree, at, bytes);
    result = mapping;
    failed = call;
}

static void mapped_one(size_t bytes) { mapped(bytes, 1); }
static void mapped_four(size_t bytes) { mapped(bytes, 4); }
static void mapped_each(size_t bytes) { mapped(bytes, 0); }

static void created(size_t bytes) /* never mapped */
{
    CUmemGenericAllocationHandle handle;
    TRY(cuMemCreate, &handle, bytes / PIECE * PIECE, &pinned, 0);
    TRY(cuMemRelease, handle);
}

static void array(size_t bytes)
{
    CUDA_ARRAY_DESCRIPTOR what = {
        .Width = 1 << 14, .Height = bytes >> 16, .Format = CU_AD_FORMAT_FLOAT, .NumChannels = 1};
    CUarray made;
    TRY(cuArrayCreate_v2, &made, &what);
    TRY(cuArrayDestroy, made);
}

static void mipmapped(size_t bytes)
{
    CUDA_ARRAY3D_DESCRIPTOR what = {
        .Width = 1 << 14, .Height = bytes >> 17, .Format = CU_AD_FORMAT_FLOAT, .NumChannels = 1};
    CUmipmappedArray made;
    TRY(cuMipmappedArrayCreate, &made, &what, 4);
    TRY(cuMipmappedArrayDestroy, made);
}

static void graph_of(size_t bytes, bool frees)
{
    CUDA_MEM_ALLOC_NODE_PARAMS what = {.poolProps = {.allocType = CU_MEM_ALLOCATION_TYPE_PINNED, .location = here},
                                       .bytesize = bytes};
    CUgraph made;
    CUgraphExec exec;
    CUgraphNode alloc, end;
    TRY(cuGraphCreate, &made, 0);
    TRY(cuGraphAddMemAllocNode, &alloc, made, NULL, 0, &what);
    if (frees) TRY(cuGraphAddMemFreeNode, &end, made, &alloc, 1, what.dptr);
    TRY(cuGraphInstantiateWithFlags, &exec, made, 0);
    TRY(cuGraphLaunch, exec, NULL);
    TRY(cuStreamSynchronize, NULL);
    if (!frees) TRY(cuMemFree_v2, what.dptr);
    TRY(cuGraphExecDestroy, exec);
    TRY(cuGraphDestroy, made);
    TRY(cuDeviceGraphMemTrim, 0);
}

static void graph_frees(size_t bytes) { graph_of(bytes, true); }
static void graph_freed(size_t bytes) { graph_of(bytes, false); }

static const char *code_with(size_t bytes)
{
    static char text[512];
    snprintf(text, sizeof text,
             ".version 7.0\n.target sm_70\n.address_size 64\n.visible .global .align 16 .b8 data[%zu];\n"
             ".visible .entry kernel()\n{\n .reg .b64 %%rd<2>;\n .reg .b32 %%r<2>;\n mov.u64 %%rd1, data;\n"
             " mov.u32 %%r1, 1;\n st.global.u32 [%%rd1], %%r1;\n ret;\n}\n",
             bytes);
    return text;
}

static void module(size_t bytes)
{
    CUmodule made;
    TRY(cuModuleLoadData, &made, code_with(bytes));
    TRY(cuModuleUnload, made);
}

static void library(size_t bytes)
{
    CUlibrary made;
    CUdeviceptr at;
    TRY(cuLibraryLoadData, &made, code_with(bytes), NULL, NULL, 0, NULL, NULL, 0);
    TRY(cuLibraryGetGlobal, &at, NULL, made, "data");
    TRY(cuLibraryUnload, made);
}

#include "freed_contexts.h"
#include "freed_shares.h"

static const struct way {
    const char *name;
    void (*round)(size_t);
} ways[] = {
    {"plain", plain},
    {"pitched", pitched},
    {"managed", managed},
    {"async", async},
    {"unwaited", unwaited},
    {"plain_async", plain_async},
    {"async_plain", async_plain},
    {"async_and_plain", async_and_plain},
    {"pool", pool},
    {"pool_first", pool_first},
    {"mapped_one", mapped_one},
    {"mapped_four", mapped_four},
    {"mapped_each", mapped_each},
    {"created", created},
    {"context", context},
    {"array", array},
    {"mipmapped", mipmapped},
    {"graph_frees", graph_frees},
    {"graph_freed", graph_freed},
    {"module", module},
    {"library", library},
    {"reset", reset},
    {"released", released},
    {"exported", exported},
    {"ipc", ipc},
    {"imported", imported},
    {"pool_imported", pool_imported},
};

static size_t free_bytes(size_t *total)
{
    size_t left = 0;
    if (cu.cuCtxSynchronize() || cu.cuMemGetInfo_v2(&left, total)) exit(3);
    return left;
}

static void run(const struct way *way, unsigned share)
{
    CUmemoryPool usual;
    size_t total = 0, before = free_bytes(&total), bytes = before / 100 * share / PIECE * PIECE;
    unsigned passed = 0;
    for (unsigned round = 0; round < ROUNDS; round++) {
        way->round(bytes);
        passed += !result;
        if (result) fprintf(stderr, "%s %u: %s returns %d\n", way->name, round, failed, result);
    }
    for (unsigned i = 0; i < 100 && free_bytes(&total) != before; i++) usleep(20000);
    printf("%s %u %u %llu %llu %llu\n", way->name, passed, ROUNDS, total / MIB, before / MIB, free_bytes(&total) / MIB);
    fflush(stdout);
    /* A pool keeps memory that was freed by a call that did not wait. */
    if (!cu.cuDeviceGetDefaultMemPool(&usual, 0)) cu.cuMemPoolTrimTo(usual, 0);
}

int main(int argc, char **argv)
{
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    const struct way *end = ways + sizeof ways / sizeof *ways;
    if (argc == 2 && !strcmp(argv[1], "ways")) {
        for (const struct way *way = ways; way < end; way++) puts(way->name);
        return 0;
    }
#define FIND(name) cu.name = lib ? (__typeof__(&name))dlsym(lib, #name) : NULL;
    DRIVER(FIND)
    if (argc < 2 || !cu.cuInit || cu.cuInit(0) || cu.cuDevicePrimaryCtxRetain(&primary, 0) ||
        cu.cuCtxSetCurrent(primary))
        return 2;
    if (!strcmp(argv[1], "export")) return export(argv[2][0], strtoull(argv[3], NULL, 10));
    for (const struct way *way = ways; way < end; way++) {
        bool named = argc == 2;
        for (int i = 2; i < argc; i++) named |= !strcmp(argv[i], way->name);
        if (named) run(way, (unsigned)atoi(argv[1]));
    }
    return 0;
}
