/* The end of a context. */
#include "cuda/async/async.h"
#include "cuda/context/context.h"
#include "cuda/graph/graph.h"

/* The order matters. The contents of the context are freed first, while the server still has the context, and then the
 * context with all that is left in it. Pools and their allocations belong to the process. */
void context_stop(struct context *context)
{
    peers_end(context);
    libraries_end(context);
    modules_end(context);
    captures_end(context);
    streams_end(context);
    events_end(context);
    arrays_end(context);
    ranges_end(context);
    context->alive = false;
    sim_ask(SIM_CLOSE, (struct sim_request){.device = (uint32_t)context->device, .context = context->id}, NULL, 0);
    bool last = true;
    for (const struct context *c = driver.contexts; c; c = c->next)
        last = last && !(c->alive && c->device == context->device);
    if (last) graph_memory_end(context->device);
}
