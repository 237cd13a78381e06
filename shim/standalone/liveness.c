/*
 * liveness.c: how a process determines whether another process is alive. Owns nothing.
 *
 * A process creates a segment of shared memory, one page that is never touched. Only the creator has it attached, and
 * the kernel removes it with the creator's memory: at exec too, however the process ends, and whatever process was its
 * parent. No pid is used, so neither pid namespaces nor reused pids nor zombies matter; no descriptor is held. The name
 * is the segment's number with its size and time of creation, because another IPC namespace (a restarted container)
 * uses the same numbers.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "standalone/standalone.h"

/* Bits: id 31, size - 1 12, creation 20, and one that makes the name non-zero. */
static uint64_t name_of(int id, const struct shmid_ds *status)
{
    return 1ULL << 63 | (uint64_t)id << 32 | ((uint64_t)(status->shm_segsz - 1) & 0xfff) << 20 |
           ((uint64_t)status->shm_ctime & 0xfffff);
}

uint64_t fgpu_liveness_begin(void)
{
    struct shmid_ds status;
    size_t size = 1 + (fgpu_ticket() >> 22 & 0xfff);
    int id = (int)syscall(SYS_shmget, IPC_PRIVATE, size,
                          IPC_CREAT | 0444); /* readable by any user: other processes check it */
    if (id < 0) return 0;
    void *at = (void *)syscall(SYS_shmat, id, NULL, SHM_RDONLY);
    syscall(SYS_shmctl, id, IPC_RMID, NULL); /* at once: if a process is killed before this, the segment remains */
    bool lives =
        at != (void *)-1 && !madvise(at, FGPU_PAGE_BYTES, MADV_DONTFORK) && !syscall(SYS_shmctl, id, IPC_STAT, &status);
    if (!lives && at != (void *)-1) syscall(SYS_shmdt, at);
    return lives ? name_of(id, &status) : 0;
}

/* Return whether the process is alive; true if the kernel does not report it. `pid`: in this process's namespace; 0:
 * not known. */
bool fgpu_liveness_lasts(uint64_t life, uint32_t *pid)
{
    struct shmid_ds status;
    int id = (int)(life >> 32 & 0x7fffffff), saved = errno;
    *pid = 0;
    if (syscall(SYS_shmctl, id, IPC_STAT, &status)) {
        int error = errno;
        errno = saved;
        return error != EINVAL && error != EIDRM && error != EACCES;
    }
    *pid = (uint32_t)status.shm_cpid;
    return name_of(id, &status) == life;
}
