/*
 * async_memory.c: stream-ordered allocation. Owns notes of pointers that pools have returned; after the free of a
 * pointer that has lost its note, all pools are measured.
 *
 * The driver's call takes half a microsecond, so the usual path is one atomic operation: sizes are added up until they
 * reach the admitted bytes, and only then the pool is measured. Bytes that a stream frees are its credit: the pool can
 * give them to the same stream again at once, and to no other. Notes and credits may be lost: then the pool is measured
 * earlier.
 */
#include "hooks/async_memory.h"
#include "account/stream.h"
#include "link/link.h"
#include "standalone/standalone.h"

#define NOTES 256
#define BUSY 1ULL

struct note { /* of a pointer: its pool, and its size */
    _Atomic uint64_t pointer;
    uint64_t bytes;
    uint32_t slot, generation;
};
static _Atomic(void *) notes; /* a table of NOTES */

struct order {         /* one request */
    struct pool *pool; /* NULL: not charged to a pool */
    CUstream handle;
    bool per_thread;
    uint64_t stream, bytes, pieces, rest; /* pieces, rest: taken from the stream's credit */
    bool is_piece, grown, called, undone; /* is_piece: a freed piece is large enough */
    CUresult result;                      /* of the last call of the driver */
    uint64_t since_ns;                    /* as in fgpu_request */
};

static uint64_t mix(uint64_t n) { return n * 0x9e3779b97f4a7c15ULL; }

static struct pool *pool_of_stream(CUstream stream, bool per_thread)
{
    CUdevice ordinal;
    return fgpu_device_of(stream, per_thread, &ordinal) ? fgpu_current_pool(ordinal) : NULL;
}

/* -- credits and notes */

static struct credit *credit_of(struct pool *pool, uint64_t stream) { return &pool->credits[mix(stream) >> 61]; }
_Static_assert(FGPU_CREDITS == 8, "three bits");

static bool is_own(const struct credit *credit, uint64_t stream)
{
    return atomic_load_explicit(&credit->stream, memory_order_relaxed) == stream;
}

static bool take(_Atomic uint64_t *from, uint64_t bytes)
{
    uint64_t had = atomic_load_explicit(from, memory_order_relaxed);
    while (had >= bytes)
        if (atomic_compare_exchange_weak(from, &had, had - bytes)) return true;
    return false;
}

/* Take bytes of the stream's credit for a request, if possible from a piece that is large enough. */
static bool use_credit(struct order *order)
{
    struct credit *credit = credit_of(order->pool, order->stream);
    if (!is_own(credit, order->stream)) return false;
    uint64_t piece = atomic_load_explicit(&credit->piece, memory_order_relaxed);
    if (LIKELY(order->bytes <= piece) && take(&credit->bytes, piece)) {
        order->pieces = piece, order->is_piece = true;
        return true;
    }
    if (take(&credit->rest, order->bytes)) {
        order->rest = order->bytes;
        return true;
    }
    uint64_t whole = piece ? (order->bytes + piece - 1) / piece * piece : 0;
    if (!whole || !take(&credit->bytes, whole)) return false;
    order->pieces = whole;
    return true;
}

/* Add freed bytes without a gap to the stream's credit, in whole pieces. The largest ones set the size of a piece. */
static void give_credit(struct pool *pool, uint64_t stream, uint64_t bytes)
{
    struct credit *credit = credit_of(pool, stream);
    uint64_t its = 0;
    if (!is_own(credit, stream) && !atomic_compare_exchange_strong(&credit->stream, &its, stream)) {
        atomic_fetch_add_explicit(&pool->unclaimed, bytes, memory_order_relaxed);
        return;
    }
    uint64_t piece = atomic_load_explicit(&credit->piece, memory_order_relaxed), whole = bytes;
    if (piece != bytes && bytes >= atomic_load_explicit(&credit->bytes, memory_order_relaxed)) {
        uint64_t smaller = atomic_exchange_explicit(&credit->bytes, 0, memory_order_relaxed);
        atomic_store_explicit(&credit->piece, bytes, memory_order_relaxed);
        if (smaller) atomic_fetch_add_explicit(&credit->rest, smaller, memory_order_relaxed);
    } else if (piece != bytes) {
        whole = piece ? bytes / piece * piece : 0;
    }
    if (whole) atomic_fetch_add_explicit(&credit->bytes, whole, memory_order_relaxed);
    if (whole < bytes) atomic_fetch_add_explicit(&credit->rest, bytes - whole, memory_order_relaxed);
}

static void return_credit(struct order *order)
{
    struct credit *credit = credit_of(order->pool, order->stream);
    bool own = is_own(credit, order->stream);
    if (order->pieces)
        atomic_fetch_add_explicit(own ? &credit->bytes : &order->pool->unclaimed, order->pieces, memory_order_relaxed);
    if (order->rest)
        atomic_fetch_add_explicit(own ? &credit->rest : &order->pool->unclaimed, order->rest, memory_order_relaxed);
    order->pieces = order->rest = 0;
}

/* Record a free. The pool shrinks when a thread waits for the stream, not now. */
static void freed(struct pool *pool, uint64_t stream, uint64_t bytes)
{
    give_credit(pool, stream, bytes);
    if (atomic_load_explicit(&pool->unsettled, memory_order_relaxed) != FGPU_SYNCS)
        atomic_store_explicit(&pool->unsettled, FGPU_SYNCS, memory_order_relaxed);
}

static void take_credit(struct order *order)
{
    struct credit *credit = credit_of(order->pool, order->stream);
    if (!is_own(credit, order->stream)) return;
    order->pieces = atomic_exchange_explicit(&credit->bytes, 0, memory_order_relaxed);
    order->rest = atomic_exchange_explicit(&credit->rest, 0, memory_order_relaxed);
}

/* Return the slot of a pointer; NULL: there is no table, or the pointer is one of the two marks of a slot without a
 * note: 0, which a program may free as often as it likes, and BUSY. */
static struct note *note_of(struct note *table, CUdeviceptr pointer)
{
    return LIKELY(table && pointer > BUSY) ? &table[mix(pointer) >> 56] : NULL;
}

/* Record a pointer. The newest note replaces an older one: an older pointer in the same slot gives no credit when it is
 * freed. */
static void write_note(CUdeviceptr pointer, const struct order *order)
{
    struct note *note = note_of(fgpu_table(&notes, NOTES * sizeof *note), pointer);
    uint64_t was = note ? atomic_load_explicit(&note->pointer, memory_order_relaxed) : BUSY;
    if (was == BUSY || !atomic_compare_exchange_strong(&note->pointer, &was, BUSY)) return;
    note->bytes = order->bytes;
    note->slot = fgpu_pool_slot(order->pool);
    note->generation = atomic_load_explicit(&order->pool->generation, memory_order_relaxed);
    atomic_store_explicit(&note->pointer, pointer, memory_order_release);
}

/* Remove a note before the driver can return the pointer again. */
static bool take_note(CUdeviceptr pointer, struct order *order)
{
    struct note *note = note_of(atomic_load_explicit(&notes, memory_order_acquire), pointer);
    uint64_t its = pointer;
    if (!note || atomic_load_explicit(&note->pointer, memory_order_relaxed) != pointer ||
        !atomic_compare_exchange_strong(&note->pointer, &its, BUSY))
        return false;
    order->bytes = note->bytes;
    order->pool = fgpu_pool_at(note->slot, note->generation);
    atomic_store_explicit(&note->pointer, 0, memory_order_release);
    return order->pool != NULL;
}

struct pool *fgpu_take_pool_of(CUdeviceptr pointer)
{
    struct order order;
    return take_note(pointer, &order) ? order.pool : NULL;
}

/* -- before and after the driver's calls */

/* Return whether the stream is a default stream without a context. A default stream belongs to the current context.
 * Without a context the driver refuses the call, so no admission is requested. */
static bool has_no_context(uint64_t stream)
{
    CUdevice device;
    return (stream == (uint64_t)CU_STREAM_LEGACY || stream == fgpu_this_thread()) && !fgpu_current(&device);
}

static CUresult before(struct order *order, size_t size)
{
    struct pool *pool = order->pool;
    int ordinal = pool ? atomic_load_explicit(&pool->ordinal, memory_order_relaxed) : FGPU_HOST_POOL;
    if (ordinal < 0) {
        order->pool = NULL;
        if (ordinal == FGPU_HOST_POOL || !fgpu_is_limited(fgpu_look())) return CUDA_SUCCESS;
        fgpu_report_crowd();
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    order->bytes = size > FGPU_MOST_BYTES ? TOO_MUCH : (size + SMALL_ALIGNMENT - 1) & ~(SMALL_ALIGNMENT - 1);
    if (use_credit(order)) return CUDA_SUCCESS;
    uint64_t spent = atomic_fetch_add_explicit(&pool->spent, order->bytes, memory_order_relaxed) + order->bytes;
    if (LIKELY(spent <= atomic_load_explicit(&pool->portion.admitted, memory_order_relaxed))) return CUDA_SUCCESS;
    if (has_no_context(order->stream)) return CUDA_SUCCESS;
    order->grown = true;
    take_credit(order); /* too little, but the pool can combine it with a new block */
    CUresult refusal = fgpu_pool_grow(pool, order->bytes);
    if (refusal) return_credit(order);
    return refusal;
}

/* Return whether a call that had no freed piece has made the pool larger than was admitted. */
static bool is_beyond(const struct order *order)
{
    struct pool *pool = order->pool;
    if (order->grown) return fgpu_pool_grown(pool, order->bytes) != CUDA_SUCCESS;
    if (order->is_piece || order->result) return false;
    uint64_t given = atomic_fetch_add_explicit(&pool->given, order->bytes, memory_order_relaxed) + order->bytes;
    return given >= FGPU_UNMEASURED && fgpu_pool_grown(pool, 0) != CUDA_SUCCESS;
}

/* Return memory to its pool, in the order of its stream. The pool gives it back to the device at a later wait. */
static bool undo(const struct order *order, CUdeviceptr pointer)
{
    __typeof__(&cuMemFreeAsync) give = order->per_thread ? REAL(cuMemFreeAsync_ptsz) : REAL(cuMemFreeAsync);
    if (!give || give(pointer, order->handle) != CUDA_SUCCESS) return false;
    atomic_store_explicit(&order->pool->unsettled, FGPU_SYNCS, memory_order_relaxed);
    return true;
}

/* After a call. The bytes of a failed call stay in `spent`: the next measurement corrects a number that is too high,
 * but might not correct one that is too low. */
static void after(struct order *order, CUdeviceptr *pointer)
{
    CUresult result = order->result;
    bool beyond = is_beyond(order);
    if (LIKELY(result == CUDA_SUCCESS)) {
        order->undone = beyond && undo(order, *pointer);
        if (LIKELY(!order->undone)) {
            write_note(*pointer, order);
            return;
        }
        *pointer = 0, order->result = CUDA_ERROR_OUT_OF_MEMORY;
        return_credit(order);
        return;
    }
    return_credit(order);
    if (order->grown) fgpu_pool_trimmed(order->pool);
    fgpu_failed(atomic_load_explicit(&order->pool->portion.index, memory_order_relaxed), 0, result);
}

/* Return whether to call the driver now, for the first time or after room was made. A pool grows by blocks. */
static bool attempt(struct order *order, size_t size, CUdeviceptr *pointer)
{
    if (order->called) {
        if (!order->pool) return false;
        after(order, pointer);
        if (LIKELY(order->result != CUDA_ERROR_OUT_OF_MEMORY) || order->undone) return false;
        int index = atomic_load_explicit(&order->pool->portion.index, memory_order_relaxed);
        if (!fgpu_room_comes(index, fgpu_blocks(order->bytes), &order->since_ns)) return false;
        order->is_piece = order->grown = false;
    }
    order->called = true;
    order->result = before(order, size);
    return order->result == CUDA_SUCCESS;
}

typedef CUresult (*from_current)(CUdeviceptr *, size_t, CUstream);
typedef CUresult (*from_pool)(CUdeviceptr *, size_t, CUmemoryPool, CUstream);

static CUresult call(from_current driver, from_pool pool_driver, CUdeviceptr *dptr, size_t size, CUmemoryPool from,
                     CUstream stream)
{
    return driver ? driver(dptr, size, stream) : pool_driver(dptr, size, from, stream);
}

/* One body for all four calls, because the shim is mapped into every program. One of the two drivers is NULL. */
static CUresult allocate(CUdeviceptr *dptr, size_t size, CUmemoryPool from, CUstream stream, bool per_thread,
                         from_current driver, from_pool pool_driver)
{
    if (!driver && !pool_driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!dptr || !size || fgpu_is_capturing(stream, per_thread))
        return call(driver, pool_driver, dptr, size, from, stream);
    struct order order = {.handle = stream, .per_thread = per_thread};
    order.pool = driver ? pool_of_stream(stream, per_thread) : from ? fgpu_pool_of(from) : NULL;
    order.stream = fgpu_stream_key(stream, per_thread);
    while (attempt(&order, size, dptr)) order.result = call(driver, pool_driver, dptr, size, from, stream);
    return order.result;
}

EXPORT CUresult cuMemAllocAsync(CUdeviceptr *dptr, size_t bytesize, CUstream hStream)
{
    return allocate(dptr, bytesize, NULL, hStream, false, REAL(cuMemAllocAsync), NULL);
}

EXPORT CUresult cuMemAllocAsync_ptsz(CUdeviceptr *dptr, size_t bytesize, CUstream hStream)
{
    return allocate(dptr, bytesize, NULL, hStream, true, REAL(cuMemAllocAsync_ptsz), NULL);
}

EXPORT CUresult cuMemAllocFromPoolAsync(CUdeviceptr *dptr, size_t bytesize, CUmemoryPool pool, CUstream hStream)
{
    return allocate(dptr, bytesize, pool, hStream, false, NULL, REAL(cuMemAllocFromPoolAsync));
}

EXPORT CUresult cuMemAllocFromPoolAsync_ptsz(CUdeviceptr *dptr, size_t bytesize, CUmemoryPool pool, CUstream hStream)
{
    return allocate(dptr, bytesize, pool, hStream, true, NULL, REAL(cuMemAllocFromPoolAsync_ptsz));
}

/* Free a pointer that no pool returned, or that has lost its note. Most such pointers come from cuMemAlloc. The driver
 * frees them in stream order; cuMemFree would wait for all work that uses the memory, so it cannot replace this call.
 * The kernel has no probe here. Such a pointer stays charged until NVML shows that the process holds less; the next
 * request that needs the room waits for that. The standalone ledger is updated here, because nothing else corrects
 * it. */
static CUresult free_unknown(__typeof__(&cuMemFreeAsync) driver, CUdeviceptr pointer, CUstream stream)
{
    struct fgpu_grant grant;
    bool held = fgpu_has_grants() && fgpu_grant_take(FGPU_SPACE_POINTER, pointer, &grant);
    CUresult result = driver(pointer, stream);
    if (held) fgpu_grant_ended(&grant, result);
    if (!pointer || result != CUDA_SUCCESS) return result;
    fgpu_frees_unseen();
    fgpu_pools_unsettled();
    return result;
}

static CUresult free_async(CUdeviceptr pointer, CUstream stream, bool per_thread, __typeof__(&cuMemFreeAsync) driver)
{
    struct order order;
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    if (!take_note(pointer, &order)) return free_unknown(driver, pointer, stream);
    bool captured = fgpu_is_capturing(stream, per_thread); /* freed when the graph runs, if ever */
    CUresult result = driver(pointer, stream);
    if (result != CUDA_SUCCESS)
        write_note(pointer, &order);
    else if (!captured)
        freed(order.pool, fgpu_stream_key(stream, per_thread), order.bytes);
    return result;
}

EXPORT CUresult cuMemFreeAsync(CUdeviceptr dptr, CUstream hStream)
{
    return free_async(dptr, hStream, false, REAL(cuMemFreeAsync));
}

EXPORT CUresult cuMemFreeAsync_ptsz(CUdeviceptr dptr, CUstream hStream)
{
    return free_async(dptr, hStream, true, REAL(cuMemFreeAsync_ptsz));
}
