/* The stand-in's memory pools and graphs. A pool grows by 32 MiB. Memory that a stream has freed serves only that
 * stream until fake_sync(), which also releases unused blocks, as a trim does. A graph contains the captured calls. Its
 * memory is mapped at its first launch.
 */
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>
#include <errno.h>
#include <stdint.h>
#include <string.h>

#define BLOCK (32ull << 20)
struct pool {
    int device, in_place;
    uint64_t used, reserved, held[16];
    uint64_t going, loose; /* of a fragmented pool: blocks that a stream will free as a whole, and that are free */
};
static struct pool pools[512];
static int made = 3; /* pools 0, 1 and 2 are the defaults of the three devices */
static int current[3] = {0, 1, 2};
static int ended = -1; /* a destroyed pool: the next pool gets its handle */
static CUresult next_result;
static int queries, unsafe, asked_capturing, trims, broken;
static __thread CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

struct node {
    uint64_t pointer, bytes;
    int allocates;
    struct graph *child;
};
struct graph {
    int count, launched, device;
    struct node nodes[300];
};
static struct graph graphs[128];
static int graphs_made;
static struct graph *capturing[16];
static uint64_t graph_reserved[3], graph_kept;
static int sharing; /* whether graphs use each other's memory, except for memory that they leave to the program */
void fake_sharing(int on) { sharing = on; }
extern int fake_device(void);

void fake_pool_result(int r) { next_result = (CUresult)r; }
void fake_break(int on) { broken = on; } /* attributes of pools cannot be read */
int fake_queries(void) { return queries; }
int fake_unsafe(void) { return unsafe; }
int fake_asked_capturing(void) { return asked_capturing; }
int fake_trims(void) { return trims; }
uint64_t fake_reserved(int pool) { return pools[pool].reserved; }
uint64_t fake_graph_reserved(int device) { return graph_reserved[device]; }
void fake_graph_take(int device, uint64_t bytes) { graph_reserved[device] += bytes; }

static uint64_t blocks(uint64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }
static uint64_t all_held(struct pool *p)
{
    uint64_t n = 0;
    for (int i = 0; i < 16; i++) n += p->held[i];
    return n;
}
static uint64_t hole; /* not 0: the largest free piece of each pool; no block is free as a whole */
void fake_fragmented(uint64_t largest) { hole = largest; }
static void trim(struct pool *p)
{
    p->reserved -= p->loose, p->loose = 0;
    if (hole) return; /* no other block is free as a whole */
    uint64_t keep = blocks(p->used + all_held(p));
    if (p->reserved > keep) p->reserved = keep;
}
static int lazy; /* neither a wait nor the end of a context releases anything */
void fake_lazy(int on) { lazy = on; }
void fake_sync(void)
{
    for (int i = 0; i < made; i++) pools[i].loose += pools[i].going, pools[i].going = 0;
    if (lazy) return;
    for (int i = 0; i < made; i++) memset(pools[i].held, 0, sizeof pools[i].held), trim(&pools[i]);
}
static struct pool *pool_of(CUmemoryPool h)
{
    uintptr_t n = (uintptr_t)h - 0x1000;
    return n < (uintptr_t)made ? &pools[n] : NULL;
}
/* The next call that destroys a pool or asks for a device's pool calls this before it returns: as if another
 * thread ran in that time. */
static void (*meanwhile)(void);
void fake_meanwhile(void (*what)(void)) { meanwhile = what; }
static void others_run(void)
{
    void (*what)(void) = meanwhile;
    meanwhile = NULL;
    if (what) what();
}
static CUmemoryPool handle_of(int n) { return (CUmemoryPool)(uintptr_t)(0x1000 + n); }

/* Allocations, by the number in the pointer. */
static struct {
    uint64_t bytes;
    int pool;
} given[1 << 16];

int fake_given(void) /* the number of allocations that exist */
{
    int n = 0;
    for (int i = 1; i < 1 << 16; i++) n += given[i].bytes > 0;
    return n;
}

static CUresult take(CUdeviceptr *out, size_t n, int number, CUstream stream)
{
    struct pool *p = &pools[number];
    unsigned s = (uintptr_t)stream & 15;
    errno = 41;
    if (next_result) return next_result;
    p->used += n;
    if (hole && n > hole) {
        p->reserved += blocks(n);
    } else {
        p->held[s] -= p->held[s] < n ? p->held[s] : n;
        uint64_t total = blocks(p->used + all_held(p));
        if (total > p->reserved) p->reserved = total;
    }
    int at = 1;
    while (given[at].bytes) at++;
    given[at].bytes = n, given[at].pool = number;
    *out = 0x700000000000ull + (uint64_t)at * 4096;
    return CUDA_SUCCESS;
}
static CUresult give(CUdeviceptr pointer, CUstream stream)
{
    uint64_t at = (pointer - 0x700000000000ull) / 4096;
    if (next_result) return next_result;
    if (!pointer) return CUDA_SUCCESS;
    if (pointer == 0xd00000) return CUDA_SUCCESS;             /* memory of cuMemAlloc */
    if (pointer == 0xe00000) return CUDA_ERROR_NOT_SUPPORTED; /* managed memory */
    if (at > 65535 || !given[at].bytes) return CUDA_ERROR_INVALID_VALUE;
    struct pool *p = &pools[given[at].pool];
    p->used -= given[at].bytes;
    if (hole && given[at].bytes > hole)
        p->going += blocks(given[at].bytes);
    else
        p->held[(uintptr_t)stream & 15] += given[at].bytes;
    given[at].bytes = 0;
    return CUDA_SUCCESS;
}
static CUresult captured(struct graph *g, CUdeviceptr *p, size_t n, int allocates)
{
    if (allocates) *p = 0x600000000000ull + (uint64_t)(g - graphs) * 65536 + (uint64_t)g->count * 64;
    g->nodes[g->count++] = (struct node){*p, n, allocates, NULL};
    g->device = fake_device();
    return CUDA_SUCCESS;
}
static CUresult alloc(CUdeviceptr *p, size_t n, int pool, CUstream stream)
{
    if (capturing[(uintptr_t)stream & 15]) return captured(capturing[(uintptr_t)stream & 15], p, n, 1);
    return take(p, n, pool, stream);
}
CUresult cuMemAllocAsync(CUdeviceptr *p, size_t n, CUstream s) { return alloc(p, n, current[fake_device()], s); }
CUresult cuMemAllocAsync_ptsz(CUdeviceptr *p, size_t n, CUstream s) { return alloc(p, n, current[fake_device()], s); }
CUresult cuMemAllocFromPoolAsync(CUdeviceptr *p, size_t n, CUmemoryPool h, CUstream s)
{
    return alloc(p, n, (int)(pool_of(h) - pools), s);
}
CUresult cuMemAllocFromPoolAsync_ptsz(CUdeviceptr *p, size_t n, CUmemoryPool h, CUstream s)
{
    return alloc(p, n, (int)(pool_of(h) - pools), s);
}
CUresult cuMemFreeAsync(CUdeviceptr p, CUstream s)
{
    struct graph *g = capturing[(uintptr_t)s & 15];
    return g ? captured(g, &p, 0, 0) : give(p, s);
}
CUresult cuMemFreeAsync_ptsz(CUdeviceptr p, CUstream s) { return give(p, s); }

CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *h, CUdevice d)
{
    if (d < 0 || d > 2) return CUDA_ERROR_INVALID_DEVICE;
    *h = handle_of(d);
    return others_run(), CUDA_SUCCESS;
}
CUresult cuDeviceGetMemPool(CUmemoryPool *h, CUdevice d)
{
    errno = 42;
    if (d < 0 || d > 2) return CUDA_ERROR_INVALID_DEVICE;
    *h = handle_of(current[d]);
    return others_run(), CUDA_SUCCESS;
}
CUresult cuDeviceSetMemPool(CUdevice d, CUmemoryPool h) { return current[d] = (int)(pool_of(h) - pools), CUDA_SUCCESS; }
CUresult cuMemSetMemPool(CUmemLocation *l, CUmemAllocationType t, CUmemoryPool h)
{
    return (void)t, cuDeviceSetMemPool(l->id, h);
}
CUresult cuMemPoolCreate(CUmemoryPool *h, const CUmemPoolProps *props)
{
    if (ended >= 0) return *h = handle_of(ended), ended = -1, CUDA_SUCCESS;
    if (made == 512) return CUDA_ERROR_OUT_OF_MEMORY;
    pools[made].device = props->location.id;
    return *h = handle_of(made++), CUDA_SUCCESS;
}
CUresult cuMemPoolDestroy(CUmemoryPool h)
{
    struct pool *p = pool_of(h);
    if (p - pools < 3) return others_run(), CUDA_ERROR_INVALID_VALUE;
    for (int d = 0; d < 3; d++)
        if (current[d] == p - pools) current[d] = d;
    memset(p->held, 0, sizeof p->held), trim(p);
    if (meanwhile) ended = (int)(p - pools);
    return others_run(), CUDA_SUCCESS;
}
CUresult cuMemPoolTrimTo(CUmemoryPool h, size_t keep) { return (void)keep, trims++, trim(pool_of(h)), CUDA_SUCCESS; }
int fake_mode(void) { return mode; }
void fake_held(uint64_t n) /* freed memory of a stream that the shim has not recorded */
{
    pools[0].held[15] += n;
    pools[0].reserved = blocks(pools[0].used + all_held(&pools[0]));
}
CUresult cuMemPoolGetAttribute(CUmemoryPool h, CUmemPool_attribute a, void *v)
{
    struct pool *p = pool_of(h);
    queries++;
    errno = 43;
    unsafe += mode != CU_STREAM_CAPTURE_MODE_RELAXED;
    if (broken || !p) return CUDA_ERROR_INVALID_VALUE;
    *(cuuint64_t *)v = a == CU_MEMPOOL_ATTR_USED_MEM_CURRENT ? p->used : p->reserved;
    return CUDA_SUCCESS;
}
static unsigned long exchanges;
unsigned long fake_exchanges(void) { return exchanges; }
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *m)
{
    exchanges++;
    CUstreamCaptureMode was = mode;
    return mode = *m, *m = was, CUDA_SUCCESS;
}
CUresult cuStreamGetDevice(CUstream s, CUdevice *d)
{
    /* streams from 0x10 on are on device 1 */
    return *d = (uintptr_t)s >= 0x10 ? 1 : fake_device(), errno = 44, CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *status)
{
    asked_capturing++;
    errno = 45;
    return *status = capturing[(uintptr_t)s & 15] != NULL, CUDA_SUCCESS;
}
CUresult cuStreamBeginCapture_v2(CUstream s, CUstreamCaptureMode m)
{
    struct graph *g = &graphs[graphs_made++];
    memset(g, 0, sizeof *g);
    return capturing[(uintptr_t)s & 15] = g, (void)m, CUDA_SUCCESS;
}
CUresult cuStreamBeginRecaptureToGraph(CUstream s, CUstreamCaptureMode m, CUgraph g, void *f, void *data)
{
    return (void)g, (void)f, (void)data, cuStreamBeginCapture_v2(s, m);
}
CUresult cuStreamBeginCaptureToCig(CUstream s, void *params) { return (void)params, cuStreamBeginCapture_v2(s, 0); }
CUresult cuStreamEndCapture(CUstream s, CUgraph *g)
{
    return *g = (CUgraph)capturing[(uintptr_t)s & 15], capturing[(uintptr_t)s & 15] = NULL, CUDA_SUCCESS;
}

/* -- graphs */
void fake_child(CUgraph parent, CUgraph child)
{
    struct graph *g = (struct graph *)parent;
    g->nodes[g->count++] = (struct node){0, 0, 0, (struct graph *)child};
}
CUresult cuGraphGetNodes(CUgraph h, CUgraphNode *nodes, size_t *n)
{
    struct graph *g = (struct graph *)h;
    if (nodes)
        for (size_t i = 0; i < *n; i++) nodes[i] = i < (size_t)g->count ? (CUgraphNode)&g->nodes[i] : NULL;
    return *n = nodes && *n < (size_t)g->count ? *n : (size_t)g->count, CUDA_SUCCESS;
}
CUresult cuGraphNodeGetType(CUgraphNode h, CUgraphNodeType *t)
{
    struct node *n = (struct node *)h;
    unsafe += mode != CU_STREAM_CAPTURE_MODE_RELAXED;
    *t = n->child       ? CU_GRAPH_NODE_TYPE_GRAPH
         : n->allocates ? CU_GRAPH_NODE_TYPE_MEM_ALLOC
         : n->pointer   ? CU_GRAPH_NODE_TYPE_MEM_FREE
                        : CU_GRAPH_NODE_TYPE_KERNEL;
    return CUDA_SUCCESS;
}
CUresult cuGraphChildGraphNodeGetGraph(CUgraphNode h, CUgraph *g)
{
    return *g = (CUgraph)((struct node *)h)->child, CUDA_SUCCESS;
}
CUresult cuGraphMemAllocNodeGetParams(CUgraphNode h, CUDA_MEM_ALLOC_NODE_PARAMS *p)
{
    struct node *n = (struct node *)h;
    memset(p, 0, sizeof *p);
    p->poolProps.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    p->poolProps.location.id = 0;
    return p->bytesize = n->bytes, p->dptr = n->pointer, CUDA_SUCCESS;
}
CUresult cuGraphMemFreeNodeGetParams(CUgraphNode h, CUdeviceptr *p)
{
    return *p = ((struct node *)h)->pointer, CUDA_SUCCESS;
}
static uint64_t round_up(uint64_t n) { return (n + (2 << 20) - 1) >> 21 << 21; }
static uint64_t peak_of(struct graph *g, uint64_t *left)
{
    uint64_t live = 0, peak = 0, more;
    for (int i = 0; i < g->count; i++) {
        if (g->nodes[i].child) live += peak_of(g->nodes[i].child, &more);
        if (g->nodes[i].allocates) live += g->nodes[i].bytes;
        if (live > peak) peak = live;
        for (int j = 0; !g->nodes[i].allocates && j < i; j++)
            if (g->nodes[j].allocates && g->nodes[j].pointer == g->nodes[i].pointer) live -= g->nodes[j].bytes;
    }
    *left = live;
    return round_up(peak);
}
static CUresult place(struct graph *g)
{
    uint64_t left, peak = peak_of(g, &left);
    if (next_result) return next_result;
    if (g->launched++) return CUDA_SUCCESS;
    if (!sharing || graph_reserved[0] < graph_kept + peak)
        graph_reserved[0] = (sharing ? graph_kept : graph_reserved[0]) + peak;
    graph_kept += round_up(left);
    return CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec *e, CUgraph g, unsigned long long flags)
{
    *e = (CUgraphExec)g;
    return flags & CUDA_GRAPH_INSTANTIATE_FLAG_UPLOAD ? place((struct graph *)g) : CUDA_SUCCESS;
}
CUresult cuGraphInstantiateWithParams(CUgraphExec *e, CUgraph g, CUDA_GRAPH_INSTANTIATE_PARAMS *p)
{
    return cuGraphInstantiateWithFlags(e, g, p->flags);
}
CUresult cuGraphInstantiate_v2(CUgraphExec *e, CUgraph g, CUgraphNode *n, char *log, size_t size)
{
    return (void)n, (void)log, (void)size, cuGraphInstantiateWithFlags(e, g, 0);
}
CUresult cuGraphExecDestroy(CUgraphExec e) { return (void)e, CUDA_SUCCESS; }
CUresult cuGraphLaunch(CUgraphExec e, CUstream s) { return (void)s, place((struct graph *)e); }
CUresult cuGraphLaunch_ptsz(CUgraphExec e, CUstream s) { return (void)s, place((struct graph *)e); }
CUresult cuGraphUpload(CUgraphExec e, CUstream s) { return (void)s, place((struct graph *)e); }
CUresult cuDeviceGetGraphMemAttribute(CUdevice d, CUgraphMem_attribute a, void *v)
{
    unsafe += mode != CU_STREAM_CAPTURE_MODE_RELAXED;
    return (void)a, *(cuuint64_t *)v = graph_reserved[d], CUDA_SUCCESS;
}
static int busy; /* graphs are running, so their memory cannot be released */
void fake_busy(int on) { busy = on; }
CUresult cuDeviceGraphMemTrim(CUdevice d)
{
    if (busy) return CUDA_SUCCESS;
    if (d < 0 || d > 2) return CUDA_ERROR_INVALID_DEVICE;
    uint64_t left;
    for (int i = 0; i < graphs_made; i++)
        if (peak_of(&graphs[i], &left) && !left) graphs[i].launched = 0;
    return graph_reserved[d] = d ? 0 : graph_kept, CUDA_SUCCESS;
}
/* Ends a context: its streams hold no freed memory any more, and pools stay. */
static void end_context(int with_graphs)
{
    for (int i = 0; i < made; i++) {
        memset(pools[i].held, 0, sizeof pools[i].held);
        if (!lazy) trim(&pools[i]);
    }
    if (!with_graphs) return;
    memset(graph_reserved, 0, sizeof graph_reserved);
    graph_kept = 0;
}
CUresult cuDevicePrimaryCtxReset_v2(CUdevice d) { return (void)d, end_context(1), CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice d) { return (void)d, end_context(1), CUDA_SUCCESS; }
CUresult cuCtxDestroy_v2(CUcontext c) { return (void)c, end_context(0), CUDA_SUCCESS; }
CUresult cuGreenCtxCreate(CUgreenCtx *c, CUdevResourceDesc r, CUdevice d, unsigned f)
{
    return *c = (CUgreenCtx)0x55, (void)r, (void)d, (void)f, CUDA_SUCCESS;
}
CUresult cuCtxSynchronize(void) { return fake_sync(), CUDA_SUCCESS; }
CUresult cuStreamSynchronize(CUstream s) { return (void)s, fake_sync(), CUDA_SUCCESS; }
CUresult cuStreamSynchronize_ptsz(CUstream s) { return (void)s, fake_sync(), CUDA_SUCCESS; }
CUresult cuEventSynchronize(CUevent e) { return (void)e, fake_sync(), CUDA_SUCCESS; }
