/* Memory that other processes may open. Its contents become a file that they can map, and the server gives it a key. */
#include "cuda/memory/memory.h"

#include <errno.h>
#include <linux/memfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096u

/* Copies only pages that exist: reading another page would create it. */
static int copy_pages(int file, const char *start, size_t filled)
{
    unsigned char there[512];
    for (size_t at = 0; at < filled; at += sizeof there * PAGE) {
        size_t length = filled - at < sizeof there * PAGE ? filled - at : sizeof there * PAGE;
        if (mincore((void *)(start + at), length, there)) return -1;
        for (size_t page = 0; page * PAGE < length; page++) {
            size_t from = at + page * PAGE;
            if (there[page] & 1 && pwrite(file, start + from, PAGE, (off_t)from) != PAGE) return -1;
        }
    }
    return 0;
}

/* Creates a file with the contents of the memory, of which `filled` bytes from the start can be read. */
static int to_file(const void *start, size_t size, size_t filled)
{
    int file = (int)syscall(SYS_memfd_create, "fgpu-sim", MFD_CLOEXEC); /* glibc has the call since 2.27 */
    if (file < 0) return -1;
    if (!ftruncate(file, (off_t)size) && !copy_pages(file, start, filled)) return file;
    close(file);
    return -1;
}

/* Makes the memory at `start` a view of the file, with access to the filled part only. */
static int map_over(void *start, size_t size, size_t filled, int file)
{
    if (mmap(start, size, PROT_NONE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, file, 0) == MAP_FAILED) return -1;
    return filled ? mprotect(start, filled, PROT_READ | PROT_WRITE) : 0;
}

void *share_map(int file, size_t size)
{
    uintptr_t start = space_reserve(size, GRANULE, false);
    void *map = start
                    ? mmap((void *)start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, file, 0)
                    : MAP_FAILED;
    if (start && map == MAP_FAILED) space_return(start, size);
    return map == MAP_FAILED ? NULL : map;
}

CUresult share_memory(struct sim_request request, void *start, size_t size, size_t filled, uint64_t *key)
{
    struct sim_share share;
    int saved = errno, file = to_file(start, size, filled), sent = file;
    if (file < 0) {
        errno = saved;
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    bool shared = !sim_ask_file(SIM_SHARE, request, &share, sizeof share, &sent);
    if (sent >= 0) close(sent);
    if (shared && size && map_over(start, size, filled, file)) {
        /* The host has no memory left. The memory is no longer counted, although it still exists. */
        share_drop(share.key);
        shared = false;
    }
    close(file);
    errno = saved;
    if (!shared) return CUDA_ERROR_OUT_OF_MEMORY;
    key[0] = share.key[0];
    key[1] = share.key[1];
    return CUDA_SUCCESS;
}

/* Gives a key to the granules of an allocation of cuMemAlloc when it is first needed. Other allocations may be in
 * the same granules. */
CUresult share_range(struct range *range, uint64_t *key)
{
    struct block *block = range->block;
    uint64_t *of = block ? block->key : range->key;
    CUresult result = CUDA_SUCCESS;
    if (!has_key(of)) {
        struct sim_request request = {.device = (uint32_t)range->device,
                                      .kind = SIM_BLOCK,
                                      .context = range->context->id,
                                      .bytes = block ? GRANULE : range->physical};
        void *start = (void *)(block ? block->start : range->start);
        size_t filled = block ? (block->backed ? GRANULE : 0) : range->backed;
        result = share_memory(request, start, request.bytes, filled, of);
    }
    key[0] = of[0];
    key[1] = of[1];
    return result;
}

CUresult share_export(const uint64_t *key, uint32_t flags, int *descriptor)
{
    struct sim_request request = {.context = key[0], .requested = key[1], .flags = flags};
    *descriptor = -1;
    bool failed = sim_ask_file(SIM_EXPORT, request, NULL, 0, descriptor) || *descriptor < 0;
    return failed ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

CUresult share_import(int descriptor, enum sim_kind kind, struct sim_share *share, int *file)
{
    *file = descriptor;
    bool failed = sim_ask_file(SIM_IMPORT, (struct sim_request){.kind = kind}, share, sizeof *share, file) || *file < 0;
    return failed ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult share_open(const uint64_t *key, struct sim_share *share, int *file)
{
    struct sim_request request = {.context = key[0], .requested = key[1]};
    *file = -1;
    if (!sim_ask_file(SIM_OPEN, request, share, sizeof *share, file) && *file >= 0) return CUDA_SUCCESS;
    return CUDA_ERROR_INVALID_HANDLE;
}

CUresult share_resize(const uint64_t *key, uint64_t bytes)
{
    return sim_result(
        sim_ask(SIM_RESIZE, (struct sim_request){.context = key[0], .requested = key[1], .bytes = bytes}, NULL, 0));
}

void share_drop(const uint64_t *key)
{
    sim_ask(SIM_DROP, (struct sim_request){.context = key[0], .requested = key[1]}, NULL, 0);
}
