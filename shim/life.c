/*
 * life.c: how one process knows that another lives. Owns nothing.
 *
 * By a segment of shared memory, one page that is never touched: its creator alone has it attached, and the kernel ends
 * it when the creator's memory ends, at exec too, whatever killed it and whoever was its parent. Nobody's pid is asked
 * about, so neither pid namespaces nor pids that come again nor zombies matter; no descriptor is held. Its name is its
 * number with its size and time of creation, since numbers come again in another IPC namespace (a container that was
 * started anew).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "books.h"

/* id: 31 bits, size - 1: 12, creation: 20, and one that makes it no zero. */
static uint64_t name_of(int id, const struct shmid_ds *status)
{
    return 1ULL << 63 | (uint64_t)id << 32 | ((uint64_t)(status->shm_segsz - 1) & 0xfff) << 20 |
           ((uint64_t)status->shm_ctime & 0xfffff);
}

uint64_t fgpu_life_begin(void)
{
    struct shmid_ds status;
    size_t size = 1 + (fgpu_ticket() >> 22 & 0xfff);
    int id = (int)syscall(SYS_shmget, IPC_PRIVATE, size, IPC_CREAT | 0444); /* whatever user others are: they look */
    if (id < 0) return 0;
    void *at = (void *)syscall(SYS_shmat, id, NULL, SHM_RDONLY);
    syscall(SYS_shmctl, id, IPC_RMID, NULL); /* at once: of who is killed before this it stays */
    bool lives =
        at != (void *)-1 && !madvise(at, FGPU_PAGE_BYTES, MADV_DONTFORK) && !syscall(SYS_shmctl, id, IPC_STAT, &status);
    if (!lives && at != (void *)-1) syscall(SYS_shmdt, at);
    return lives ? name_of(id, &status) : 0;
}

/* Where the kernel does not tell, it lives. `pid`: as this process's namespace knows it; 0: not at all. */
bool fgpu_life_lasts(uint64_t life, uint32_t *pid)
{
    struct shmid_ds status;
    int id = (int)(life >> 32 & 0x7fffffff);
    *pid = 0;
    if (syscall(SYS_shmctl, id, IPC_STAT, &status)) return errno != EINVAL && errno != EIDRM && errno != EACCES;
    *pid = (uint32_t)status.shm_cpid;
    return name_of(id, &status) == life;
}
