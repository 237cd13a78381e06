/* A process's connection to fgpu-simd. */
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

/* 0, or -1: no server there. Counts the devices. */
int link_open(struct link *link, const char *dir, uint32_t *n_devices);
void link_close(struct link *link);

/* One round trip. Returns the server's status, or -1 when it is gone. `reply` may be NULL; of a payload longer than
 * `room` the rest is lost. */
int link_call(struct link *link, struct sim_request request, struct sim_reply *reply, void *payload, size_t room);

/* The same, with a descriptor: what `*file` names goes along (-1: none) and stays the caller's; what comes back is put
 * there (-1: none). */
int link_call_file(struct link *link, struct sim_request request, struct sim_reply *reply, void *payload, size_t room,
                   int *file);

#endif
