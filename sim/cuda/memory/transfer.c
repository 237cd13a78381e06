/* Copies and memsets of contents, and how long they take. */
#include "cuda/memory/memory.h"

#include <string.h>

#define HOST_GBPS 50 /* bytes per nanosecond, of PCIe 5 */
#define DEVICE_GBPS 2000

struct place {
    uint8_t *bytes; /* NULL: the contents are not kept */
    bool valid;
};

/* The bytes must lie inside one allocation, and mapped memory must have access. */
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

/* Copies piece by piece: mapped memory may be one array to the program and several ranges here. */
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

enum engine transfer_engine(const struct transfer *t)
{
    enum side to = t->to_side == EITHER && !range_find(t->to) ? HOST : t->to_side;
    enum side from = t->from_side == EITHER && !range_find(t->from) ? HOST : t->from_side;
    return from == HOST ? TO_DEVICE : to == HOST ? FROM_DEVICE : ON_DEVICE;
}

uint64_t transfer_ns(const struct transfer *t)
{
    uint64_t bytes = t->width * (t->height ? t->height : 1) * (t->depth ? t->depth : 1);
    return bytes / (transfer_engine(t) == ON_DEVICE ? DEVICE_GBPS : HOST_GBPS);
}

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
    /* Zeroing memory that was never written would only use host memory. */
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

uint64_t fill_ns(const struct fill *f) { return f->element * f->width * (f->height ? f->height : 1) / DEVICE_GBPS; }
