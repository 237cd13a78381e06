/* Streams with kernels that run only together with others on other devices: when their work will be done nobody can
 * say, so the server does it, and whoever waits asks again and again. A stream becomes a lane by its first such kernel
 * and is a stream like others once all of that is done. */
#include "cuda_state.h"

#include <time.h>

#define ASK_NS 100000 /* between two questions */

static bool ask(struct context *context, uint32_t op, struct sim_request request, struct sim_lane *answer)
{
    request.device = (uint32_t)context->device;
    request.context = context->id;
    if (sim_ask(op, request, answer, sizeof *answer)) return false;
    context_lost(context, answer->at_ns, answer->lost_ns);
    return true;
}

/* True too for what nobody knows any more. */
bool lane_reached(struct context *context, uint64_t lane, uint64_t index)
{
    struct sim_lane answer;
    return !ask(context, SIM_LOOK_LANE, (struct sim_request){.lane = lane}, &answer) || answer.done >= index;
}

/* Lets go of the lock. False: the context has gone meanwhile. */
static bool rest(const struct context *context, uint64_t id)
{
    const struct timespec moment = {.tv_nsec = ASK_NS};
    sim_unlock();
    nanosleep(&moment, NULL);
    sim_lock();
    return context->alive && context->id == id;
}

void lane_wait(struct context *context, uint64_t lane, uint64_t index)
{
    uint64_t id = context->id;
    while (!lane_reached(context, lane, index) && rest(context, id))
        ;
}

/* Until nothing is left in any of the context's. */
void lanes_wait(struct context *context)
{
    uint64_t id = context->id;
    for (;;) {
        bool over = !lane_is_used(context, &context->legacy) && !lane_is_used(context, &context->per_thread);
        for (struct stream *s = context->streams; s; s = s->next) over = !lane_is_used(context, s) && over;
        if (over || !rest(context, id)) return;
    }
}

bool lane_is_used(struct context *context, struct stream *stream)
{
    if (!stream->lane_index) return false;
    if (!lane_reached(context, stream->id, stream->lane_index)) return true;
    uint64_t now = context_now(context);
    if (stream->done_ns < now) stream->done_ns = now;
    stream->lane_index = 0;
    return false;
}

/* Behind everything that the stream has. Where the queue is full it waits, as the real driver does. */
CUresult lane_queue(struct context *context, struct stream *stream, uint64_t ns, const struct party *party)
{
    uint64_t id = context->id;
    struct sim_request request = {.bytes = ns / 1000,
                                  .requested = stream->done_ns,
                                  .lane = stream->id,
                                  .key = party ? party->key : 0,
                                  .parties = party ? party->of : 0};
    for (;;) {
        struct sim_lane answer;
        if (!ask(context, SIM_QUEUE, request, &answer)) return CUDA_ERROR_UNKNOWN;
        if (answer.index == UINT64_MAX) return CUDA_ERROR_INVALID_VALUE;
        if (answer.index) {
            stream->lane_index = answer.index;
            return CUDA_SUCCESS;
        }
        if (!rest(context, id)) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    }
}
