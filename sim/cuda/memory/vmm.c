/* Virtual memory management: physical memory (handles) and address space (reservations) are separate. Memory exists
 * while a handle has a reference or a mapping: a released handle keeps its memory until the unmap. If only sparse
 * arrays still have it, no process's row shows it (measured). */
#include "cuda/memory/memory.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

struct vmm_handle {
    size_t size;
    unsigned refs, maps;
    size_t tiles; /* of sparse arrays, to which the memory is mapped */
    bool is_unlisted;
    uint64_t key[2]; /* not 0: other processes may have opened it, or it comes from another process */
    bool is_foreign; /* imported */
    CUmemAllocationProp prop;
    void *contents; /* a shared mapping; every mapping of the handle is another view of it */
    struct vmm_handle *next;
};

struct reservation {
    uintptr_t start;
    size_t size;
    struct reservation *next;
};

static struct vmm_handle *handles;
static struct reservation *reservations;

/* A released handle is refused, although its memory may still exist in a mapping. */
static struct vmm_handle *find_handle(CUmemGenericAllocationHandle id)
{
    for (struct vmm_handle *h = handles; h; h = h->next)
        if ((uintptr_t)h == id) return h->refs ? h : NULL;
    return NULL;
}

static void unlist(struct vmm_handle *handle)
{
    struct sim_request request = {.device = (uint32_t)handle->prop.location.id,
                                  .kind = SIM_VMM,
                                  .bytes = handle->size,
                                  .requested = handle->size};
    sim_ask(SIM_UNLIST, request, NULL, 0);
    handle->is_unlisted = true;
}

/* Called after every release and every unmapping. The later of them frees the memory. */
static void settle(struct vmm_handle *handle)
{
    if (handle->refs || handle->maps) return;
    if (handle->tiles) {
        if (!handle->is_unlisted && !has_key(handle->key)) unlist(handle);
        return;
    }
    struct vmm_handle **at = &handles;
    while (*at != handle) at = &(*at)->next;
    *at = handle->next;
    munmap(handle->contents, handle->size);
    if (has_key(handle->key)) {
        if (!handle->is_foreign) sim_give(NULL, handle->prop.location.id, SIM_VMM, 0, handle->size);
        share_drop(handle->key);
    } else if (handle->is_unlisted) {
        sim_give(NULL, handle->prop.location.id, SIM_TILES, handle->size, 0);
    } else {
        sim_give(NULL, handle->prop.location.id, SIM_VMM, handle->size, handle->size);
    }
    free(handle);
}

/* Real drivers also have memory on the host and fabric memory. Neither is simulated. */
static CUresult check_prop(const CUmemAllocationProp *prop)
{
    if (!prop || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED) return CUDA_ERROR_INVALID_VALUE;
    if (prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
    return sim_is_device(prop->location.id) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

API cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop,
                                  CUmemAllocationGranularity_flags option)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!granularity || (unsigned)option > CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    result = check_prop(prop);
    if (!result) *granularity = GRANULE;
    return sim_leave(result);
}

static CUresult create(size_t size, const CUmemAllocationProp *prop, struct vmm_handle **out)
{
    struct vmm_handle *handle = calloc(1, sizeof *handle);
    if (!handle) return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult result = sim_take(NULL, prop->location.id, SIM_VMM, size, size);
    if (result) {
        free(handle);
        return result;
    }
    /* Mapped without access, so that the host cannot read it before cuMemSetAccess. No page is used until it is
     * written. */
    handle->contents = mmap(NULL, size, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (handle->contents == MAP_FAILED) {
        sim_give(NULL, prop->location.id, SIM_VMM, size, size);
        free(handle);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    handle->size = size;
    handle->refs = 1;
    handle->prop = *prop;
    handle->next = handles;
    handles = handle;
    *out = handle;
    return CUDA_SUCCESS;
}

API cuMemCreate(CUmemGenericAllocationHandle *out, size_t size, const CUmemAllocationProp *prop,
                unsigned long long flags)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct vmm_handle *handle;
    if (!out || !size || size % GRANULE || flags) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    result = check_prop(prop);
    if (!result) result = create(size, prop, &handle);
    if (!result) *out = (uintptr_t)handle;
    return sim_leave(result);
}

API cuMemRelease(CUmemGenericAllocationHandle id)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct vmm_handle *handle = find_handle(id);
    if (!handle) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    handle->refs--;
    settle(handle);
    return sim_leave(CUDA_SUCCESS);
}

/* Like the real driver, returns the same handle, not a new one, and makes it valid again if it was released. */
API cuMemRetainAllocationHandle(CUmemGenericAllocationHandle *out, void *addr)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct range *range = range_find((uintptr_t)addr);
    if (!out || !range || range->kind != RANGE_MAPPED) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    range->handle->refs++;
    *out = (uintptr_t)range->handle;
    return sim_leave(CUDA_SUCCESS);
}

API cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp *prop, CUmemGenericAllocationHandle id)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    const struct vmm_handle *handle = find_handle(id);
    if (!prop || !handle) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *prop = handle->prop;
    return sim_leave(CUDA_SUCCESS);
}

/* Sparse arrays. */

struct vmm_handle *vmm_tile_pool(CUmemGenericAllocationHandle id, int device, uint64_t offset, uint64_t size)
{
    struct vmm_handle *handle = find_handle(id);
    bool is_pool = handle && handle->prop.allocFlags.usage & CU_MEM_CREATE_USAGE_TILE_POOL;
    if (!is_pool || handle->prop.location.id != device || offset > handle->size) return NULL;
    return size <= handle->size - offset ? handle : NULL;
}

void vmm_map_tile(struct vmm_handle *handle) { handle->tiles++; }

void vmm_unmap_tile(struct vmm_handle *handle)
{
    handle->tiles--;
    settle(handle);
}

/* Address space. */

API cuMemAddressReserve(CUdeviceptr *ptr, size_t size, size_t alignment, CUdeviceptr addr, unsigned long long flags)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    (void)addr; /* a preferred address, which the real driver uses if it can */
    if (!ptr || !size || size % GRANULE || flags || alignment & (alignment - 1))
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct reservation *reservation = calloc(1, sizeof *reservation);
    uintptr_t start = reservation ? space_reserve(size, alignment > GRANULE ? alignment : GRANULE, false) : 0;
    if (!start) {
        free(reservation);
        return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    }
    *reservation = (struct reservation){.start = start, .size = size, .next = reservations};
    reservations = reservation;
    *ptr = start;
    return sim_leave(CUDA_SUCCESS);
}

static bool is_mapped_within(uintptr_t start, size_t size)
{
    for (uintptr_t at = start; at < start + size; at += GRANULE)
        if (range_find(at)) return true;
    return false;
}

API cuMemAddressFree(CUdeviceptr ptr, size_t size)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct reservation **at = &reservations;
    while (*at && (*at)->start != ptr) at = &(*at)->next;
    struct reservation *reservation = *at;
    if (!reservation || reservation->size != size || is_mapped_within(ptr, size))
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *at = reservation->next;
    space_return(reservation->start, reservation->size);
    free(reservation);
    return sim_leave(CUDA_SUCCESS);
}

static bool is_reserved(uintptr_t start, size_t size)
{
    for (const struct reservation *r = reservations; r; r = r->next)
        if (start >= r->start && start - r->start <= r->size && size <= r->size - (start - r->start)) return true;
    return false;
}

API cuMemMap(CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle id, unsigned long long flags)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct vmm_handle *handle = find_handle(id);
    if (!handle || flags || !size || size % GRANULE || ptr % GRANULE) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (offset || size > handle->size) return sim_leave(CUDA_ERROR_NOT_SUPPORTED);
    if (!is_reserved(ptr, size) || is_mapped_within(ptr, size)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    /* With an old size of 0, mremap creates a second view of a shared mapping: no descriptor is needed for that. */
    void *view = mremap(handle->contents, 0, size, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)ptr);
    struct range *range = view == MAP_FAILED ? NULL : range_new(&driver.primary[handle->prop.location.id], ptr, size);
    if (!range) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    range->kind = RANGE_MAPPED;
    range->handle = handle;
    handle->maps++;
    return sim_leave(CUDA_SUCCESS);
}

/* The reservation keeps the address space: the next mmap could take a hole there. */
static void unmap(struct range *range)
{
    struct vmm_handle *handle = range->handle;
    mmap((void *)range->start, range->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    range_drop(range);
    handle->maps--;
    settle(handle);
}

/* Returns whether the bytes are whole mappings without a hole between them. Calls on anything else fail. */
static bool covers_whole_mappings(uintptr_t start, size_t size)
{
    uintptr_t at = start;
    while (at - start < size) {
        const struct range *range = range_find(at);
        if (!range || range->kind != RANGE_MAPPED || range->start != at) return false;
        at += range->size;
    }
    return size && at - start == size;
}

API cuMemUnmap(CUdeviceptr ptr, size_t size)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    /* Reserved addresses without a mapping may be unmapped any number of times. */
    if (size && is_reserved(ptr, size) && !is_mapped_within(ptr, size)) return sim_leave(CUDA_SUCCESS);
    if (!covers_whole_mappings(ptr, size)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    for (uintptr_t at = ptr; at - ptr < size;) {
        struct range *range = range_find(at);
        at += range->size;
        unmap(range);
    }
    return sim_leave(CUDA_SUCCESS);
}

API cuMemSetAccess(CUdeviceptr ptr, size_t size, const CUmemAccessDesc *desc, size_t count)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!desc || !count || !covers_whole_mappings(ptr, size)) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    unsigned access = 0;
    for (size_t i = 0; i < count; i++) {
        unsigned flags = (unsigned)desc[i].flags;
        if (flags != CU_MEM_ACCESS_FLAGS_PROT_NONE && flags != CU_MEM_ACCESS_FLAGS_PROT_READ &&
            flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE)
            return sim_leave(CUDA_ERROR_INVALID_VALUE);
        if (desc[i].location.type == CU_MEM_LOCATION_TYPE_DEVICE && !sim_is_device(desc[i].location.id))
            return sim_leave(CUDA_ERROR_INVALID_DEVICE);
        access |= flags;
    }
    /* The host always has access, since the host does the copies. Copies check `access` instead. */
    if (mprotect((void *)ptr, size, PROT_READ | PROT_WRITE)) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    for (uintptr_t at = ptr; at - ptr < size;) {
        struct range *range = range_find(at);
        range->access = access;
        at += range->size;
    }
    return sim_leave(CUDA_SUCCESS);
}

API cuMemGetAccess(unsigned long long *flags, const CUmemLocation *location, CUdeviceptr ptr)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    const struct range *range = range_find(ptr);
    if (!flags || !location || !range || range->kind != RANGE_MAPPED) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *flags = range->access;
    return sim_leave(CUDA_SUCCESS);
}

/* Sharing. A handle that may be shared becomes a file at its first export, and every mapping of it becomes a view of
 * that file. */

static CUresult map_again(const struct vmm_handle *handle)
{
    for (const struct range *r = driver.primary[handle->prop.location.id].ranges; r; r = r->next) {
        if (r->kind != RANGE_MAPPED || r->handle != handle) continue;
        void *at = (void *)r->start;
        if (mremap(handle->contents, 0, r->size, MREMAP_MAYMOVE | MREMAP_FIXED, at) == MAP_FAILED ||
            mprotect(at, r->size, r->access ? PROT_READ | PROT_WRITE : PROT_NONE))
            return CUDA_ERROR_OUT_OF_MEMORY;
    }
    return CUDA_SUCCESS;
}

static CUresult share(struct vmm_handle *handle)
{
    if (has_key(handle->key)) return CUDA_SUCCESS;
    struct sim_request request = {.device = (uint32_t)handle->prop.location.id, .kind = SIM_VMM, .bytes = handle->size};
    if (mprotect(handle->contents, handle->size, PROT_READ)) return CUDA_ERROR_OUT_OF_MEMORY;
    CUresult result = share_memory(request, handle->contents, handle->size, handle->size, handle->key);
    mprotect(handle->contents, handle->size, PROT_NONE);
    return result ? result : map_again(handle);
}

API cuMemExportToShareableHandle(void *shareableHandle, CUmemGenericAllocationHandle id,
                                 CUmemAllocationHandleType handleType, unsigned long long flags)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct vmm_handle *handle = find_handle(id);
    if (!shareableHandle || !handle || flags || handleType != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR ||
        !(handle->prop.requestedHandleTypes & CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR))
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    int descriptor;
    result = share(handle);
    if (!result) result = share_export(handle->key, 0, &descriptor);
    if (!result) *(int *)shareableHandle = descriptor;
    return sim_leave(result);
}

CUresult vmm_key(const struct range *range, uint64_t *key)
{
    CUresult result = share(range->handle);
    key[0] = range->handle->key[0];
    key[1] = range->handle->key[1];
    return result;
}

static CUresult import(struct vmm_handle *handle, int descriptor)
{
    struct sim_share share;
    int file;
    CUresult result = share_import(descriptor, SIM_VMM, &share, &file);
    if (result) return result;
    handle->contents = mmap(NULL, share.bytes, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0);
    close(file);
    if (handle->contents == MAP_FAILED) {
        share_drop(share.key);
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    handle->size = share.bytes;
    handle->refs = 1;
    handle->key[0] = share.key[0];
    handle->key[1] = share.key[1];
    handle->is_foreign = true;
    handle->prop = (CUmemAllocationProp){.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                         .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                         .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = (int)share.device}};
    return CUDA_SUCCESS;
}

/* The program keeps its descriptor. Each import is a new handle. */
API cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *out, void *osHandle, CUmemAllocationHandleType type)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    if (!out || type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if ((int)(intptr_t)osHandle < 0) return sim_leave(CUDA_ERROR_UNKNOWN);
    struct vmm_handle *handle = calloc(1, sizeof *handle);
    if (!handle) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    result = import(handle, (int)(intptr_t)osHandle);
    if (result) {
        free(handle);
        return sim_leave(result);
    }
    handle->next = handles;
    handles = handle;
    *out = (uintptr_t)handle;
    return sim_leave(CUDA_SUCCESS);
}
