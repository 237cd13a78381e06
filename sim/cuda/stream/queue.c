/* Streams with kernels that run only together with kernels on other devices. The end of their work cannot be
 * computed in advance. The server therefore does the work, and a waiting thread sends requests to the server
 * repeatedly. A stream becomes a queue with its first such kernel, and an ordinary stream again when all of its work is
 * done. */
#include "cuda/stream/stream.h"

#include <time.h>

#define ASK_NS 100000 /* between two requests of a waiting thread */

static bool ask(struct context *context, uint32_t op, struct sim_request request, struct sim_queue *answer)
{
    request.device = (uint32_t)context->device;
    request.context = context->id;
    if (sim_ask(op, request, answer, sizeof *answer)) return false;
    context_lost(context, answer->at_ns, answer->lost_ns);
    return true;
}

/* Also returns true if the server has no such queue any more. */
bool queue_reached(struct context *context, uint64_t queue, uint64_t index, uint64_t *done_ns)
{
    struct sim_queue answer = {0};
    struct sim_request request = {.queue = queue, .requested = index};
    bool is_done = !ask(context, SIM_LOOK_QUEUE, request, &answer) || answer.done >= index;
    if (done_ns) *done_ns = answer.done_ns ? answer.done_ns : context_now(context);
    return is_done;
}

/* Releases the lock for a moment. Returns false if the context has ended meanwhile. */
static bool rest(const struct context *context, uint64_t id)
{
    const struct timespec moment = {.tv_nsec = ASK_NS};
    sim_unlock();
    nanosleep(&moment, NULL);
    sim_lock();
    return context->alive && context->id == id;
}

void queue_wait(struct context *context, uint64_t queue, uint64_t index)
{
    uint64_t id = context->id;
    while (!queue_reached(context, queue, index, NULL) && rest(context, id))
        ;
}

void queues_wait(struct context *context)
{
    uint64_t id = context->id;
    for (;;) {
        bool over = !queue_is_used(context, &context->legacy) && !queue_is_used(context, &context->per_thread);
        for (struct stream *s = context->streams; s; s = s->next) over = !queue_is_used(context, s) && over;
        if (over || !rest(context, id)) return;
    }
}

bool queue_is_used(struct context *context, struct stream *stream)
{
    if (!stream->queue_index) return false;
    if (!queue_reached(context, stream->id, stream->queue_index, NULL)) return true;
    uint64_t now = context_now(context);
    if (stream->done_ns < now) stream->done_ns = now;
    stream->queue_index = 0;
    return false;
}

/* Waits while the queue is full, as the real driver does. */
CUresult queue_add(struct context *context, struct stream *stream, uint64_t ns, const struct party *party)
{
    uint64_t id = context->id;
    struct sim_request request = {.bytes = ns / 1000,
                                  .requested = stream->done_ns,
                                  .queue = stream->id,
                                  .key = party ? party->key : 0,
                                  .parties = party ? party->of : 0};
    for (;;) {
        struct sim_queue answer;
        if (!ask(context, SIM_QUEUE, request, &answer)) return CUDA_ERROR_UNKNOWN;
        if (answer.index == UINT64_MAX) return CUDA_ERROR_INVALID_VALUE;
        if (answer.index) {
            stream->queue_index = answer.index;
            return CUDA_SUCCESS;
        }
        if (!rest(context, id)) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    }
}
