/* Memory that a context takes without a request: for local memory of threads, for functions that device code calls,
 * for streams and graphs, and for the page tables of registered host memory. The numbers are those of an H200 under
 * driver 580.159.04. The server computes the size of local memory. */
#include "cuda/core/driver.h"

#define LOCAL_UNIT 16u /* bytes per thread */
#define LOCAL_FIRST 1024u
#define LOCAL_MOST (1u << 19)
#define HEAP_UNIT (64u << 10)
#define HEAP_HEAD (64u << 10)    /* the measurements allow 1 byte to 2 MiB - 64 KiB */
#define MALLOC_BYTES (138 * MIB) /* for code that calls malloc, without the heap */
#define PRINTF_BYTES (62 * MIB)  /* for code that calls printf, whatever the limit is */
#define STREAM_BYTES 573440u
#define NODE_BYTES 2396u
#define FREE_NODES 175u  /* there is room for this many without another granule */
#define PAGED_BYTES 512u /* so many bytes of host memory need one byte of page tables */

void growth_begins(struct context *context) { context->growth = (struct growth){.local = LOCAL_FIRST}; }

static uint64_t round_up(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

/* The measured amounts are up to half a granule more or less than the exact need. Full granules are within that. */
static uint64_t full_granules(uint64_t bytes) { return bytes / GRANULE * GRANULE; }

/* Changes a context's memory of a kind from `*has` bytes to `bytes`. */
static CUresult resize(struct context *context, enum sim_kind kind, uint64_t *has, uint64_t bytes)
{
    CUresult result = CUDA_SUCCESS;
    if (bytes > *has)
        result = sim_take(context, context->device, kind, bytes - *has, 0);
    else if (bytes < *has)
        sim_give(context, context->device, kind, *has - bytes, 0);
    if (!result) *has = bytes;
    return result;
}

static CUresult grow(struct context *context, enum sim_kind kind, uint64_t *has, uint64_t bytes)
{
    return bytes > *has ? resize(context, kind, has, bytes) : CUDA_SUCCESS;
}

static CUresult set_local(struct context *context, uint64_t bytes)
{
    struct sim_request request = {.device = (uint32_t)context->device, .context = context->id, .bytes = bytes};
    CUresult result = sim_result(sim_ask(SIM_SET_LOCAL, request, NULL, 0));
    if (!result) context->growth.local = bytes;
    return result;
}

static CUresult limit_stack(struct context *context, size_t value)
{
    if (value > LOCAL_MOST) return CUDA_ERROR_INVALID_VALUE;
    uint64_t bytes = round_up(value, LOCAL_UNIT);
    CUresult result = bytes == context->growth.local ? CUDA_SUCCESS : set_local(context, bytes);
    if (!result) context->limits[CU_LIMIT_STACK_SIZE] = bytes;
    return result;
}

/* The limit of the stack takes effect at once. Those of the heap and of printf can be set until their first use. */
CUresult growth_limit(struct context *context, CUlimit limit, size_t value)
{
    bool is_late = (limit == CU_LIMIT_MALLOC_HEAP_SIZE && context->growth.has_heap) ||
                   (limit == CU_LIMIT_PRINTF_FIFO_SIZE && context->growth.has_printed);
    if (is_late || value > 1ull << 46) return CUDA_ERROR_INVALID_VALUE;
    if (limit == CU_LIMIT_STACK_SIZE) return limit_stack(context, value);
    context->limits[limit] = limit == CU_LIMIT_MALLOC_HEAP_SIZE ? round_up(value, HEAP_UNIT) : value;
    return CUDA_SUCCESS;
}

static CUresult take_once(struct context *context, bool *has, bool is_needed, uint64_t bytes)
{
    if (*has || !is_needed) return CUDA_SUCCESS;
    CUresult result = sim_take(context, context->device, SIM_RUNTIME, bytes, 0);
    *has = !result;
    return result;
}

/* Called before code is loaded. */
CUresult growth_code(struct context *context, bool has_malloc, bool has_printf)
{
    struct growth *growth = &context->growth;
    CUresult result = take_once(context, &growth->has_malloc, has_malloc, MALLOC_BYTES);
    return result ? result : take_once(context, &growth->has_printf, has_printf, PRINTF_BYTES);
}

static CUresult take_heap(struct context *context, bool is_needed)
{
    uint64_t bytes = round_up(context->limits[CU_LIMIT_MALLOC_HEAP_SIZE] + HEAP_HEAD, GRANULE);
    CUresult result = take_once(context, &context->growth.has_heap, is_needed, bytes);
    return result == CUDA_ERROR_OUT_OF_MEMORY ? CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES : result;
}

/* Called before a kernel runs. */
CUresult growth_launch(struct context *context, const struct needs *needs)
{
    CUresult result = needs->local > context->growth.local ? set_local(context, needs->local) : CUDA_SUCCESS;
    if (!result) result = take_heap(context, needs->heap);
    if (!result && needs->printer) context->growth.has_printed = true;
    return result;
}

CUresult growth_stream(struct context *context)
{
    struct growth *growth = &context->growth;
    uint64_t bytes = full_granules((growth->streams + 1) * STREAM_BYTES);
    CUresult result = grow(context, SIM_LAUNCH, &growth->stream_bytes, bytes);
    growth->streams += !result;
    return result;
}

void growth_stream_ends(struct context *context) { context->growth.streams--; }

CUresult growth_nodes(struct context *context, uint64_t n)
{
    struct growth *growth = &context->growth;
    uint64_t nodes = growth->nodes + n, paid = nodes > FREE_NODES ? nodes - FREE_NODES : 0;
    CUresult result = grow(context, SIM_LAUNCH, &growth->node_bytes, full_granules(paid * NODE_BYTES));
    if (!result) growth->nodes = nodes;
    return result;
}

void growth_nodes_end(struct context *context, uint64_t n) { context->growth.nodes -= n; }

static CUresult set_registered(struct context *context, uint64_t bytes)
{
    struct growth *growth = &context->growth;
    CUresult result = resize(context, SIM_PAGES, &growth->page_bytes, full_granules(bytes / PAGED_BYTES));
    if (!result) growth->registered = bytes;
    return result;
}

CUresult growth_register(struct context *context, uint64_t bytes)
{
    return set_registered(context, context->growth.registered + bytes);
}

void growth_unregister(struct context *context, uint64_t bytes)
{
    set_registered(context, context->growth.registered - bytes);
}
