/* Small questions about streams, and stream capture as far as it goes: no stream here ever captures. */
#include "cuda_state.h"

static __thread CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

API cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!mode) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    CUstreamCaptureMode before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return sim_leave(CUDA_SUCCESS);
}

static CUresult is_capturing(CUstream handle, CUstreamCaptureStatus *status, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter(handle, per_thread, &context, &stream);
    if (result) return result;
    if (!status) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamIsCapturing, (CUstream hStream, CUstreamCaptureStatus *captureStatus),
      is_capturing(hStream, captureStatus, per_thread))

static CUresult capture_info(CUstream handle, CUstreamCaptureStatus *status, cuuint64_t *id, bool per_thread)
{
    CUresult result = is_capturing(handle, status, per_thread);
    if (!result && id) *id = 0;
    return result;
}

TWICE(_ptsz, cuStreamGetCaptureInfo, (CUstream hStream, CUstreamCaptureStatus *captureStatus, cuuint64_t *id),
      capture_info(hStream, captureStatus, id, per_thread))

TWICE(_ptsz, cuStreamGetCaptureInfo_v2,
      (CUstream hStream, CUstreamCaptureStatus *captureStatus, cuuint64_t *id, CUgraph *graph,
       const CUgraphNode **dependencies, size_t *count),
      ((void)graph, (void)dependencies, (void)count, capture_info(hStream, captureStatus, id, per_thread)))

TWICE(_ptsz, cuStreamGetCaptureInfo_v3,
      (CUstream hStream, CUstreamCaptureStatus *captureStatus, cuuint64_t *id, CUgraph *graph,
       const CUgraphNode **dependencies, const CUgraphEdgeData **edges, size_t *count),
      ((void)graph, (void)dependencies, (void)edges, (void)count, capture_info(hStream, captureStatus, id, per_thread)))

static CUresult get_flags(CUstream handle, unsigned *flags, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter(handle, per_thread, &context, &stream);
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
    CUresult result = stream_enter(handle, per_thread, &context, &stream);
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
    CUresult result = stream_enter(handle, per_thread, &context, &stream);
    if (result) return result;
    if (!out) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *out = (CUcontext)stream->context;
    return sim_leave(CUDA_SUCCESS);
}

TWICE(_ptsz, cuStreamGetCtx, (CUstream hStream, CUcontext *pctx), get_context(hStream, pctx, per_thread))

static CUresult get_id(CUstream handle, unsigned long long *id, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter(handle, per_thread, &context, &stream);
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
