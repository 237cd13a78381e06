/*
 * graph.c: calls that create, launch and destroy executable graphs, for the memory that graphs allocate for themselves.
 * Owns nothing.
 *
 * A graph's allocation nodes allocate nothing until the graph is uploaded or launched. Then the driver maps memory of
 * the device for it, keeps it, and may share it with other graphs. So the nodes are read at instantiation. The most
 * that they hold at the same time is requested when the graph is first used with a stream, and corrected to the size
 * that the driver really allocated. For programs whose graphs allocate nothing this is one load at each launch.
 */
#include <errno.h>

#include "account/graph_memory.h"
#include "gate/gate.h"
#include "link/link.h"

#pragma GCC optimize("Os") /* until graphs are launched */

EXPORT CUresult cuDeviceGraphMemTrim(CUdevice device)
{
    __typeof__(&cuDeviceGraphMemTrim) driver = REAL(cuDeviceGraphMemTrim);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(device);
    if (result == CUDA_SUCCESS && device >= 0 && device < FGPU_DEVICES) fgpu_graphs_measure(device);
    return result;
}

/* -- instantiation: the facts are stored under the executable graph's handle */

static bool counts(int ordinal)
{
    enum fgpu_link link = fgpu_look().link;
    return link != FGPU_OPEN && link != FGPU_UNMANAGED && ordinal >= 0 && ordinal < FGPU_DEVICES;
}

static CUresult before_instantiate(CUgraph graph, unsigned long long flags, struct fgpu_graph_reading *r)
{
    CUresult refusal = CUDA_SUCCESS;
    struct patience patience = {0};
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    fgpu_graph_read(r, graph);
    if (r->peak && flags & CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD && counts(r->ordinal))
        refusal = fgpu_graphs_ask_for(r->ordinal, r->peak, &patience);
    fgpu_unrelax(mode);
    errno = saved;
    return refusal;
}

static CUresult after_instantiate(CUresult result, const CUgraphExec *exec, unsigned long long flags,
                                  const struct fgpu_graph_reading *r)
{
    if (result == CUDA_SUCCESS) fgpu_graph_exec_keep(*exec, r);
    if (r->peak && flags & CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD) fgpu_graphs_measure(r->ordinal);
    return result;
}

#define INSTANTIATE(name, flags, ...)                                                                                  \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        struct fgpu_graph_reading reading;                                                                             \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        if (!phGraphExec || !hGraph) return driver(__VA_ARGS__);                                                       \
        CUresult refusal = before_instantiate(hGraph, flags, &reading);                                                \
        if (refusal) return refusal;                                                                                   \
        return after_instantiate(driver(__VA_ARGS__), phGraphExec, flags, &reading);                                   \
    } while (0)

EXPORT CUresult cuGraphInstantiate(CUgraphExec *phGraphExec, CUgraph hGraph, CUgraphNode *phErrorNode, char *logBuffer,
                                   size_t bufferSize)
{
    INSTANTIATE(cuGraphInstantiate, 0, phGraphExec, hGraph, phErrorNode, logBuffer, bufferSize);
}

EXPORT CUresult cuGraphInstantiate_v2(CUgraphExec *phGraphExec, CUgraph hGraph, CUgraphNode *phErrorNode,
                                      char *logBuffer, size_t bufferSize)
{
    INSTANTIATE(cuGraphInstantiate_v2, 0, phGraphExec, hGraph, phErrorNode, logBuffer, bufferSize);
}

EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec *phGraphExec, CUgraph hGraph, unsigned long long flags)
{
    INSTANTIATE(cuGraphInstantiateWithFlags, flags, phGraphExec, hGraph, flags);
}

EXPORT CUresult cuGraphInstantiateWithParams(CUgraphExec *phGraphExec, CUgraph hGraph,
                                             CUDA_GRAPH_INSTANTIATE_PARAMS *instantiateParams)
{
    unsigned long long flags = instantiateParams ? instantiateParams->flags : 0;
    INSTANTIATE(cuGraphInstantiateWithParams, flags, phGraphExec, hGraph, instantiateParams);
}

EXPORT CUresult cuGraphInstantiateWithParams_ptsz(CUgraphExec *phGraphExec, CUgraph hGraph,
                                                  CUDA_GRAPH_INSTANTIATE_PARAMS *instantiateParams)
{
    unsigned long long flags = instantiateParams ? instantiateParams->flags : 0;
    INSTANTIATE(cuGraphInstantiateWithParams_ptsz, flags, phGraphExec, hGraph, instantiateParams);
}

#pragma GCC reset_options

/* -- launch and upload */

typedef CUresult run(CUgraphExec, CUstream);

/* `launch` is NULL for an upload, which runs nothing and enters no gate. */
static bool enters(struct fgpu_launch *launch, CUgraphExec handle, CUstream stream, bool per_thread)
{
    if (!launch || LIKELY(!fgpu_is_gated())) return false;
    fgpu_gate_enter(launch, stream, per_thread, handle);
    return launch->index >= 0;
}

static CUresult leave(const struct fgpu_launch *launch, CUresult result)
{
    return launch ? fgpu_gate_leave(launch, result) : result;
}

/* Return whether the graph runs without a request: its memory was admitted for this stream, or is not charged. */
static bool has_memory(int ordinal, const struct fgpu_graph_exec *exec, uint64_t key)
{
    return (exec && atomic_load_explicit(&exec->stream, memory_order_relaxed) == key) || !counts(ordinal);
}

static CUresult ask(int ordinal, const struct fgpu_graph_exec *exec, uint64_t key, struct patience *patience)
{
    if (has_memory(ordinal, exec, key)) return CUDA_SUCCESS;
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    CUresult refusal = fgpu_graphs_ask_for(ordinal, exec ? atomic_load(&exec->peak) : 0, patience);
    fgpu_unrelax(mode);
    errno = saved;
    return refusal;
}

/* Request the memory before the launch reaches the gate: a launch that waits for memory must not hold a turn. While the
 * launch waits at the gate, other calls may use or release what was admitted, also for an earlier launch. So the
 * request is repeated behind the gate, and a launch that would have to wait for memory there leaves the gate first. */
static CUresult ask_and_enter(int ordinal, const struct fgpu_graph_exec *exec, struct fgpu_launch *launch,
                              CUgraphExec handle, CUstream stream, bool per_thread)
{
    uint64_t key = fgpu_stream_key(stream, per_thread);
    for (;;) {
        struct patience patience = {0};
        CUresult refusal = ask(ordinal, exec, key, &patience);
        if (refusal || !enters(launch, handle, stream, per_thread)) return refusal;
        refusal = ask(ordinal, exec, key, NULL);
        if (!refusal) return CUDA_SUCCESS;
        leave(launch, refusal);
        launch->index = -1; /* the next round may find no gate */
    }
}

static CUresult place(run *driver, CUgraphExec handle, CUstream stream, bool per_thread, struct fgpu_launch *launch)
{
    uint64_t key = fgpu_stream_key(stream, per_thread);
    struct fgpu_graph_exec *exec = fgpu_graph_exec_of(handle);
    int ordinal = exec ? atomic_load(&exec->ordinal) : atomic_load(&fgpu_graphs_crowded) - 1;
    CUresult result = ask_and_enter(ordinal, exec, launch, handle, stream, per_thread);
    if (result) return result;
    bool is_placed = has_memory(ordinal, exec, key);
    result = leave(launch, driver(handle, stream));
    if (is_placed) return result;
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    fgpu_graphs_follow(ordinal);
    fgpu_unrelax(mode);
    errno = saved;
    if (!exec || result != CUDA_SUCCESS) return result;
    if (!atomic_exchange(&exec->stream, key))
        atomic_fetch_add(&fgpu_graph_memory[ordinal].kept, atomic_load(&exec->kept));
    return result;
}

EXPORT CUresult cuGraphExecDestroy(CUgraphExec hGraphExec)
{
    __typeof__(&cuGraphExecDestroy) driver = REAL(cuGraphExecDestroy);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    struct fgpu_graph_exec *exec = hGraphExec ? fgpu_graph_exec_of(hGraphExec) : NULL;
    if (exec) atomic_store(&exec->handle, 0); /* before another graph can get the handle */
    return driver(hGraphExec);
}

/* Run a graph. A graph that is launched into a capture becomes a node of another graph, and allocates nothing. */
static CUresult run_it(run *driver, CUgraphExec handle, CUstream stream, bool per_thread, struct fgpu_launch *launch)
{
    if (!LIKELY(!atomic_load_explicit(&fgpu_graphs_allocate, memory_order_relaxed)) &&
        !fgpu_is_capturing(stream, per_thread))
        return place(driver, handle, stream, per_thread, launch);
    enters(launch, handle, stream, per_thread);
    return leave(launch, driver(handle, stream));
}

#define UPLOAD(name, per_thread)                                                                                       \
    EXPORT CUresult name(CUgraphExec hGraphExec, CUstream hStream)                                                     \
    {                                                                                                                  \
        run *driver = REAL(name);                                                                                      \
        return driver ? run_it(driver, hGraphExec, hStream, per_thread, NULL) : CUDA_ERROR_NOT_SUPPORTED;              \
    }
UPLOAD(cuGraphUpload, false)
UPLOAD(cuGraphUpload_ptsz, true)

#define LAUNCH(name, per_thread)                                                                                       \
    EXPORT CUresult name(CUgraphExec hGraphExec, CUstream hStream)                                                     \
    {                                                                                                                  \
        run *driver = REAL(name);                                                                                      \
        struct fgpu_launch launch = {.index = -1};                                                                     \
        return driver ? run_it(driver, hGraphExec, hStream, per_thread, &launch) : CUDA_ERROR_NOT_SUPPORTED;           \
    }
LAUNCH(cuGraphLaunch, false)
LAUNCH(cuGraphLaunch_ptsz, true)
