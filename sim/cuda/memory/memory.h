/* Memory: address ranges, their contents, and what other processes share of them. */
#ifndef FGPU_SIM_CUDA_MEMORY_MEMORY_H
#define FGPU_SIM_CUDA_MEMORY_MEMORY_H

#include "cuda/core/driver.h"

#define SMALL_MAX MIB /* allocations up to this size share granules */
#define UNIT 512u     /* the alignment within a shared granule */
#define UNITS (GRANULE / UNIT)
#define POOL_STEP (32 * MIB) /* a memory pool grows by multiples of this */

/* A granule that small allocations share. */
struct block {
    uintptr_t start;
    uint64_t key[2]; /* not 0: other processes may have opened it */
    bool backed;
    unsigned used; /* units */
    uint8_t taken[UNITS];
    struct block *next;
};

enum range_kind {
    RANGE_DEVICE,
    RANGE_MANAGED,
    RANGE_HOST,
    RANGE_REGISTERED,
    RANGE_POOL,
    RANGE_MAPPED,
    RANGE_GRAPH,
    RANGE_IPC,
    RANGE_DATA, /* of a module */
};

struct range {
    uintptr_t start;
    size_t size; /* as requested */
    size_t span; /* address space that is unmapped with the range; 0: it is the block's */
    size_t physical;
    size_t backed; /* contents exist for this many bytes from start */
    enum range_kind kind;
    int device;
    uint64_t id;
    uint64_t key[2]; /* not 0: other processes may have opened it, or it belongs to another process */
    bool is_foreign; /* RANGE_POOL: of an imported pool */
    bool is_live;    /* RANGE_GRAPH: there is memory, between a launch and a free */
    struct context *context;
    const struct stream *going; /* RANGE_DEVICE: the stream of its cuMemFreeAsync; a wait for that stream frees it */
    const struct context *going_in; /* the context of that stream, which may be on another device */
    struct block *block;
    struct vmm_handle *handle;
    struct pool *pool;
    uint16_t *places; /* RANGE_MANAGED: for each granule a bit of every device that has it; NULL: no device has any */
    unsigned access;  /* RANGE_MAPPED: CUmemAccess_flags; RANGE_HOST: the flags of the allocation */
    CUresult (*free)(struct range *range); /* what cuMemFree does; NULL: it fails */
    struct range *prev, *next;             /* in its context */
};

enum side { HOST, DEVICE, EITHER }; /* the side of a copy's source or destination */

/* A copy of up to three dimensions. A height or depth of 0 counts as 1. */
struct transfer {
    uintptr_t to, from;
    enum side to_side, from_side;
    size_t width, height, depth;
    size_t to_pitch, from_pitch, to_slice, from_slice;
};

/* A memset of up to two dimensions. */
struct fill {
    CUdeviceptr at;
    uint32_t value;
    size_t element, width, height, pitch;
};

/* space.c: address space, the ranges in it, and the granules of small allocations */

static inline size_t granules(size_t size) { return (size + GRANULE - 1) / GRANULE * GRANULE; }
/* Reserves address space. `usable`: the host may read and write it. Returns 0 if there is none. */
uintptr_t space_reserve(size_t size, size_t alignment, bool usable);
void space_return(uintptr_t start, size_t size);
/* Returns the range that contains the address, or NULL. */
struct range *range_find(uintptr_t at);
/* Adds a range to a context. Returns NULL if it overlaps another range or there is no memory. */
struct range *range_new(struct context *context, uintptr_t start, size_t size);
void range_drop(struct range *range);
/* Creates the contents of `length` bytes at `at` in the range. Returns NULL if contents are not kept. */
uint8_t *range_touch(struct range *range, uintptr_t at, size_t length);
/* Takes room for a small allocation out of a granule of the context. Returns 0 if there is no memory. */
uintptr_t block_carve(struct context *context, size_t size, struct block **block);
bool block_has_room(struct context *context, size_t size);
/* Frees an allocation in a granule. Returns whether it was the last one there; the granule is then freed too. */
bool block_return(struct context *context, struct block *block, uintptr_t start, size_t size);

/* memory.c */
CUresult memory_allocate(struct context *context, size_t size, CUdeviceptr *out);
/* Frees the allocation that begins at this address, whatever its kind. */
CUresult memory_free(uintptr_t at);
/* Frees memory of any context that is not of a pool, and whose cuMemFreeAsync was in the order of this stream, or of
 * any stream of the context (NULL). A synchronisation does that. */
void memory_settle(const struct context *context, const struct stream *stream);

/* share.c: memory that other processes may open. A key names it. */

static inline bool has_key(const uint64_t *key) { return key[0] || key[1]; }
/* Moves `size` bytes at `start`, of which `filled` bytes can be read, to a file, and shares that under a new key. */
CUresult share_memory(struct sim_request request, void *start, size_t size, size_t filled, uint64_t *key);
/* Shares the granules of an allocation of cuMemAlloc, unless they are shared already. */
CUresult share_range(struct range *range, uint64_t *key);
/* Creates a descriptor of the shared memory. */
CUresult share_export(const uint64_t *key, uint32_t flags, int *descriptor);
/* Opens the memory of this kind to which a descriptor refers. */
CUresult share_import(int descriptor, enum sim_kind kind, struct sim_share *share, int *file);
CUresult share_open(const uint64_t *key, struct sim_share *share, int *file);
/* Sends the server the number of bytes that a shared pool has reserved now. */
CUresult share_resize(const uint64_t *key, uint64_t bytes);
void share_drop(const uint64_t *key);
/* Maps a file of contents at new addresses. Returns NULL if that fails. */
void *share_map(int file, size_t size);

/* vmm.c */

/* Shares the memory that is mapped at the range. */
CUresult vmm_key(const struct range *range, uint64_t *key);
/* Returns the tile pool on the device, if it has `size` bytes from `offset` on, or NULL. */
struct vmm_handle *vmm_tile_pool(CUmemGenericAllocationHandle id, int device, uint64_t offset, uint64_t size);
/* Counts a tile of an array to which the handle's memory is mapped. */
void vmm_map_tile(struct vmm_handle *handle);
void vmm_unmap_tile(struct vmm_handle *handle);

/* sparse.c: the tiles of sparse arrays */

/* Returns whether sparse arrays of this shape, which have `size` bytes, are simulated. */
bool tiles_are_simulated(const CUDA_ARRAY3D_DESCRIPTOR *descriptor, size_t size);
/* Returns the tiles of such an array, none of them mapped, or NULL. */
struct tiles *tiles_new(const CUDA_ARRAY3D_DESCRIPTOR *descriptor);
/* Unmaps all tiles. NULL: does nothing. */
void tiles_end(struct tiles *tiles);
/* Maps memory of a tile pool to a part of the tiles, or unmaps the part. */
CUresult tiles_change(struct tiles *tiles, const CUarrayMapInfo *info, int device);
void tiles_describe(CUDA_ARRAY_SPARSE_PROPERTIES *properties);

/* ipc.c */

/* Closes the memory of another process at this range. The range itself remains. */
void ipc_forget(struct range *range);

/* managed.c: which devices have managed memory */

/* Moves managed memory to the device of the current context. Does nothing with memory of other kinds. */
void managed_touch(struct range *range, uintptr_t at, size_t size);
/* Drops a range of managed memory. */
void managed_drop(struct range *range);

/* transfer.c: copies and memsets of contents */

CUresult transfer_run(const struct transfer *transfer);
enum engine transfer_engine(const struct transfer *transfer);
/* Returns how long the copy takes on a device. */
uint64_t transfer_ns(const struct transfer *transfer);
CUresult fill_run(const struct fill *fill);
uint64_t fill_ns(const struct fill *fill);

/* The end of a context. end.c drops its ranges and granules, array.c removes its arrays. */
void ranges_end(struct context *context);
void arrays_end(const struct context *context);

#endif
