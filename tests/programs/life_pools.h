/* life_pools.h: the part of life.c that allocates memory in streams and in graphs. Only life.c includes this file. */

static __thread CUstream stream; /* one for each thread, because the default stream cannot be captured */

static size_t pooled_size(struct life *life) { return 1 + draw(life, 1ULL << (10 + draw(life, 16))); }

static CUstream some_stream(struct life *life) { return draw(life, 2) ? stream : NULL; }

/* Waits for all work that the calling thread has in streams. A real driver (580.159, without agent and shim too)
 * crashes in cuCtxSynchronize if another thread captures a graph during the call. */
static void synchronize(void)
{
    if (!is_real()) {
        cu.cuCtxSynchronize();
        return;
    }
    cu.cuStreamSynchronize(stream);
    cu.cuStreamSynchronize(NULL);
}

/* A real driver (580.159, without agent and shim too) crashes, or never returns from a synchronisation, after a pool
 * with memory in use was destroyed. */
static bool can_be_destroyed(CUmemoryPool pool)
{
    cuuint64_t used = 0;
    if (!is_real()) return true;
    synchronize();
    return !cu.cuMemPoolGetAttribute(pool, CU_MEMPOOL_ATTR_USED_MEM_CURRENT, &used) && !used;
}

static void own_pool(struct life *life)
{
    CUmemPoolProps props = {.allocType = CU_MEM_ALLOCATION_TYPE_PINNED,
                            .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = life->device}};
    if (life->pool && draw(life, 2)) {
        if (!can_be_destroyed(life->pool)) return;
        cu.cuMemPoolDestroy(life->pool); /* its memory in use is released at the free */
        life->pool = NULL;
    } else if (!life->pool && took(cu.cuMemPoolCreate(&life->pool, &props))) {
        cuuint64_t keep = draw(life, 3) * 64 << 20;
        cu.cuMemPoolSetAttribute(life->pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &keep);
    }
}

static void take_pooled(struct life *life, struct slot *slot)
{
    CUresult result;
    if (life->pool && draw(life, 2))
        result = cu.cuMemAllocFromPoolAsync(&slot->pointer, pooled_size(life), life->pool, some_stream(life));
    else
        result = cu.cuMemAllocAsync(&slot->pointer, pooled_size(life), some_stream(life));
    if (took(result)) slot->kind = POOLED;
}

static void give_pooled(struct life *life, struct slot *slot)
{
    if (draw(life, 4))
        cu.cuMemFreeAsync(slot->pointer, some_stream(life));
    else
        cu.cuMemFree_v2(slot->pointer);
}

/* Runs a graph that allocates memory. Either the graph frees the memory at its end, or the program does later. */
static void run_graph(struct life *life, struct slot *slot)
{
    CUgraph graph = NULL;
    CUgraphExec exec = NULL;
    bool leaves = draw(life, 2);
    if (cu.cuStreamBeginCapture_v2(stream, CU_STREAM_CAPTURE_MODE_RELAXED)) return;
    CUresult result = cu.cuMemAllocAsync(&slot->pointer, pooled_size(life), stream);
    if (!result && !leaves) result = cu.cuMemFreeAsync(slot->pointer, stream);
    if (cu.cuStreamEndCapture(stream, &graph) || result) return;
    if (!cu.cuGraphInstantiateWithFlags(&exec, graph, 0)) {
        if (took(cu.cuGraphLaunch(exec, stream)) && leaves) slot->kind = POOLED;
        cu.cuStreamSynchronize(stream);
        cu.cuGraphExecDestroy(exec);
    }
    cu.cuGraphDestroy(graph);
    if (!draw(life, 4)) cu.cuDeviceGraphMemTrim(life->device);
}

static void take_in_stream(struct life *life, struct slot *slot)
{
    CUmemoryPool pool;
    switch (draw(life, 16)) {
    case 0:
        own_pool(life);
        return;
    case 1:
        if (!cu.cuDeviceGetDefaultMemPool(&pool, life->device)) cu.cuMemPoolTrimTo(pool, draw(life, 256) << 20);
        return;
    case 2:
        synchronize();
        return;
    case 3:
        run_graph(life, slot);
        return;
    default:
        take_pooled(life, slot);
    }
}
