/* Memory of graphs. All allocation nodes of a device use one reserve. It grows when a launch needs more, and does
 * not shrink by itself. Work that cannot run at the same time shares it. Memory that was not freed keeps its part.
 * Only a trim, or the end of the last context, releases the reserve. */
#include "cuda/graph/graph.h"

#include <stdlib.h>

struct reserve {
    uint64_t reserved, reserved_high, used_high;
};

static struct reserve reserves[SIM_MAX_DEVICES];
static struct graph_memory *memories;

static uint64_t round_up(uint64_t bytes, uint64_t step) { return (bytes + step - 1) / step * step; }

static struct graph_memory *find(uintptr_t at)
{
    for (struct graph_memory *m = memories; m; m = m->next)
        if (m->range->start == at) return m;
    return NULL;
}

/* Memory that a launch has left belongs to the program until the program frees it. */
void graph_memory_drop(struct graph_memory *memory)
{
    if (--memory->refs || memory->range->is_live) return;
    struct graph_memory **at = &memories;
    while (*at != memory) at = &(*at)->next;
    *at = memory->next;
    range_drop(memory->range);
    free(memory);
}

/* Called by the program's cuMemFree or cuMemFreeAsync. */
static CUresult free_range(struct range *range)
{
    struct graph_memory *memory = find(range->start);
    if (!memory || !memory->range->is_live || memory->freed_inside) return CUDA_ERROR_INVALID_VALUE;
    memory->range->is_live = false;
    memory->refs++;
    graph_memory_drop(memory);
    return CUDA_SUCCESS;
}

CUresult graph_memory_new(struct graph *owner, int device, size_t size, struct graph_memory **out)
{
    const struct sim_device *d = &driver.devices[device];
    if (size > d->memory_total - d->memory_reserved) return CUDA_ERROR_OUT_OF_MEMORY;
    size_t span = round_up(size, GRANULE);
    struct graph_memory *memory = calloc(1, sizeof *memory);
    uintptr_t start = memory ? space_reserve(span, GRANULE, false) : 0;
    struct range *range = start ? range_new(&driver.primary[device], start, size) : NULL;
    if (!range) {
        if (start) space_return(start, span);
        free(memory);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    range->kind = RANGE_GRAPH;
    range->free = free_range;
    range->span = span;
    range->device = device;
    *memory = (struct graph_memory){
        .range = range, .size = span, .device = device, .refs = 1, .owner = owner, .next = memories};
    memories = memory;
    *out = memory;
    return CUDA_SUCCESS;
}

/* An allocation is freed inside its own graph or outside it, not both, and by one node of a graph. */
CUresult graph_memory_node_free(struct graph *graph, uintptr_t at, struct graph_memory **out)
{
    struct graph_memory *memory = find(at);
    if (!memory || memory->freed_inside) return CUDA_ERROR_INVALID_VALUE;
    bool own = memory->owner == graph;
    if (own && memory->freed_elsewhere) return CUDA_ERROR_INVALID_VALUE;
    for (const struct node *n = graph->nodes; n; n = n->next)
        if (n->type == CU_GRAPH_NODE_TYPE_MEM_FREE && n->memory == memory) return CUDA_ERROR_INVALID_VALUE;
    if (own)
        memory->freed_inside = true;
    else
        memory->freed_elsewhere = true;
    *out = memory;
    return CUDA_SUCCESS;
}

static uint64_t live_bytes(int device)
{
    uint64_t sum = 0;
    for (const struct graph_memory *m = memories; m; m = m->next)
        if (m->range->is_live && m->device == device) sum += m->size;
    return sum;
}

static uint64_t needed(int device, uint64_t running) { return round_up(live_bytes(device) + running, POOL_STEP); }

/* Called after memory was marked as running or live. Takes all missing bytes, or none. */
CUresult graph_memory_reserve(int device, uint64_t running)
{
    struct reserve *reserve = &reserves[device];
    uint64_t bytes = needed(device, running);
    if (bytes > reserve->reserved) {
        uint64_t more = bytes - reserve->reserved;
        CUresult result = sim_take(NULL, device, SIM_GRAPH, more, more);
        if (result) return result;
        reserve->reserved = bytes;
    }
    if (reserve->reserved > reserve->reserved_high) reserve->reserved_high = reserve->reserved;
    if (reserve->reserved > reserve->used_high) reserve->used_high = reserve->reserved;
    return CUDA_SUCCESS;
}

static void shrink(int device, uint64_t to)
{
    struct reserve *reserve = &reserves[device];
    if (reserve->reserved <= to) return;
    sim_give(NULL, device, SIM_GRAPH, reserve->reserved - to, reserve->reserved - to);
    reserve->reserved = to;
}

void graph_memory_trim(int device, uint64_t running) { shrink(device, needed(device, running)); }

/* No graph runs any more, and the program can no longer free memory by its address. */
void graph_memory_end(int device)
{
    for (struct graph_memory *next, *m = memories; m; m = next) {
        next = m->next;
        if (m->device != device || !m->range->is_live) continue;
        m->range->is_live = false;
        m->refs++;
        graph_memory_drop(m);
    }
    shrink(device, 0);
}

API cuDeviceGetGraphMemAttribute(CUdevice device, CUgraphMem_attribute attr, void *value)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!sim_is_device(device)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    if (!value) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    const struct reserve *reserve = &reserves[device];
    switch (attr) {
    case CU_GRAPH_MEM_ATTR_USED_MEM_HIGH:
        *(cuuint64_t *)value = reserve->used_high;
        break;
    case CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT: /* everything that is reserved, freed or not, as the real driver counts */
    case CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT:
        *(cuuint64_t *)value = reserve->reserved;
        break;
    case CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH:
        *(cuuint64_t *)value = reserve->reserved_high;
        break;
    default:
        result = CUDA_ERROR_INVALID_VALUE;
    }
    return sim_leave(result);
}

/* A high-water mark can only be reset to the present amount. */
API cuDeviceSetGraphMemAttribute(CUdevice device, CUgraphMem_attribute attr, void *value)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!sim_is_device(device)) return sim_leave(CUDA_ERROR_INVALID_DEVICE);
    if (!value || *(cuuint64_t *)value) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct reserve *reserve = &reserves[device];
    if (attr == CU_GRAPH_MEM_ATTR_USED_MEM_HIGH)
        reserve->used_high = reserve->reserved;
    else if (attr == CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH)
        reserve->reserved_high = reserve->reserved;
    else
        result = CUDA_ERROR_INVALID_VALUE;
    return sim_leave(result);
}
