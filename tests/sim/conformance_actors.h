/* Actors: processes that hold memory of the device and execute orders. Each runs this program again and gets its orders
 * by a socket. A fork alone would not suffice: this process has called the driver, so its forks cannot call it. */
#ifndef FGPU_CONFORMANCE_ACTORS_H
#define FGPU_CONFORMANCE_ACTORS_H

#include "conformance.h"

#include <sys/types.h>

#define MOST_FILES 250
#define SIZE 256 /* of memory, in MiB */

/* Orders of an actor. Their `number` is a size in MiB. The actor replies to each with an order whose `number` is a
 * result, a pid or a count. */
enum act {
    /* its own memory */
    ACT_BEGIN,    /* cuInit and the primary context */
    ACT_ALLOCATE, /* cuMemAlloc */
    ACT_FREE,
    ACT_MANAGED, /* cuMemAllocManaged, and a memset over all of it */
    ACT_CREATE,  /* cuMemCreate, for descriptors */
    ACT_MAP,     /* the created or imported handle */
    ACT_UNMAP,
    ACT_RELEASE,

    /* memory for other processes */
    ACT_EXPORT,      /* sends the descriptor, and keeps none */
    ACT_EXPORT_KEEP, /* sends the descriptor, and keeps it too */
    ACT_IMPORT,      /* imports the descriptor that came with the order, and keeps it */
    ACT_CLOSE,       /* closes the kept descriptor */
    ACT_DMABUF,      /* sends a descriptor of the allocated memory, and keeps none */
    ACT_IPC_GET,
    ACT_IPC_OPEN,
    ACT_IPC_CLOSE,

    /* pools */
    ACT_POOL,        /* a pool for descriptors, and an allocation in it */
    ACT_POOL_EXPORT, /* sends the descriptor and the pointer, and keeps none */
    ACT_POOL_IMPORT, /* the descriptor stays open */
    ACT_POOL_POINTER,
    ACT_POOL_FREE,
    ACT_POOL_DESTROY,
    ACT_ASYNC, /* cuMemAllocAsync, from the default pool */

    /* its process */
    ACT_FORK,        /* a child becomes the actor, with all descriptors; the parent waits for the child's end */
    ACT_SEND_FILES,  /* sends the driver's descriptors to a socket that is never read */
    ACT_CLOSE_FILES, /* closes the driver's descriptors */
    ACT_EXECUTE,     /* executes this program again, with the driver's descriptors */

    /* contexts */
    ACT_RETAIN, /* retains the primary context again */
    ACT_RESET,
    ACT_LEAVE,   /* drops the last reference to the primary context */
    ACT_CONTEXT, /* creates a second context, which is current from then on */
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
int collect(int sock, struct order *order); /* returns the descriptor that came with the order, or -1 */

/* conformance_roles.c: the director's side */
struct role {
    pid_t pid;
    int ended;
    int sock;
    int file; /* the descriptor that the actor sent, or -1 */
    struct order last;
};

void roles_begin(void);
void roles_end(const char *what); /* kills all actors, and prints the memory that is left */
struct role *role_enter(void);
void role_end(struct role *role); /* kills the actor */
void drop_file(struct role *role);
long long tell_with(struct role *role, enum act act, long long number, const struct order *more, int file);
long long tell(struct role *role, enum act act, long long number);
void ask(const char *what, struct role *role, enum act act, long long number); /* prints the result too */
void ask_with(const char *what, struct role *role, enum act act, const struct role *from);
void show(const char *what); /* prints the device's memory in use and each actor's row of NVML, in MiB */

#endif
