/* Copies and memsets, with real contents. Contents change when the call is made, since kernels change none. The
 * stream is busy for as long as the copy would take. A synchronous copy waits for that. */
#include "cuda/async/async.h"
#include "cuda/graph/graph.h"

/* Enters a call that waits for its own work. Such a call uses the default stream. A capture forbids it only if
 * the default stream cannot be used. */
static CUresult enter_waiting(bool per_thread, struct context **context, struct stream **stream)
{
    CUresult result = stream_enter_work(NULL, per_thread, context, stream);
    if (result) return result;
    if ((*stream)->capture) {
        capture_break((*stream)->capture);
        return sim_leave(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    return CUDA_SUCCESS;
}

static CUresult copy(uintptr_t to, enum side to_side, uintptr_t from, enum side from_side, size_t size, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = enter_waiting(per_thread, &context, &stream);
    if (result) return result;
    if (!size) return sim_leave(CUDA_SUCCESS);
    if (!to || !from) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct transfer transfer = {to, from, to_side, from_side, size, 1, 1, size, size, size, size};
    result = transfer_run(&transfer);
    if (!result) result = stream_copy(context, stream, transfer_ns(&transfer), transfer_engine(&transfer));
    if (!result) stream_wait(context, stream);
    return sim_leave(result);
}

static CUresult capture_copy(struct stream *stream, const struct transfer *transfer)
{
    struct node *node;
    CUresult result = capture_node(stream, CU_GRAPH_NODE_TYPE_MEMCPY, &node);
    if (!result) node->copy = *transfer;
    return result;
}

/* Does not wait: in a stream that is busy with a kernel the copy happens at once, since the kernel writes nothing. */
static CUresult copy_async(uintptr_t to, enum side to_side, uintptr_t from, enum side from_side, size_t size,
                           CUstream handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_work(handle, per_thread, &context, &stream);
    if (result) return result;
    if (!size) return sim_leave(CUDA_SUCCESS);
    if (!to || !from) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct transfer transfer = {to, from, to_side, from_side, size, 1, 1, size, size, size, size};
    if (stream->capture) return sim_leave(capture_copy(stream, &transfer));
    result = transfer_run(&transfer);
    return sim_leave(result ? result
                            : stream_copy(context, stream, transfer_ns(&transfer), transfer_engine(&transfer)));
}

TWICE(_ptds, cuMemcpy, (CUdeviceptr dst, CUdeviceptr src, size_t ByteCount),
      copy(dst, EITHER, src, EITHER, ByteCount, per_thread))
TWICE(_ptsz, cuMemcpyAsync, (CUdeviceptr dst, CUdeviceptr src, size_t ByteCount, CUstream hStream),
      copy_async(dst, EITHER, src, EITHER, ByteCount, hStream, per_thread))
TWICE(_ptds, cuMemcpyHtoD_v2, (CUdeviceptr dst, const void *src, size_t ByteCount),
      copy(dst, DEVICE, (uintptr_t)src, HOST, ByteCount, per_thread))
TWICE(_ptsz, cuMemcpyHtoDAsync_v2, (CUdeviceptr dst, const void *src, size_t ByteCount, CUstream hStream),
      copy_async(dst, DEVICE, (uintptr_t)src, HOST, ByteCount, hStream, per_thread))
TWICE(_ptds, cuMemcpyDtoH_v2, (void *dst, CUdeviceptr src, size_t ByteCount),
      copy((uintptr_t)dst, HOST, src, DEVICE, ByteCount, per_thread))
TWICE(_ptsz, cuMemcpyDtoHAsync_v2, (void *dst, CUdeviceptr src, size_t ByteCount, CUstream hStream),
      copy_async((uintptr_t)dst, HOST, src, DEVICE, ByteCount, hStream, per_thread))
TWICE(_ptds, cuMemcpyDtoD_v2, (CUdeviceptr dst, CUdeviceptr src, size_t ByteCount),
      copy(dst, DEVICE, src, DEVICE, ByteCount, per_thread))
TWICE(_ptsz, cuMemcpyDtoDAsync_v2, (CUdeviceptr dst, CUdeviceptr src, size_t ByteCount, CUstream hStream),
      copy_async(dst, DEVICE, src, DEVICE, ByteCount, hStream, per_thread))

/* Copies between contexts, and so between devices. */
TWICE(_ptds, cuMemcpyPeer,
      (CUdeviceptr dst, CUcontext dstContext, CUdeviceptr src, CUcontext srcContext, size_t ByteCount),
      ((void)dstContext, (void)srcContext, copy(dst, DEVICE, src, DEVICE, ByteCount, per_thread)))
TWICE(_ptsz, cuMemcpyPeerAsync,
      (CUdeviceptr dst, CUcontext dstContext, CUdeviceptr src, CUcontext srcContext, size_t ByteCount,
       CUstream hStream),
      ((void)dstContext, (void)srcContext, copy_async(dst, DEVICE, src, DEVICE, ByteCount, hStream, per_thread)))

static CUresult memset_sync(CUdeviceptr at, uint32_t value, size_t width, size_t n, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = enter_waiting(per_thread, &context, &stream);
    if (result) return result;
    struct fill fill = {.at = at, .value = value, .element = width, .width = n, .height = 1};
    result = fill_run(&fill);
    return sim_leave(result ? result : stream_copy(context, stream, fill_ns(&fill), ON_DEVICE));
}

static CUresult capture_fill(struct stream *stream, const struct fill *fill)
{
    struct node *node;
    CUresult result = capture_node(stream, CU_GRAPH_NODE_TYPE_MEMSET, &node);
    if (!result) node->fill = *fill;
    return result;
}

static CUresult memset_async(CUdeviceptr at, uint32_t value, size_t width, size_t n, CUstream handle, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = stream_enter_work(handle, per_thread, &context, &stream);
    if (result) return result;
    if (!n) return sim_leave(CUDA_SUCCESS);
    struct fill fill = {.at = at, .value = value, .element = width, .width = n, .height = 1};
    if (stream->capture) return sim_leave(capture_fill(stream, &fill));
    result = fill_run(&fill);
    return sim_leave(result ? result : stream_copy(context, stream, fill_ns(&fill), ON_DEVICE));
}

TWICE(_ptds, cuMemsetD8_v2, (CUdeviceptr dst, unsigned char uc, size_t N), memset_sync(dst, uc, 1, N, per_thread))
TWICE(_ptds, cuMemsetD16_v2, (CUdeviceptr dst, unsigned short us, size_t N), memset_sync(dst, us, 2, N, per_thread))
TWICE(_ptds, cuMemsetD32_v2, (CUdeviceptr dst, unsigned int ui, size_t N), memset_sync(dst, ui, 4, N, per_thread))
TWICE(_ptsz, cuMemsetD8Async, (CUdeviceptr dst, unsigned char uc, size_t N, CUstream hStream),
      memset_async(dst, uc, 1, N, hStream, per_thread))
TWICE(_ptsz, cuMemsetD16Async, (CUdeviceptr dst, unsigned short us, size_t N, CUstream hStream),
      memset_async(dst, us, 2, N, hStream, per_thread))
TWICE(_ptsz, cuMemsetD32Async, (CUdeviceptr dst, unsigned int ui, size_t N, CUstream hStream),
      memset_async(dst, ui, 4, N, hStream, per_thread))
