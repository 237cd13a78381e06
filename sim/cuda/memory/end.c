/* The end of a context's ranges and granules. */
#include "cuda/memory/memory.h"

#include <stdlib.h>

/* The server frees a context's memory as a whole. This only clears the state of the process. */
void ranges_end(struct context *context)
{
    struct range *next;
    for (struct range *range = context->ranges; range; range = next) {
        next = range->next;
        /* Mapped memory and pools belong to the process and outlive the context, and so does the memory of graphs. */
        if (range->kind == RANGE_MAPPED || range->kind == RANGE_POOL || range->kind == RANGE_GRAPH) continue;
        if (range->kind == RANGE_IPC) ipc_forget(range);
        if (range->kind == RANGE_MANAGED)
            managed_drop(range);
        else
            range_drop(range);
    }
    while (context->blocks) {
        struct block *block = context->blocks;
        context->blocks = block->next;
        space_return(block->start, GRANULE);
        free(block);
    }
}
