/*
 * standalone.c: an image's own limit, which the processes of a container enforce together if no agent decides. Owns
 * this process's seat in the ledger, and pages like those of a gatekeeper, made from the ledger, which the rest of the
 * shim reads.
 *
 * The ledger is a file (`books`) in the container's own root, which no other container shares; IPC and pid namespaces
 * may be shared. If the root has no writable place for the file, each process is held to the limit by itself, and
 * reports that. Only the thread that registers calls fgpu_standalone_join().
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "standalone/standalone.h"

#define FOLDER "/run/fgpu"
#define NAME "books"
#define NO_REPLACE 1 /* of renameat2 */
#define TRIES 8

struct place { /* one page each, except the ledger; one region, reserved once, kept over forks */
    union {
        struct { /* zero in a forked child, which is another process for the ledger */
            _Atomic uint32_t standing;
            uint32_t seat;
            uint64_t limit, life;
        };
        char page[FGPU_PAGE_BYTES];
    } own;
    union {
        struct fgpu_control_page control;
        char control_page[FGPU_PAGE_BYTES];
    };
    char status[FGPU_PAGE_BYTES];
    union {
        struct fgpu_usage_page usage;
        char usage_page[FGPU_PAGE_BYTES];
    };
    union {
        struct fgpu_ledger ledger;
        char pages[FGPU_LEDGER_BYTES];
    };
};
_Static_assert(offsetof(struct place, ledger) == 4 * FGPU_PAGE_BYTES, "pages");

static _Atomic(struct place *) region;

static struct place *here(void) { return atomic_load_explicit(&region, memory_order_acquire); }

/* -- the file */

static bool for_now(void) { return errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == EINTR; }

/* Open the folder, and create it if it is missing. Every user of the container must be able to enter it, whatever the
 * umask of its creator was. */
static int open_folder(void)
{
    static const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    int folder = (int)syscall(SYS_openat, AT_FDCWD, FOLDER, flags, 0);
    if (folder >= 0 || errno != ENOENT) return folder;
    bool made = !syscall(SYS_mkdirat, AT_FDCWD, FOLDER, 0755);
    if (!made && errno != EEXIST) return -1;
    folder = (int)syscall(SYS_openat, AT_FDCWD, FOLDER, flags, 0);
    if (folder >= 0 && made) syscall(SYS_fchmod, folder, 0755);
    return folder;
}

/* Return whether the file is a ledger. No other file is ever written to, whatever process put it there. */
static bool is_ledger(int file)
{
    struct stat status;
    uint64_t magic;
    return !syscall(SYS_fstat, file, &status) && S_ISREG(status.st_mode) && status.st_size == FGPU_LEDGER_BYTES &&
           syscall(SYS_pread64, file, &magic, sizeof magic, 0) == sizeof magic && magic == FGPU_LEDGER_MAGIC;
}

/* Write all of the file before it is mapped: on a full disk, an access to a hole would kill the program by SIGBUS. */
static bool fill(int file)
{
    const uint64_t nothing[64] = {0};
    static const uint64_t magic = FGPU_LEDGER_MAGIC;
    for (long at = 0; at < FGPU_LEDGER_BYTES; at += (long)sizeof nothing)
        if (syscall(SYS_pwrite64, file, nothing, sizeof nothing, at) != sizeof nothing) return false;
    return syscall(SYS_pwrite64, file, &magic, sizeof magic, 0) == sizeof magic && !syscall(SYS_fchmod, file, 0666);
}

/* Create the file under another name and rename it when it is complete, so that no process opens an incomplete file. A
 * process that is second uses the file of the first. */
static bool make(int folder)
{
    char aside[] = "." NAME ".0123456789abcdef";
    uint64_t random = fgpu_ticket();
    for (unsigned i = sizeof NAME + 1; aside[i]; i++, random >>= 4) aside[i] = "0123456789abcdef"[random & 15];
    int file = (int)syscall(SYS_openat, folder, aside, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (file < 0) return false;
    bool made = fill(file);
    int saved = errno;
    syscall(SYS_close, file);
    if (made && !syscall(SYS_renameat2, folder, aside, folder, NAME, NO_REPLACE)) return true;
    made = made && errno == EEXIST;
    if (!made && errno) saved = errno;
    syscall(SYS_unlinkat, folder, aside, 0);
    errno = saved;
    return made;
}

/* Open the ledger. Returns a descriptor; or -1, and errno shows whether a later attempt may succeed. */
static int open_ledger(void)
{
    int folder = open_folder(), file = -1;
    if (folder < 0) return -1;
    for (int i = 0; i < TRIES; i++) {
        file = (int)syscall(SYS_openat, folder, NAME, O_RDWR | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0);
        if (file >= 0 || errno != ENOENT || !make(folder)) break;
    }
    int saved = errno;
    syscall(SYS_close, folder);
    errno = saved;
    if (file < 0 || is_ledger(file)) return file;
    syscall(SYS_close, file);
    errno = EEXIST;
    return -1;
}

/* -- the pages */

static bool reserve(void)
{
    if (here()) return true;
    struct place *place = mmap(NULL, sizeof *place, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    struct place *none = NULL;
    if (place == MAP_FAILED) return false;
    if (!atomic_compare_exchange_strong(&region, &none, place)) munmap(place, sizeof *place);
    return true;
}

static bool map(void *at, size_t bytes, int file)
{
    int flags = MAP_FIXED | (file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED);
    return mmap(at, bytes, PROT_READ | PROT_WRITE, flags, file, 0) == at;
}

static void fill_pages(struct place *place, uint64_t limit)
{
    place->control.version = FGPU_LAYOUT;
    place->control.flags = FGPU_MANAGED | FGPU_STANDALONE;
    place->control.device_count = FGPU_DEVICES;
    place->usage.version = FGPU_LAYOUT;
    for (unsigned i = 0; i < FGPU_DEVICES; i++) {
        place->control.devices[i].index = i;
        place->usage.devices[i].limit = limit;
    }
}

/* -- joining */

static enum fgpu_standalone join(struct place *place, uint64_t limit)
{
    int file = open_ledger(), seat = 0;
    if (file < 0 && for_now()) return FGPU_STANDALONE_BARE;
    if (file >= 0 && !place->own.life) place->own.life = fgpu_liveness_begin();
    if (file >= 0 && !place->own.life) { /* other processes could not detect that this process has exited */
        syscall(SYS_close, file);
        file = -1;
    }
    bool mapped = map(&place->control, offsetof(struct place, ledger) - offsetof(struct place, control), -1) &&
                  map(&place->ledger, FGPU_LEDGER_BYTES, file);
    if (file >= 0) syscall(SYS_close, file);
    if (!mapped) return FGPU_STANDALONE_BARE;
    if (file >= 0) seat = fgpu_ledger_seat(&place->ledger, place->own.life);
    if (seat < 0) return FGPU_STANDALONE_BARE;
    if (file < 0) place->ledger.seats = 1;
    fill_pages(place, limit);
    place->own.seat = (uint32_t)seat;
    place->own.limit = limit;
    return file < 0 ? FGPU_STANDALONE_ALONE : FGPU_STANDALONE_WITH;
}

enum fgpu_standalone fgpu_standalone_join(void)
{
    struct place *place = here();
    enum fgpu_standalone standing = place ? atomic_load(&place->own.standing) : FGPU_STANDALONE_FREE;
    uint64_t limit = 0;
    if (standing >= FGPU_STANDALONE_ALONE) {
        if (standing == FGPU_STANDALONE_WITH) fgpu_ledger_sweep(&place->ledger);
        return standing;
    }
    int found = fgpu_image_limit(&limit);
    if (found <= 0) return found ? FGPU_STANDALONE_BARE : FGPU_STANDALONE_FREE;
    if (!reserve()) return FGPU_STANDALONE_BARE;
    place = here();
    if (!standing && (!map(&place->own, FGPU_PAGE_BYTES, -1) || madvise(&place->own, FGPU_PAGE_BYTES, MADV_WIPEONFORK)))
        return FGPU_STANDALONE_BARE;
    standing = join(place, limit);
    atomic_store(&place->own.standing, standing);
    return standing;
}

/* -- functions for the rest of the shim */

struct fgpu_view fgpu_standalone_view(void)
{
    struct place *place = here();
    return (struct fgpu_view){
        .link = FGPU_HELD,
        .levels = 1,
        .cooperative = true,
        .control = &place->control,
        .usage = &place->usage,
        .status = (void *)place->status,
    };
}

void fgpu_standalone_refresh(void)
{
    struct place *place = here();
    if (atomic_load(&place->own.standing) == FGPU_STANDALONE_WITH) fgpu_ledger_sweep(&place->ledger);
    for (unsigned i = 0; i < FGPU_DEVICES && atomic_load(&place->ledger.devices[i]); i++)
        __atomic_store_n(&place->usage.devices[i].used, fgpu_ledger_used(&place->ledger, i), __ATOMIC_RELAXED);
}

/* Return the index of a device. Devices are added one by one, as the program uses them. */
int fgpu_standalone_device(const uint8_t uuid[16])
{
    struct place *place = here();
    int index = fgpu_ledger_device(&place->ledger, uuid);
    if (index < 0) return index;
    uint64_t words[2], *to = (uint64_t *)(void *)place->control.devices[index].uuid;
    memcpy(words, uuid, sizeof words);
    for (int i = 0; i < 2; i++) __atomic_store_n(&to[i], words[i], __ATOMIC_RELAXED);
    return index;
}

/* Charge. If there is no room, release the memory of dead processes, and try again. */
bool fgpu_standalone_charge(unsigned index, uint64_t bytes)
{
    struct place *place = here();
    struct fgpu_ledger *ledger = &place->ledger;
    unsigned seat = place->own.seat;
    return fgpu_ledger_charge(ledger, index, seat, bytes, place->own.limit) ||
           (fgpu_ledger_sweep(ledger) && fgpu_ledger_charge(ledger, index, seat, bytes, place->own.limit));
}

void fgpu_standalone_release(unsigned index, uint64_t bytes)
{
    struct place *place = here();
    if (place && index < FGPU_DEVICES) fgpu_ledger_release(&place->ledger, index, place->own.seat, bytes);
}

/* List the processes that hold memory of a device, by their pids in this process's namespace. */
unsigned fgpu_standalone_rows(int index, struct fgpu_row *rows, unsigned most)
{
    struct place *place = here();
    unsigned n = 0;
    for (unsigned seat = 0; index >= 0 && seat < FGPU_SEATS && n < most; seat++) {
        uint64_t bytes = fgpu_ledger_held(&place->ledger, (unsigned)index, seat), life = place->ledger.lives[seat];
        uint32_t pid = 0;
        if (!bytes) continue;
        if (atomic_load(&place->own.standing) == FGPU_STANDALONE_ALONE)
            pid = (uint32_t)syscall(SYS_getpid);
        else if (!life || !fgpu_liveness_lasts(life, &pid))
            continue;
        if (pid) rows[n++] = (struct fgpu_row){pid, (uint32_t)index, bytes};
    }
    return n;
}
