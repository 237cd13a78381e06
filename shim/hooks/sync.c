/*
 * sync.c: the calls by which a program waits for work, queries whether it is done, begins a capture or destroys a
 * stream. Owns nothing.
 */
#include "account/pool.h"
#include "gate/gate.h"

/* -- captures: recorded when they begin, so that programs without captures need no query */

static void begins_to_capture(CUstream stream, bool per_thread)
{
    atomic_store(&fgpu_streams_captured, true);
    fgpu_stream_captures(stream, per_thread);
}

#define CAPTURE(name, per_thread, ...)                                                                                 \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        begins_to_capture(hStream, per_thread);                                                                        \
        return driver ? driver(__VA_ARGS__) : CUDA_ERROR_NOT_SUPPORTED;                                                \
    } while (0)

#define CAPTURES(name, params, ...)                                                                                    \
    EXPORT CUresult name params { CAPTURE(name, false, __VA_ARGS__); }                                                 \
    EXPORT CUresult name##_ptsz params { CAPTURE(name##_ptsz, true, __VA_ARGS__); }

CAPTURES(cuStreamBeginCapture, (CUstream hStream), hStream)
CAPTURES(cuStreamBeginCapture_v2, (CUstream hStream, CUstreamCaptureMode mode), hStream, mode)
CAPTURES(cuStreamBeginCaptureToGraph,
         (CUstream hStream, CUgraph hGraph, const CUgraphNode *dependencies, const CUgraphEdgeData *dependencyData,
          size_t numDependencies, CUstreamCaptureMode mode),
         hStream, hGraph, dependencies, dependencyData, numDependencies, mode)
CAPTURES(cuStreamBeginRecaptureToGraph,
         (CUstream hStream, CUstreamCaptureMode mode, CUgraph hGraph, CUgraphRecaptureCallback callbackFunc,
          void *userData),
         hStream, mode, hGraph, callbackFunc, userData)
CAPTURES(cuStreamBeginCaptureToCig, (CUstream hStream, CUstreamCigCaptureParams *streamCigCaptureParams), hStream,
         streamCigCaptureParams)

/* -- waiting: the driver frees memory that a pool need not keep, and other processes of the tenant may need it */

#define SYNCHRONIZE(name, rested, ...)                                                                                 \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        struct fgpu_rest rest = fgpu_rest_begin();                                                                     \
        CUresult result = driver(__VA_ARGS__);                                                                         \
        rested;                                                                                                        \
        fgpu_pools_synchronized();                                                                                     \
        return result;                                                                                                 \
    } while (0)

EXPORT CUresult cuCtxSynchronize(void) { SYNCHRONIZE(cuCtxSynchronize, fgpu_rest_context(rest, result, NULL)); }

EXPORT CUresult cuCtxSynchronize_v2(CUcontext ctx)
{
    SYNCHRONIZE(cuCtxSynchronize_v2, fgpu_rest_context(rest, result, ctx), ctx);
}

EXPORT CUresult cuStreamSynchronize(CUstream hStream)
{
    SYNCHRONIZE(cuStreamSynchronize, fgpu_rest_stream(rest, result, hStream, false), hStream);
}

EXPORT CUresult cuStreamSynchronize_ptsz(CUstream hStream)
{
    SYNCHRONIZE(cuStreamSynchronize_ptsz, fgpu_rest_stream(rest, result, hStream, true), hStream);
}

EXPORT CUresult cuEventSynchronize(CUevent hEvent)
{
    SYNCHRONIZE(cuEventSynchronize, fgpu_rest_event(rest, result, hEvent), hEvent);
}

/* -- queries that may show that nothing is in flight any more */

#define ASK_STREAM(name, per_thread)                                                                                   \
    EXPORT CUresult name(CUstream hStream)                                                                             \
    {                                                                                                                  \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        struct fgpu_rest rest = fgpu_rest_begin();                                                                     \
        CUresult result = driver(hStream);                                                                             \
        fgpu_rest_stream(rest, result, hStream, per_thread);                                                           \
        return result;                                                                                                 \
    }
ASK_STREAM(cuStreamQuery, false)
ASK_STREAM(cuStreamQuery_ptsz, true)

EXPORT CUresult cuEventQuery(CUevent hEvent)
{
    __typeof__(&cuEventQuery) driver = REAL(cuEventQuery);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    struct fgpu_rest rest = fgpu_rest_begin();
    CUresult result = driver(hEvent);
    fgpu_rest_event(rest, result, hEvent);
    return result;
}

/* -- recorded events: which work is done when an event is */

#define RECORD(name, per_thread, ...)                                                                                  \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        struct fgpu_rest rest = fgpu_rest_begin();                                                                     \
        CUresult result = driver(__VA_ARGS__);                                                                         \
        fgpu_event_recorded(rest, result, hEvent, hStream, per_thread);                                                \
        return result;                                                                                                 \
    } while (0)

#define RECORDS(name, params, ...)                                                                                     \
    EXPORT CUresult name params { RECORD(name, false, __VA_ARGS__); }                                                  \
    EXPORT CUresult name##_ptsz params { RECORD(name##_ptsz, true, __VA_ARGS__); }

RECORDS(cuEventRecord, (CUevent hEvent, CUstream hStream), hEvent, hStream)
RECORDS(cuEventRecordWithFlags, (CUevent hEvent, CUstream hStream, unsigned int flags), hEvent, hStream, flags)

#define END_STREAM(name)                                                                                               \
    EXPORT CUresult name(CUstream hStream)                                                                             \
    {                                                                                                                  \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        fgpu_stream_ends(hStream);                                                                                     \
        return driver(hStream);                                                                                        \
    }
END_STREAM(cuStreamDestroy)
END_STREAM(cuStreamDestroy_v2)
