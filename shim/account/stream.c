/*
 * stream.c: facts about streams: whether a stream captures, and its device. Owns a record of the devices on which this
 * process has contexts, of the threads' numbers, and whether the program has ever begun a capture.
 */
#include <errno.h>

#include "account/stream.h"

_Atomic int fgpu_sole_device;
_Atomic bool fgpu_streams_captured;
__thread uint64_t fgpu_thread_key __attribute__((tls_model("initial-exec")));

void fgpu_device_seen(CUdevice ordinal)
{
    int none = 0, its = ordinal + 1;
    if (atomic_load(&fgpu_sole_device) == its || atomic_compare_exchange_strong(&fgpu_sole_device, &none, its)) return;
    atomic_store(&fgpu_sole_device, -1);
}

/* Give this thread an odd number, which no handle is. */
COLD uint64_t fgpu_number_thread(void)
{
    static _Atomic uint64_t last = 0x101;
    return fgpu_thread_key = atomic_fetch_add(&last, 2) + 2;
}

bool fgpu_ask_capturing(CUstream stream, bool per_thread)
{
    __typeof__(&cuStreamIsCapturing) ask = per_thread ? REAL(cuStreamIsCapturing_ptsz) : REAL(cuStreamIsCapturing);
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
    int saved = errno;
    CUresult result = ask ? ask(stream, &status) : CUDA_ERROR_NOT_SUPPORTED;
    errno = saved;
    /* This is the legacy stream while another stream captures. Using it would fail, and could break that capture. */
    if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) return true;
    return result == CUDA_SUCCESS && status != CU_STREAM_CAPTURE_STATUS_NONE;
}

bool fgpu_ask_device_of(CUstream stream, bool per_thread, CUdevice *ordinal)
{
    __typeof__(&cuStreamGetDevice) ask = per_thread ? REAL(cuStreamGetDevice_ptsz) : REAL(cuStreamGetDevice);
    int saved = errno;
    bool known = ask && ask(stream, ordinal) == CUDA_SUCCESS;
    errno = saved;
    return known || fgpu_current(ordinal);
}
