/* life_shares.h: the part of life.c that shares memory with other lives, and that leaves memory in use after an exit or
 * an exec. Only life.c includes this file.
 *
 * Lives send each other descriptors of memory and of pools, by sockets of the abstract namespace. The receiver imports,
 * keeps or closes a descriptor, or exits before it has read it. A forked child keeps the driver's descriptors open for
 * a while, also after its parent is killed. A program that a life executes inherits them. */

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

#define MAILBOXES 16
#define MOST_INHERITED 64
#define KEEPER_US 300000

enum sort { MEMORY, RANGE, POOL };
struct letter {
    enum sort sort;
    size_t bytes;
    CUmemPoolPtrExportData pointer;
};

static int mailbox = -1;
static int inherited[MOST_INHERITED]; /* the driver's descriptors from the program that executed this one */
static unsigned inheriteds;

static struct sockaddr_un name_of(unsigned number, socklen_t *length)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    int n = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "fgpu-life-%u", number);
    *length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)n);
    return name;
}

static void open_mailbox(void)
{
    socklen_t length;
    mailbox = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    for (unsigned i = 0; i < MAILBOXES; i++) {
        struct sockaddr_un name = name_of(i, &length);
        if (!bind(mailbox, (struct sockaddr *)&name, length)) return;
    }
}

union control {
    char bytes[CMSG_SPACE(sizeof(int))];
    struct cmsghdr align;
};

/* Sends a descriptor to a random life. It is lost if the socket does not exist or its queue is full. */
static void send_to_one(struct life *life, struct letter *letter, int file)
{
    socklen_t length;
    struct sockaddr_un name = name_of((unsigned)draw(life, 4), &length);
    union control control = {{0}};
    struct iovec part = {letter, sizeof *letter};
    struct msghdr header = {.msg_name = &name,
                            .msg_namelen = length,
                            .msg_iov = &part,
                            .msg_iovlen = 1,
                            .msg_control = control.bytes,
                            .msg_controllen = sizeof control.bytes};
    struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    first->cmsg_level = SOL_SOCKET;
    first->cmsg_type = SCM_RIGHTS;
    first->cmsg_len = CMSG_LEN(sizeof file);
    memcpy(CMSG_DATA(first), &file, sizeof file);
    sendmsg(mailbox, &header, MSG_NOSIGNAL);
}

/* Returns the descriptor, or -1. */
static int receive(struct letter *letter)
{
    union control control;
    struct iovec part = {letter, sizeof *letter};
    struct msghdr header = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    int file = -1;
    if (recvmsg(mailbox, &header, MSG_CMSG_CLOEXEC) != sizeof *letter) return -1;
    struct cmsghdr *first = CMSG_FIRSTHDR(&header);
    if (first && first->cmsg_type == SCM_RIGHTS) memcpy(&file, CMSG_DATA(first), sizeof file);
    return file;
}

/* Sends a descriptor or not. Then keeps it in an empty slot, or closes it. */
static void dispose(struct life *life, struct letter *letter, int file)
{
    if (file < 0) return;
    fcntl(file, F_SETFD, FD_CLOEXEC);
    if (draw(life, 2)) send_to_one(life, letter, file);
    struct slot *kept = &life->slots[draw(life, SLOTS)];
    if (kept->kind == NOTHING && draw(life, 2))
        *kept = (struct slot){.kind = DESCRIPTOR, .file = file};
    else
        close(file);
}

static void export_mapped(struct life *life, struct slot *slot)
{
    struct letter letter = {.sort = MEMORY, .bytes = slot->bytes};
    int file = -1;
    if (!cu.cuMemExportToShareableHandle(&file, slot->handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0))
        dispose(life, &letter, file);
}

static void export_range(struct life *life, struct slot *slot)
{
    struct letter letter = {.sort = RANGE};
    int file = -1;
    if (!cu.cuMemGetHandleForAddressRange(&file, slot->pointer, slot->bytes, CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD, 0))
        dispose(life, &letter, file);
}

static void export_pool(struct life *life, struct slot *slot)
{
    struct letter letter = {.sort = POOL};
    int file = -1;
    if (!life->pool || slot->kind != POOLED) return;
    if (cu.cuMemPoolExportPointer(&letter.pointer, slot->pointer)) return; /* the pointer is of another pool */
    if (!cu.cuMemPoolExportToShareableHandle(&file, life->pool, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0))
        dispose(life, &letter, file);
}

static void import_memory(struct life *life, struct slot *slot, const struct letter *letter, int file)
{
    CUmemAccessDesc access = {.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = life->device},
                              .flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    if (cu.cuMemImportFromShareableHandle(&slot->handle, (void *)(intptr_t)file,
                                          CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR))
        return;
    slot->bytes = letter->bytes;
    slot->references = 1;
    slot->kind = MAPPED;
    if (draw(life, 2) || cu.cuMemAddressReserve(&slot->pointer, slot->bytes, 0, 0, 0)) return;
    if (!cu.cuMemMap(slot->pointer, slot->bytes, 0, slot->handle, 0)) {
        cu.cuMemSetAccess(slot->pointer, slot->bytes, &access, 1);
        return;
    }
    cu.cuMemAddressFree(slot->pointer, slot->bytes);
    slot->pointer = 0;
}

static void import_pool(struct slot *slot, struct letter *letter, int file)
{
    CUmemoryPool pool;
    if (cu.cuMemPoolImportFromShareableHandle(&pool, (void *)(intptr_t)file, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                              0))
        return;
    if (cu.cuMemPoolImportPointer(&slot->pointer, pool, &letter->pointer)) {
        cu.cuMemPoolDestroy(pool);
        return;
    }
    slot->pool = pool;
    slot->kind = IMPORTED_POOL;
}

static void import_one(struct life *life, struct slot *slot)
{
    struct letter letter;
    int file = receive(&letter);
    if (file < 0) return;
    if (letter.sort == MEMORY) import_memory(life, slot, &letter, file);
    if (letter.sort == POOL) import_pool(slot, &letter, file);
    if (slot->kind == NOTHING && draw(life, 2)) /* not imported, and nevertheless kept */
        *slot = (struct slot){.kind = DESCRIPTOR, .file = file};
    else
        close(file);
}

/* -- the driver's descriptors */

static bool is_driver_s(const char *target)
{
    const char *name = strrchr(target, '/');
    return !strncmp(name ? name + 1 : target, "nvidia", 6) || !strncmp(target, "socket:", 7);
}

static unsigned driver_files(int *files, unsigned room)
{
    DIR *list = opendir("/proc/self/fd");
    unsigned found = 0;
    for (struct dirent *entry; list && found < room && (entry = readdir(list));) {
        char path[300], target[64] = "";
        int file = atoi(entry->d_name);
        snprintf(path, sizeof path, "/proc/self/fd/%s", entry->d_name);
        if (file < 3 || file == mailbox || readlink(path, target, sizeof target - 1) <= 0) continue;
        if (is_driver_s(target)) files[found++] = file;
    }
    if (list) closedir(list);
    return found;
}

/* Lets the program of the following exec inherit the driver's descriptors. */
static void keep_driver_files(void)
{
    int files[MOST_INHERITED];
    unsigned found = driver_files(files, MOST_INHERITED);
    for (unsigned i = 0; i < found; i++) fcntl(files[i], F_SETFD, 0);
}

static void close_inherited(void)
{
    while (inheriteds) close(inherited[--inheriteds]);
}

/* Forks a child that keeps the driver's descriptors of its parent open for up to 0.3 s. The parent does not wait. */
static void leave_a_keeper(struct life *life)
{
    useconds_t time = (useconds_t)draw(life, KEEPER_US);
    pid_t child = fork();
    if (child) return;
    close(0);
    close(1);
    usleep(time);
    _exit(0);
}

/* Closes all descriptors and imported pools of other processes, and waits for all children. NVML shows no row for the
 * memory of an imported pool in the importing process. */
static void close_all_shared(void)
{
    struct letter letter;
    close_inherited();
    for (unsigned t = 0; t < threads; t++) {
        cu.cuCtxSetCurrent(primary[lives[t].device]);
        for (int i = 0; i < SLOTS; i++) {
            struct slot *slot = &lives[t].slots[i];
            if (slot->kind == DESCRIPTOR || slot->kind == IMPORTED_POOL) give(&lives[t], slot);
        }
    }
    for (int file;; close(file))
        if ((file = receive(&letter)) < 0 && errno == EAGAIN) break;
    while (waitpid(-1, NULL, 0) > 0) continue;
}

static void share(struct life *life, struct slot *slot)
{
    struct slot *other = &life->slots[draw(life, SLOTS)];
    switch (draw(life, 8)) {
    case 0:
        leave_a_keeper(life);
        return;
    case 1:
    case 2:
    case 3:
        import_one(life, slot);
        return;
    default:
        if (other->kind == MAPPED) export_mapped(life, other);
        if (other->kind == POINTER && other->bytes) export_range(life, other);
        if (other->kind == POOLED) export_pool(life, other);
    }
}
