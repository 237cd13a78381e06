/*
 * sync.c: the calls by which a program waits for work, queries whether it is done, begins a capture, creates an event
 * or destroys a stream. Owns nothing.
 */
#include "account/pool.h"
#include "gate/gate.h"
#include "link/link.h"

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

/* Define a function of a stream, and its variant for the default stream of a thread. */
#define BOTH(WAY, name, params, ...)                                                                                   \
    EXPORT CUresult name params { WAY(name, false, __VA_ARGS__); }                                                     \
    EXPORT CUresult name##_ptsz params { WAY(name##_ptsz, true, __VA_ARGS__); }

BOTH(CAPTURE, cuStreamBeginCapture, (CUstream hStream), hStream)
BOTH(CAPTURE, cuStreamBeginCapture_v2, (CUstream hStream, CUstreamCaptureMode mode), hStream, mode)
BOTH(CAPTURE, cuStreamBeginCaptureToGraph,
     (CUstream hStream, CUgraph hGraph, const CUgraphNode *dependencies, const CUgraphEdgeData *dependencyData,
      size_t numDependencies, CUstreamCaptureMode mode),
     hStream, hGraph, dependencies, dependencyData, numDependencies, mode)
BOTH(CAPTURE, cuStreamBeginRecaptureToGraph,
     (CUstream hStream, CUstreamCaptureMode mode, CUgraph hGraph, CUgraphRecaptureCallback callbackFunc,
      void *userData),
     hStream, mode, hGraph, callbackFunc, userData)
BOTH(CAPTURE, cuStreamBeginCaptureToCig, (CUstream hStream, CUstreamCigCaptureParams *streamCigCaptureParams), hStream,
     streamCigCaptureParams)

/* -- waiting: the driver frees memory that a pool need not keep, and other processes of the tenant may need it */

#define OBSERVE(name, then, ...)                                                                                       \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        struct fgpu_rest rest = fgpu_rest_begin();                                                                     \
        CUresult result = driver(__VA_ARGS__);                                                                         \
        then;                                                                                                          \
        return result;                                                                                                 \
    } while (0)

#define SYNCHRONIZE(name, rested, ...) OBSERVE(name, (rested, fgpu_pools_synchronized()), __VA_ARGS__)

#define WAIT_FOR_STREAM(name, per_thread, ...)                                                                         \
    SYNCHRONIZE(name, fgpu_rest_stream(rest, result, hStream, per_thread), __VA_ARGS__)

EXPORT CUresult cuCtxSynchronize(void) { SYNCHRONIZE(cuCtxSynchronize, fgpu_rest_context(rest, result, NULL)); }

EXPORT CUresult cuCtxSynchronize_v2(CUcontext ctx)
{
    SYNCHRONIZE(cuCtxSynchronize_v2, fgpu_rest_context(rest, result, ctx), ctx);
}

BOTH(WAIT_FOR_STREAM, cuStreamSynchronize, (CUstream hStream), hStream)

EXPORT CUresult cuEventSynchronize(CUevent hEvent)
{
    SYNCHRONIZE(cuEventSynchronize, fgpu_rest_event(rest, result, hEvent), hEvent);
}

/* -- queries that may show that nothing is in flight any more */

#define QUERY_STREAM(name, per_thread, ...)                                                                            \
    OBSERVE(name, fgpu_rest_stream(rest, result, hStream, per_thread), __VA_ARGS__)

BOTH(QUERY_STREAM, cuStreamQuery, (CUstream hStream), hStream)

EXPORT CUresult cuEventQuery(CUevent hEvent) { OBSERVE(cuEventQuery, fgpu_rest_event(rest, result, hEvent), hEvent); }

/* -- other calls that read what a device writes; while the process is parked, these end it, or fail */

#define HOLD(name, params, ...)                                                                                        \
    EXPORT CUresult name params                                                                                        \
    {                                                                                                                  \
        __typeof__(&name) driver = REAL(name);                                                                         \
        fgpu_hold();                                                                                                   \
        return driver ? driver(__VA_ARGS__) : CUDA_ERROR_NOT_SUPPORTED;                                                \
    }
HOLD(cuEventElapsedTime, (float *pMilliseconds, CUevent hStart, CUevent hEnd), pMilliseconds, hStart, hEnd)
HOLD(cuEventElapsedTime_v2, (float *pMilliseconds, CUevent hStart, CUevent hEnd), pMilliseconds, hStart, hEnd)
HOLD(cuDeviceGetName, (char *name, int len, CUdevice dev), name, len, dev)

/* -- recorded events, for the work that is done when the event is done */

#define RECORD(name, per_thread, ...)                                                                                  \
    OBSERVE(name, fgpu_event_recorded(rest, result, hEvent, hStream, per_thread), __VA_ARGS__)

BOTH(RECORD, cuEventRecord, (CUevent hEvent, CUstream hStream), hEvent, hStream)
BOTH(RECORD, cuEventRecordWithFlags, (CUevent hEvent, CUstream hStream, unsigned int flags), hEvent, hStream, flags)

/* -- new events: an event that was destroyed, alone or with its context, may have had the same handle */

#define MAKE(name, ...)                                                                                                \
    do {                                                                                                               \
        __typeof__(&name) driver = REAL(name);                                                                         \
        if (!driver) return CUDA_ERROR_NOT_SUPPORTED;                                                                  \
        CUresult result = driver(__VA_ARGS__);                                                                         \
        fgpu_event_made(result, phEvent);                                                                              \
        return result;                                                                                                 \
    } while (0)

EXPORT CUresult cuEventCreate(CUevent *phEvent, unsigned int Flags) { MAKE(cuEventCreate, phEvent, Flags); }

EXPORT CUresult cuIpcOpenEventHandle(CUevent *phEvent, CUipcEventHandle handle)
{
    MAKE(cuIpcOpenEventHandle, phEvent, handle);
}

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
