/*
 * graph.c: memory that graphs take for themselves. Owns what it read of graphs that allocate; the kernel owns the sum.
 *
 * A graph's allocation nodes take nothing until the graph is uploaded or launched; then the driver maps memory of the
 * device for it, keeps it, and may share it with other graphs. So nodes are read at instantiation, the most that they
 * hold at once is asked for when the graph first meets a stream, and what the driver really took decides afterwards.
 * Programs whose graphs allocate nothing pay one load a launch.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>

#include "gate.h"

#define EXECS 64
#define NODES 128 /* read on the stack; longer graphs are read in a mapping of their own */
#define LIVE 64
#define DEPTH 4

static struct exec {
    _Atomic uint64_t handle;
    _Atomic uint64_t peak;
    _Atomic uint64_t kept;   /* what it leaves to the program when it has run */
    _Atomic uint64_t stream; /* where its memory was mapped last; 0: nowhere */
    _Atomic int ordinal;
} execs[EXECS]; /* one that finds no room is asked for when its launch is over */

static struct graph_memory {
    _Atomic uint64_t admitted;
    _Atomic uint64_t kept; /* by graphs that ran: at most, for nobody tells when the program frees it */
    _Atomic int index;
} memory[FGPU_DEVICES];

static _Atomic int crowded;    /* n + 1: graphs that found no room above take memory of device n */
static _Atomic bool allocates; /* some graph of this process does */

#pragma GCC optimize("Os") /* until graphs are launched */

/* -- reading a graph */

struct reading {
    uint64_t live, peak;
    int ordinal;
    unsigned known;
    struct {
        CUdeviceptr pointer;
        uint64_t bytes;
    } nodes[LIVE];
};

static void read_alloc(struct reading *r, CUgraphNode node)
{
    CUDA_MEM_ALLOC_NODE_PARAMS params;
    __typeof__(&cuGraphMemAllocNodeGetParams) get = REAL(cuGraphMemAllocNodeGetParams);
    if (!get || get(node, &params) != CUDA_SUCCESS) return;
    if (params.poolProps.location.type != CU_MEM_LOCATION_TYPE_DEVICE) return;
    uint64_t bytes = fgpu_taken(params.bytesize, fgpu_granule(params.poolProps.location.id));
    r->ordinal = params.poolProps.location.id;
    r->live = r->live + bytes > FGPU_MOST_BYTES ? TOO_MUCH : r->live + bytes;
    if (r->live > r->peak) r->peak = r->live;
    if (r->known == LIVE) return; /* its end will not be known: counted to the end */
    r->nodes[r->known].pointer = params.dptr;
    r->nodes[r->known++].bytes = bytes;
}

static void read_free(struct reading *r, CUgraphNode node)
{
    CUdeviceptr pointer = 0;
    __typeof__(&cuGraphMemFreeNodeGetParams) get = REAL(cuGraphMemFreeNodeGetParams);
    if (!get || get(node, &pointer) != CUDA_SUCCESS) return;
    for (unsigned i = 0; i < r->known; i++) {
        if (r->nodes[i].pointer != pointer) continue;
        r->live -= r->nodes[i].bytes < r->live ? r->nodes[i].bytes : r->live;
        r->nodes[i] = r->nodes[--r->known];
        return;
    }
}

static void read_graph(struct reading *r, CUgraph graph, int depth);

static void read_nodes(struct reading *r, const CUgraphNode *nodes, size_t count, int depth)
{
    __typeof__(&cuGraphNodeGetType) type_of = REAL(cuGraphNodeGetType);
    __typeof__(&cuGraphChildGraphNodeGetGraph) child_of = REAL(cuGraphChildGraphNodeGetGraph);
    for (size_t i = 0; type_of && i < count; i++) {
        CUgraphNodeType type;
        CUgraph child;
        if (type_of(nodes[i], &type) != CUDA_SUCCESS) continue;
        if (type == CU_GRAPH_NODE_TYPE_MEM_ALLOC) read_alloc(r, nodes[i]);
        if (type == CU_GRAPH_NODE_TYPE_MEM_FREE) read_free(r, nodes[i]);
        if (type == CU_GRAPH_NODE_TYPE_GRAPH && child_of && child_of(nodes[i], &child) == CUDA_SUCCESS)
            read_graph(r, child, depth + 1);
    }
}

/* In the order in which nodes were made, which for a captured graph is the order in which they may run. */
static void read_graph(struct reading *r, CUgraph graph, int depth)
{
    __typeof__(&cuGraphGetNodes) get = REAL(cuGraphGetNodes);
    CUgraphNode some[NODES], *nodes = some;
    size_t count = 0, room = 0;
    if (!get || depth > DEPTH || get(graph, NULL, &count) != CUDA_SUCCESS || !count) return;
    if (count > NODES) {
        room = count * sizeof *nodes;
        nodes = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (nodes == MAP_FAILED) {
            nodes = some;
            count = NODES;
            room = 0;
        }
    }
    if (get(graph, nodes, &count) == CUDA_SUCCESS) read_nodes(r, nodes, count, depth);
    if (room) munmap(nodes, room);
}

/* -- the device's graph memory */

static bool measure(int ordinal, uint64_t *used, uint64_t *reserved)
{
    __typeof__(&cuDeviceGetGraphMemAttribute) get = REAL(cuDeviceGetGraphMemAttribute);
    cuuint64_t in_use = 0, in_all = 0;
    if (!get || get(ordinal, CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT, &in_use) != CUDA_SUCCESS ||
        get(ordinal, CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT, &in_all) != CUDA_SUCCESS)
        return false;
    *used = in_use > FGPU_MOST_BYTES ? FGPU_MOST_BYTES : in_use;
    *reserved = in_all > FGPU_MOST_BYTES ? FGPU_MOST_BYTES : in_all;
    return true;
}

static bool give_back_above(struct graph_memory *m, uint64_t keep)
{
    uint64_t admitted = atomic_load(&m->admitted);
    while (admitted > keep)
        if (atomic_compare_exchange_weak(&m->admitted, &admitted, keep)) {
            fgpu_give_back(atomic_load(&m->index), admitted - keep);
            return true;
        }
    return false;
}

static CUresult ask_up_to(int ordinal, uint64_t need, struct patience *patience)
{
    struct graph_memory *m = &memory[ordinal];
    uint64_t admitted = atomic_load(&m->admitted);
    if (need <= admitted) return CUDA_SUCCESS;
    struct admission admission = fgpu_admission_with(patience, ordinal, need - admitted, FGPU_POOL);
    if (admission.index >= 0) {
        atomic_store(&m->index, admission.index);
        atomic_fetch_add(&m->admitted, admission.bytes);
    }
    return admission.refusal;
}

/* What the driver took decides: asked for when it is more, given back when it is less. */
static void follow(int ordinal)
{
    uint64_t used, reserved;
    if (!measure(ordinal, &used, &reserved)) return;
    if (!ask_up_to(ordinal, reserved, NULL)) give_back_above(&memory[ordinal], reserved);
}

/* Graphs that never run at once share memory, so the sum of their peaks is not what they need. Where that sum does not
 * fit, one may try that finds its peak in what the device holds for graphs and no graph left to the program, as long
 * as all of that was admitted. */
static CUresult ask_for(int ordinal, uint64_t peak)
{
    uint64_t used, reserved;
    struct patience patience = {0};
    if (!measure(ordinal, &used, &reserved))
        return ask_up_to(ordinal, atomic_load(&memory[ordinal].admitted) + peak, &patience);
    uint64_t need = used + peak > reserved ? used + peak : reserved;
    uint64_t admitted = atomic_load(&memory[ordinal].admitted);
    if (need > admitted && need - admitted > fgpu_room(ordinal) &&
        peak + atomic_load(&memory[ordinal].kept) <= reserved && reserved <= admitted)
        return CUDA_SUCCESS;
    return ask_up_to(ordinal, need, &patience);
}

static void forget_places(CUdevice ordinal)
{
    for (unsigned i = 0; i < EXECS; i++)
        if (ordinal < 0 || atomic_load(&execs[i].ordinal) == ordinal) atomic_store(&execs[i].stream, 0);
}

bool fgpu_graphs_yield(CUdevice ordinal)
{
    uint64_t used, reserved;
    if (ordinal < 0 || ordinal >= FGPU_DEVICES || !atomic_load(&memory[ordinal].admitted)) return false;
    __typeof__(&cuDeviceGraphMemTrim) trim = REAL(cuDeviceGraphMemTrim);
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    forget_places(ordinal);
    if (trim) trim(ordinal);
    bool more = measure(ordinal, &used, &reserved) && give_back_above(&memory[ordinal], reserved);
    fgpu_unrelax(mode);
    errno = saved;
    return more;
}

/* A context has ended, or the program has trimmed: what the device holds for graphs now is what stays charged. */
void fgpu_graphs_measure(CUdevice ordinal)
{
    if (!atomic_load(&allocates)) return;
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    forget_places(ordinal);
    for (int i = 0; i < FGPU_DEVICES; i++)
        if (ordinal < 0 || ordinal == i) follow(i);
    fgpu_unrelax(mode);
    errno = saved;
}

EXPORT CUresult cuDeviceGraphMemTrim(CUdevice device)
{
    __typeof__(&cuDeviceGraphMemTrim) driver = REAL(cuDeviceGraphMemTrim);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(device);
    if (result == CUDA_SUCCESS && device >= 0 && device < FGPU_DEVICES) fgpu_graphs_measure(device);
    return result;
}

/* -- instantiation: what was read is kept by the executable graph's handle */

static struct exec *exec_of(CUgraphExec handle)
{
    for (unsigned i = 0; i < EXECS; i++)
        if (atomic_load_explicit(&execs[i].handle, memory_order_acquire) == (uint64_t)handle) return &execs[i];
    return NULL;
}

static void keep(CUgraphExec handle, const struct reading *r)
{
    struct exec *exec = exec_of(handle); /* one that was destroyed had the same handle, perhaps */
    if (!r->peak) {
        if (exec) atomic_store(&exec->handle, 0);
        return;
    }
    atomic_store(&allocates, true);
    for (unsigned i = 0; !exec && i < EXECS; i++) {
        uint64_t none = 0;
        if (atomic_compare_exchange_strong(&execs[i].handle, &none, 1)) exec = &execs[i];
    }
    if (!exec) {
        atomic_store(&crowded, r->ordinal + 1);
        return;
    }
    atomic_store(&exec->peak, r->peak);
    atomic_store(&exec->kept, r->live);
    atomic_store(&exec->stream, 0);
    atomic_store(&exec->ordinal, r->ordinal);
    atomic_store_explicit(&exec->handle, (uint64_t)handle, memory_order_release);
}

static bool counts(int ordinal)
{
    enum fgpu_link link = fgpu_look().link;
    return link != FGPU_OPEN && link != FGPU_UNMANAGED && ordinal >= 0 && ordinal < FGPU_DEVICES;
}

static CUresult before_instantiate(CUgraph graph, unsigned long long flags, struct reading *r)
{
    CUresult refusal = CUDA_SUCCESS;
    int saved = errno;
    CUstreamCaptureMode mode = fgpu_relax();
    r->live = r->peak = r->known = 0;
    r->ordinal = -1;
    read_graph(r, graph, 0);
    if (r->peak && flags & CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD && counts(r->ordinal))
        refusal = ask_for(r->ordinal, r->peak);
    fgpu_unrelax(mode);
    errno = saved;
    return refusal;
}

#define INSTANTIATE(name, flags, ...)                                                                                  \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        struct reading reading;                                                                                        \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        if (!phGraphExec || !hGraph) return driver(__VA_ARGS__);                                                       \
        CUresult refusal = before_instantiate(hGraph, flags, &reading);                                                \
        if (refusal) return refusal;                                                                                   \
        CUresult result = driver(__VA_ARGS__);                                                                         \
        if (result == CUDA_SUCCESS) keep(*phGraphExec, &reading);                                                      \
        if (reading.peak && (flags)&CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD) fgpu_graphs_measure(reading.ordinal);          \
        return result;                                                                                                 \
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

static CUresult place(run *driver, CUgraphExec handle, CUstream stream, uint64_t key)
{
    struct exec *exec = exec_of(handle);
    int ordinal = exec ? atomic_load(&exec->ordinal) : atomic_load(&crowded) - 1, saved = errno;
    if (exec && atomic_load_explicit(&exec->stream, memory_order_relaxed) == key) return driver(handle, stream);
    if (!counts(ordinal)) return driver(handle, stream);
    CUstreamCaptureMode mode = fgpu_relax();
    CUresult refusal = ask_for(ordinal, exec ? atomic_load(&exec->peak) : 0);
    fgpu_unrelax(mode);
    errno = saved;
    if (refusal) return refusal;
    CUresult result = driver(handle, stream);
    saved = errno;
    mode = fgpu_relax();
    follow(ordinal);
    fgpu_unrelax(mode);
    errno = saved;
    if (!exec || result != CUDA_SUCCESS) return result;
    if (!atomic_exchange(&exec->stream, key)) atomic_fetch_add(&memory[ordinal].kept, atomic_load(&exec->kept));
    return result;
}

EXPORT CUresult cuGraphExecDestroy(CUgraphExec hGraphExec)
{
    __typeof__(&cuGraphExecDestroy) driver = REAL(cuGraphExecDestroy);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    struct exec *exec = hGraphExec ? exec_of(hGraphExec) : NULL;
    if (exec) atomic_store(&exec->handle, 0); /* before the handle can be another's */
    return driver(hGraphExec);
}

/* Launched into a capture it becomes a node of another graph, and takes nothing. */
static CUresult run_it(run *driver, CUgraphExec handle, CUstream stream, bool per_thread)
{
    if (LIKELY(!atomic_load_explicit(&allocates, memory_order_relaxed)) || fgpu_is_capturing(stream, per_thread))
        return driver(handle, stream);
    return place(driver, handle, stream, fgpu_stream_key(stream, per_thread));
}

#define UPLOAD(name, per_thread)                                                                                       \
    EXPORT CUresult name(CUgraphExec hGraphExec, CUstream hStream)                                                     \
    {                                                                                                                  \
        run *driver = REAL(name);                                                                                      \
        return driver ? run_it(driver, hGraphExec, hStream, per_thread) : CUDA_ERROR_NOT_SUPPORTED;                    \
    }
UPLOAD(cuGraphUpload, false)
UPLOAD(cuGraphUpload_ptsz, true)

#define LAUNCH(name, per_thread)                                                                                       \
    EXPORT CUresult name(CUgraphExec hGraphExec, CUstream hStream)                                                     \
    {                                                                                                                  \
        run *driver = REAL(name);                                                                                      \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        struct fgpu_launch launch = {.index = -1};                                                                     \
        if (!LIKELY(!fgpu_is_gated())) fgpu_gate_enter(&launch, hStream, per_thread, hGraphExec);                      \
        return fgpu_gate_leave(&launch, run_it(driver, hGraphExec, hStream, per_thread));                              \
    }
LAUNCH(cuGraphLaunch, false)
LAUNCH(cuGraphLaunch_ptsz, true)
