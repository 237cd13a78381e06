/* Waiting for a stream, and queries whether its work is done. */
#include "cuda/async/pool.h"
#include "cuda/core/gate.h"
#include "cuda/stream/stream.h"

/* Enters a wait or a query. Both need a stream that does not capture, and are potentially unsafe even then. */
static CUresult enter_done(CUstream handle, bool per_thread, struct context **context, struct stream **stream)
{
    gate_read_completion();
    CUresult result = stream_enter_any_work(handle, per_thread, context, stream);
    if (result) return result;
    if ((*stream)->capture) {
        capture_break((*stream)->capture);
        return sim_leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    result = capture_permits();
    return result ? sim_leave(result) : CUDA_SUCCESS;
}

static CUresult synchronize(CUstream handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = enter_done(handle, per_thread, &context, &stream);
    if (result) return result;
    stream_wait(context, stream);
    pools_settle(context, stream);
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamSynchronize, (CUstream hStream), synchronize(hStream, per_thread))

static CUresult query(CUstream handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = enter_done(handle, per_thread, &context, &stream);
    if (result) return result;
    bool done = !queue_is_used(context, stream) && context_reached(context, stream->done_ns);
    return sim_leave(done ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY);
}

TWICE(_ptsz, cuStreamQuery, (CUstream hStream), query(hStream, per_thread))
