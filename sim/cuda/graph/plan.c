/* The duration of a graph's nodes, and the times in which its kernels have the device during a launch. */
#include "cuda/graph/graph.h"
#include "cuda/stream/stream.h"

#include <stdlib.h>

uint64_t node_ns(const struct node *node)
{
    switch (node->type) {
    case CU_GRAPH_NODE_TYPE_KERNEL:
        return node->kernel.run.ns;
    case CU_GRAPH_NODE_TYPE_MEMCPY:
        return transfer_ns(&node->copy);
    case CU_GRAPH_NODE_TYPE_MEMSET:
        return fill_ns(&node->fill);
    default:
        return 0;
    }
}

static int compare_start(const void *a, const void *b)
{
    const struct node *one = a, *other = b;
    uint64_t from = one->until - one->kernel.run.ns, other_from = other->until - other->kernel.run.ns;
    return (from > other_from) - (from < other_from);
}

CUresult plan_make(struct plan *plan, const struct node *ops, size_t n_ops)
{
    size_t n = 0;
    struct node *kernels = calloc(n_ops + 1, sizeof *kernels);
    if (!kernels) return CUDA_ERROR_OUT_OF_MEMORY;
    for (size_t i = 0; i < n_ops; i++)
        if (ops[i].type == CU_GRAPH_NODE_TYPE_KERNEL && ops[i].kernel.run.ns) kernels[n++] = ops[i];
    qsort(kernels, n, sizeof *kernels, compare_start);
    for (size_t i = 0; i < n; i++) {
        struct span *last = plan->n ? &plan->spans[plan->n - 1] : NULL;
        uint64_t from = kernels[i].until - kernels[i].kernel.run.ns;
        if (!last || (from > last->until && plan->n < MAX_SPANS))
            plan->spans[plan->n++] = (struct span){from, kernels[i].until};
        else if (kernels[i].until > last->until)
            last->until = kernels[i].until;
    }
    free(kernels);
    return CUDA_SUCCESS;
}

CUresult plan_run(const struct plan *plan, struct context *context, struct stream *stream)
{
    if (queue_is_used(context, stream)) return queue_add(context, stream, plan->ns, NULL);
    uint64_t base = context_start(context, stream_ready(context, stream));
    for (size_t i = 0; i < plan->n; i++) {
        const struct span *span = &plan->spans[i];
        uint64_t done = context_work(context, span->until - span->from, base + span->from);
        if (done > base + span->until) base = done - span->until;
    }
    stream->done_ns = base + plan->ns;
    return CUDA_SUCCESS;
}
