/* Processes that hold memory of the device and are told what to do with it: this program again, with orders that come
 * by a socket, because this process has called the driver itself and its forks could not. */
#ifndef FGPU_CONFORMANCE_ACTORS_H
#define FGPU_CONFORMANCE_ACTORS_H

#include "conformance.h"

#include <sys/types.h>

#define MOST_FILES 250
#define SIZE 256 /* of memory, in MiB */

/* What an actor is told to do. It answers each order with one of its own, whose `number` is a result, a pid or a count;
 * the number of an order is MiB. */
enum act {
    /* of memory */
    ACT_BEGIN,    /* cuInit and the primary context */
    ACT_ALLOCATE, /* cuMemAlloc */
    ACT_FREE,
    ACT_MANAGED, /* cuMemAllocManaged, and a memset over all of it */
    ACT_CREATE,  /* cuMemCreate, for descriptors */
    ACT_MAP,     /* what was created or imported */
    ACT_UNMAP,
    ACT_RELEASE,

    /* of memory for other processes */
    ACT_EXPORT,      /* sends the descriptor, and keeps none */
    ACT_EXPORT_KEEP, /* keeps it */
    ACT_IMPORT,      /* of the descriptor that came along, which it keeps */
    ACT_CLOSE,       /* the descriptor that it kept */
    ACT_DMABUF,      /* of what was allocated; sends it, and keeps none */
    ACT_IPC_GET,
    ACT_IPC_OPEN,
    ACT_IPC_CLOSE,

    /* of pools */
    ACT_POOL,        /* a pool for descriptors, and an allocation in it */
    ACT_POOL_EXPORT, /* sends the descriptor and the pointer, and keeps none */
    ACT_POOL_IMPORT, /* the descriptor stays open */
    ACT_POOL_POINTER,
    ACT_POOL_FREE,
    ACT_POOL_DESTROY,
    ACT_ASYNC, /* cuMemAllocAsync, from the default pool */

    /* of its process */
    ACT_FORK,        /* a child takes over, with all descriptors; the parent waits for its end */
    ACT_SEND_FILES,  /* the driver's descriptors to a socket that is never read */
    ACT_CLOSE_FILES, /* the driver's descriptors */
    ACT_EXECUTE,     /* another program, with the driver's descriptors */

    /* of contexts */
    ACT_RETAIN, /* the primary context again */
    ACT_RESET,
    ACT_LEAVE,   /* the primary context, for the last time */
    ACT_CONTEXT, /* a second context, which is current from then on */
    ACT_DESTROY,
    ACT_END,
};

struct order {
    enum act act;
    long long number;
    CUipcMemHandle handle;
    CUmemPoolPtrExportData pointer;
};

/* conformance_letters.c */
int post(int sock, const struct order *order, const int *files, unsigned n);
int collect(int sock, struct order *order); /* the descriptor that came along, or -1 */

/* conformance_roles.c: the director's side */
struct role {
    pid_t pid;
    int ended;
    int sock;
    int file; /* that it sent */
    struct order last;
};

void roles_begin(void);
void roles_end(const char *what); /* all of them go, and leave nothing */
struct role *role_enter(void);
void role_end(struct role *role); /* is killed */
void drop_file(struct role *role);
long long tell_with(struct role *role, enum act act, long long number, const struct order *more, int file);
long long tell(struct role *role, enum act act, long long number);
void ask(const char *what, struct role *role, enum act act, long long number); /* says the result as well */
void ask_with(const char *what, struct role *role, enum act act, const struct role *from);
void show(const char *what); /* the device's total and the row of each actor in NVML, in MiB */

#endif
