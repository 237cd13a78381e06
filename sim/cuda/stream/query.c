/* Queries of streams. */
#include "cuda/stream/stream.h"

static CUresult get_flags(CUstream handle, unsigned *flags, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_any(handle, per_thread, &context, &stream);
    if (result) return result;
    if (!flags) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *flags = stream->flags;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamGetFlags, (CUstream hStream, unsigned int *flags), get_flags(hStream, flags, per_thread))

static CUresult get_priority(CUstream handle, int *priority, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_any(handle, per_thread, &context, &stream);
    if (result) return result;
    if (!priority) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *priority = stream->priority;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamGetPriority, (CUstream hStream, int *priority), get_priority(hStream, priority, per_thread))

static CUresult get_context(CUstream handle, CUcontext *out, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_any(handle, per_thread, &context, &stream);
    if (result) return result;
    if (!out) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *out = (CUcontext)stream->context;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamGetCtx, (CUstream hStream, CUcontext *pctx), get_context(hStream, pctx, per_thread))

/* On a capturing stream this is refused like the query whether its work is done. */
static CUresult get_device(CUstream handle, CUdevice *device, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_any_work(handle, per_thread, &context, &stream);
    if (result) return result;
    if (stream->capture) {
        capture_break(stream->capture);
        return sim_leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    if (!device) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *device = context->device;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamGetDevice, (CUstream hStream, CUdevice *device), get_device(hStream, device, per_thread))

static CUresult get_id(CUstream handle, unsigned long long *id, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_any(handle, per_thread, &context, &stream);
    if (result) return result;
    if (!id) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *id = stream->id;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamGetId, (CUstream hStream, unsigned long long *streamId), get_id(hStream, streamId, per_thread))

static CUresult get_contexts(CUstream handle, CUcontext *out, CUgreenCtx *green, bool per_thread)
{
    if (green) *green = NULL;
    return get_context(handle, out, per_thread);
}

TWICE(_ptsz, cuStreamGetCtx_v2, (CUstream hStream, CUcontext *pCtx, CUgreenCtx *pGreenCtx),
      get_contexts(hStream, pCtx, pGreenCtx, per_thread))
