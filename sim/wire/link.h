/* The connection of a process to fgpu-simd. */
#ifndef FGPU_SIM_LINK_H
#define FGPU_SIM_LINK_H

#include "wire.h"

#include <pthread.h>
#include <stddef.h>
#include <sys/types.h>

struct link {
    pthread_mutex_t lock;
    int sock; /* -1: not connected */
    pid_t owner;
};

#define LINK_INIT                                                                                                      \
    {                                                                                                                  \
        PTHREAD_MUTEX_INITIALIZER, -1, 0                                                                               \
    }

/* Returns 0 and the number of devices, or -1 without a server. */
int link_open(struct link *link, const char *dir, uint32_t *n_devices);
void link_close(struct link *link);

/* Sends a request and waits for the reply. Returns the server's status, or -1 without a server. `reply` may be NULL.
 * The payload is cut to `room` bytes. */
int link_call(struct link *link, struct sim_request request, struct sim_reply *reply, void *payload, size_t room);

/* Does the same with a descriptor. `*file` is sent (-1: none), and the caller keeps it. The descriptor that comes
 * back is put there (-1: none). */
int link_call_file(struct link *link, struct sim_request request, struct sim_reply *reply, void *payload, size_t room,
                   int *file);

#endif
