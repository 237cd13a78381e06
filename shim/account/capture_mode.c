/*
 * capture_mode.c: sets the capture mode of the thread around driver calls that the shim itself makes. Owns nothing.
 */
#include "account/account.h"

CUstreamCaptureMode fgpu_relax(void)
{
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    __typeof__(&cuThreadExchangeStreamCaptureMode) exchange = REAL(cuThreadExchangeStreamCaptureMode);
    if (!exchange || exchange(&mode) != CUDA_SUCCESS) return CU_STREAM_CAPTURE_MODE_RELAXED;
    return mode;
}

void fgpu_unrelax(CUstreamCaptureMode mode)
{
    __typeof__(&cuThreadExchangeStreamCaptureMode) exchange = REAL(cuThreadExchangeStreamCaptureMode);
    if (exchange && mode != CU_STREAM_CAPTURE_MODE_RELAXED) exchange(&mode);
}
