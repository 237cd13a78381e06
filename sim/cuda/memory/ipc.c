/* Opening memory of another process by a handle of 64 bytes. The memory is counted for the exporting process until that
 * process frees it or ends. */
#include "cuda/core/capture_state.h"
#include "cuda/memory/memory.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SIGN 0x66677069u

struct ticket {
    uint32_t sign, device;
    uint64_t key[2];
    uint64_t offset, size; /* inside the memory that the key names */
    uint64_t spare[3];
};

_Static_assert(sizeof(struct ticket) == CU_IPC_HANDLE_SIZE, "a handle has 64 bytes");

struct opened {
    struct range *range;
    uint64_t offset;
    void *map;
    size_t span;
    unsigned refs;
    struct opened *next;
};

static struct opened *opens;

static bool is_same(const uint64_t *a, const uint64_t *b) { return a[0] == b[0] && a[1] == b[1]; }

API cuIpcGetMemHandle(CUipcMemHandle *pHandle, CUdeviceptr dptr)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct range *range = range_find(dptr);
    if (!pHandle || !range || range->kind != RANGE_DEVICE) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct ticket ticket = {.sign = SIGN, .device = (uint32_t)range->device, .size = range->size};
    ticket.offset = range->block ? range->start - range->block->start : 0;
    result = share_range(range, ticket.key);
    if (!result) memcpy(pHandle, &ticket, sizeof ticket);
    return sim_leave(result);
}

static bool is_own(const struct ticket *ticket)
{
    for (const struct context *c = driver.contexts; c; c = c->next) {
        for (const struct block *b = c->blocks; b; b = b->next)
            if (is_same(b->key, ticket->key)) return true;
        for (const struct range *r = c->ranges; r; r = r->next)
            if (r->kind == RANGE_DEVICE && is_same(r->key, ticket->key)) return true;
    }
    return false;
}

static struct opened *find(const struct context *context, const struct ticket *ticket)
{
    for (struct opened *o = opens; o; o = o->next)
        if (o->range->context == context && is_same(o->range->key, ticket->key) && o->offset == ticket->offset)
            return o;
    return NULL;
}

static CUresult open_new(struct context *context, const struct ticket *ticket, struct opened **out)
{
    struct sim_share share;
    int file;
    CUresult result = share_open(ticket->key, &share, &file);
    if (result) return result;
    bool inside = ticket->size <= share.bytes && ticket->offset <= share.bytes - ticket->size;
    struct opened *opened = inside ? calloc(1, sizeof *opened) : NULL;
    void *map = opened ? share_map(file, share.bytes) : NULL;
    struct range *range = map ? range_new(context, (uintptr_t)map + ticket->offset, ticket->size) : NULL;
    close(file);
    if (!range) {
        if (map) space_return((uintptr_t)map, share.bytes);
        free(opened);
        share_drop(ticket->key);
        return inside ? CUDA_ERROR_MAP_FAILED : CUDA_ERROR_INVALID_HANDLE;
    }
    range->kind = RANGE_IPC;
    range->device = (int)share.device;
    range->key[0] = ticket->key[0];
    range->key[1] = ticket->key[1];
    *opened = (struct opened){.range = range, .offset = ticket->offset, .map = map, .span = share.bytes, .next = opens};
    opens = opened;
    *out = opened;
    return CUDA_SUCCESS;
}

static CUresult open_handle(CUdeviceptr *out, CUipcMemHandle handle, unsigned flags)
{
    struct context *context;
    struct ticket ticket;
    CUresult result = sim_enter(&context);
    if (result) return result;
    result = capture_permits();
    if (result) return sim_leave(result);
    memcpy(&ticket, &handle, sizeof ticket);
    if (!out || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS || ticket.sign != SIGN || !ticket.size)
        return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (is_own(&ticket)) return sim_leave(CUDA_ERROR_INVALID_CONTEXT);
    struct opened *opened = find(context, &ticket);
    if (!opened) result = open_new(context, &ticket, &opened);
    if (result) return sim_leave(result);
    opened->refs++;
    *out = opened->range->start;
    return sim_leave(CUDA_SUCCESS);
}

API cuIpcOpenMemHandle(CUdeviceptr *pdptr, CUipcMemHandle handle, unsigned int Flags)
{
    return open_handle(pdptr, handle, Flags);
}

API cuIpcOpenMemHandle_v2(CUdeviceptr *pdptr, CUipcMemHandle handle, unsigned int Flags)
{
    return open_handle(pdptr, handle, Flags);
}

void ipc_forget(struct range *range)
{
    struct opened **at = &opens;
    while (*at && (*at)->range != range) at = &(*at)->next;
    struct opened *opened = *at;
    if (!opened) return;
    *at = opened->next;
    space_return((uintptr_t)opened->map, opened->span);
    share_drop(range->key);
    free(opened);
}

API cuIpcCloseMemHandle(CUdeviceptr dptr)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    result = capture_permits();
    if (result) return sim_leave(result);
    struct range *range = range_find(dptr);
    struct opened *opened = opens;
    while (opened && opened->range != range) opened = opened->next;
    if (!range || !opened || range->start != dptr) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!--opened->refs) {
        ipc_forget(range);
        range_drop(range);
    }
    return sim_leave(CUDA_SUCCESS);
}
