/* Copies and memsets, with real contents. They happen when they are called, since kernels change nothing, but keep
 * their stream busy for as long as they should take; a synchronous copy is waited for. */
#include "cuda_graph.h"

#include <string.h>

#define HOST_GBPS 50 /* bytes a nanosecond: a bus of the fifth generation */
#define DEVICE_GBPS 2000

struct place {
    uint8_t *bytes; /* NULL: contents are not kept */
    bool valid;
};

/* A range must be inside one allocation from end to end; mapped memory must have been given access. */
static struct place find_place(uintptr_t at, size_t size, enum side side)
{
    if (side == HOST) return (struct place){(uint8_t *)at, at != 0};
    struct range *range = range_find(at);
    if (!range || at + size > range->start + range->size || at + size < at) return (struct place){NULL, false};
    if (range->kind == RANGE_MAPPED && !(range->access & CU_MEM_ACCESS_FLAGS_PROT_READ))
        return (struct place){NULL, false};
    managed_touch(range, at, size);
    return (struct place){range_touch(range, at, size), true};
}

/* Mapped memory may be one array in a program's eyes and several ranges here. */
static CUresult copy_pieces(uintptr_t to, enum side to_side, uintptr_t from, enum side from_side, size_t size)
{
    while (size) {
        size_t piece = size;
        const struct range *ranges[2] = {to_side == HOST ? NULL : range_find(to),
                                         from_side == HOST ? NULL : range_find(from)};
        uintptr_t starts[2] = {to, from};
        for (int i = 0; i < 2; i++) {
            if (!ranges[i]) continue;
            size_t rest = ranges[i]->start + ranges[i]->size - starts[i];
            if (ranges[i]->kind == RANGE_MAPPED && rest < piece) piece = rest;
        }
        struct place target = find_place(to, piece, to_side), source = find_place(from, piece, from_side);
        if (!target.valid || !source.valid) return CUDA_ERROR_INVALID_VALUE;
        if (target.bytes && source.bytes)
            memmove(target.bytes, source.bytes, piece);
        else if (target.bytes)
            memset(target.bytes, 0, piece);
        to += piece;
        from += piece;
        size -= piece;
    }
    return CUDA_SUCCESS;
}

CUresult transfer_run(const struct transfer *t)
{
    for (size_t z = 0; z < t->depth; z++) {
        for (size_t y = 0; y < t->height; y++) {
            CUresult result = copy_pieces(t->to + z * t->to_slice + y * t->to_pitch, t->to_side,
                                          t->from + z * t->from_slice + y * t->from_pitch, t->from_side, t->width);
            if (result) return result;
        }
    }
    return CUDA_SUCCESS;
}

static enum engine engine_of(const struct transfer *t)
{
    enum side to = t->to_side == EITHER && !range_find(t->to) ? HOST : t->to_side;
    enum side from = t->from_side == EITHER && !range_find(t->from) ? HOST : t->from_side;
    return from == HOST ? TO_DEVICE : to == HOST ? FROM_DEVICE : ON_DEVICE;
}

uint64_t transfer_ns(const struct transfer *t)
{
    uint64_t bytes = t->width * (t->height ? t->height : 1) * (t->depth ? t->depth : 1);
    return bytes / (engine_of(t) == ON_DEVICE ? DEVICE_GBPS : HOST_GBPS);
}

uint64_t fill_ns(const struct fill *f) { return f->element * f->width * (f->height ? f->height : 1) / DEVICE_GBPS; }

/* What waits for its own work goes by the default stream; only where that one is unusable does a capture mind. */
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
    result = copy_pieces(to, to_side, from, from_side, size);
    if (!result) result = stream_copy(context, stream, transfer_ns(&transfer), engine_of(&transfer));
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

/* Waits for nothing: a stream that is busy with a kernel takes the copy at once, since the kernel writes nothing. */
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
    return sim_leave(result ? result : stream_copy(context, stream, transfer_ns(&transfer), engine_of(&transfer)));
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

/* Between contexts, and so between devices. */
TWICE(_ptds, cuMemcpyPeer,
      (CUdeviceptr dst, CUcontext dstContext, CUdeviceptr src, CUcontext srcContext, size_t ByteCount),
      ((void)dstContext, (void)srcContext, copy(dst, DEVICE, src, DEVICE, ByteCount, per_thread)))
TWICE(_ptsz, cuMemcpyPeerAsync,
      (CUdeviceptr dst, CUcontext dstContext, CUdeviceptr src, CUcontext srcContext, size_t ByteCount,
       CUstream hStream),
      ((void)dstContext, (void)srcContext, copy_async(dst, DEVICE, src, DEVICE, ByteCount, hStream, per_thread)))

static void fill(uint8_t *to, uint32_t value, size_t width, size_t n)
{
    if (width == 1) {
        memset(to, (int)(uint8_t)value, n);
        return;
    }
    for (size_t i = 0; i < n; i++) memcpy(to + i * width, &value, width);
}

static CUresult set(CUdeviceptr at, uint32_t value, size_t width, size_t n)
{
    size_t size;
    if (!n) return CUDA_SUCCESS;
    if (__builtin_mul_overflow(n, width, &size) || at % width) return CUDA_ERROR_INVALID_VALUE;
    struct range *range = range_find(at);
    if (!range || at + size > range->start + range->size || at + size < at) return CUDA_ERROR_INVALID_VALUE;
    /* Zeroing memory that nobody has written would only make it cost something. */
    if (!value && !range->block && range->span && range->kind == RANGE_DEVICE && at - range->start >= range->backed)
        return CUDA_SUCCESS;
    managed_touch(range, at, size);
    uint8_t *to = range_touch(range, at, size);
    if (to) fill(to, value, width, n);
    return CUDA_SUCCESS;
}

CUresult fill_run(const struct fill *f)
{
    for (size_t y = 0; y < f->height; y++) {
        CUresult result = set(f->at + y * f->pitch, f->value, f->element, f->width);
        if (result) return result;
    }
    return CUDA_SUCCESS;
}

static CUresult memset_sync(CUdeviceptr at, uint32_t value, size_t width, size_t n, bool per_thread)
{
    struct context *context;
    struct stream *stream;
    CUresult result = enter_waiting(per_thread, &context, &stream);
    if (result) return result;
    result = set(at, value, width, n);
    return sim_leave(result ? result : stream_copy(context, stream, n * width / DEVICE_GBPS, ON_DEVICE));
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
