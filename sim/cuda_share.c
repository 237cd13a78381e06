/* Memory for other processes: its contents become a file that they can map, and the server gives it a key. */
#include "cuda_state.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u

/* Only pages that exist are copied: reading the others would make them exist. */
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

/* A file with what is in memory, of which `filled` bytes from the start may be read. */
static int to_file(const void *start, size_t size, size_t filled)
{
    int file = memfd_create("fgpu-sim", MFD_CLOEXEC);
    if (file < 0) return -1;
    if (!ftruncate(file, (off_t)size) && !copy_pages(file, start, filled)) return file;
    close(file);
    return -1;
}

/* From now on the memory at `start` is a view of that file; without access but for the filled part. */
static int map_over(void *start, size_t size, size_t filled, int file)
{
    if (mmap(start, size, PROT_NONE, MAP_SHARED | MAP_FIXED | MAP_NORESERVE, file, 0) == MAP_FAILED) return -1;
    return filled ? mprotect(start, filled, PROT_READ | PROT_WRITE) : 0;
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
    if (shared && map_over(start, size, filled, file)) {
        share_drop(share.key); /* it counts no more, though it is still there: there is no memory left on this host */
        shared = false;
    }
    close(file);
    errno = saved;
    if (!shared) return CUDA_ERROR_OUT_OF_MEMORY;
    key[0] = share.key[0];
    key[1] = share.key[1];
    return CUDA_SUCCESS;
}

CUresult share_open(const uint64_t *key, struct sim_share *share, int *file)
{
    struct sim_request request = {.context = key[0], .requested = key[1]};
    *file = -1;
    if (!sim_ask_file(SIM_OPEN, request, share, sizeof *share, file) && *file >= 0) return CUDA_SUCCESS;
    return CUDA_ERROR_INVALID_HANDLE;
}

void share_drop(const uint64_t *key)
{
    sim_ask(SIM_DROP, (struct sim_request){.context = key[0], .requested = key[1]}, NULL, 0);
}
