/* The state of libcuda in one process: devices and contexts, the lock, and the connection to fgpu-simd.
 *
 * One lock guards all state. sim_enter and sim_enter_init take it, sim_leave releases it. No function that runs between
 * them calls an exported function: probes are attached to the exports and count their calls. */
#ifndef FGPU_SIM_CUDA_CORE_DRIVER_H
#define FGPU_SIM_CUDA_CORE_DRIVER_H

/* Gives every function its own name. Without it cuda.h redefines cuMemAlloc as cuMemAlloc_v2. */
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>

#include "wire/wire.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MIB (1ull << 20)
#define GRANULE (2 * MIB) /* the driver takes device memory in multiples of this */
#define N_LIMITS 9        /* the limits of driver 580 */
#define LOSSES 1024       /* how many losses of time a context remembers, for the elapsed time of past events */

#define API __attribute__((visibility("default"))) CUresult CUDAAPI

/* Defines a function and its variant for programs compiled with a default stream per thread: two exports with one
 * body. */
#define TWICE(suffix, name, params, call)                                                                              \
    API name params                                                                                                    \
    {                                                                                                                  \
        const bool per_thread = false;                                                                                 \
        return call;                                                                                                   \
    }                                                                                                                  \
    API name##suffix params                                                                                            \
    {                                                                                                                  \
        const bool per_thread = true;                                                                                  \
        return call;                                                                                                   \
    }

struct node;

/* The nodes on which the next captured work of a stream depends. */
struct tail {
    struct node **nodes;
    size_t n;
};

struct stream {
    unsigned flags;
    int priority;
    uint64_t id;
    uint64_t done_ns;     /* when the last work in the stream will be done, by the context's clock */
    uint64_t queue_index; /* not 0: the server does the stream's work; the index of the last work given to it */
    struct context *context;
    struct capture *capture; /* not NULL: work is recorded instead of done */
    struct tail tail;
    struct stream *next;
};

enum engine { TO_DEVICE, FROM_DEVICE, ON_DEVICE, ENGINES }; /* the copy engines, which work beside kernels */

/* Names one of several kernels that run only together. `of` is their number; 0: the kernel runs alone. */
struct party {
    uint64_t key;
    uint32_t of;
};

/* The memory that a launch of a kernel needs in its context. */
struct needs {
    uint64_t local;     /* bytes of local memory per thread */
    bool heap, printer; /* the kernel calls the device's malloc, or printf */
};

/* When the context's clock showed at_ns, the context had lost lost_ns. */
struct loss {
    uint64_t at_ns, lost_ns;
};

/* Memory that a context takes without a request. Only the page tables of registered memory are released before the
 * context ends. */
struct growth {
    uint64_t local;            /* bytes of local memory per thread that the context has room for */
    bool has_malloc, has_heap; /* code that calls malloc has been loaded; has been launched */
    bool has_printf, has_printed;
    uint64_t streams, nodes, registered; /* the number of streams and nodes; bytes of registered memory */
    uint64_t stream_bytes, node_bytes, page_bytes;
};

struct context {
    bool alive, primary;
    int device;
    unsigned flags;
    uint64_t id;
    struct stream legacy, per_thread;
    struct stream *streams;
    struct range *ranges;
    struct block *blocks;
    struct event *events;
    struct module *modules;
    struct peer *peers; /* contexts whose memory this context may use */
    size_t limits[N_LIMITS];
    struct growth growth;
    uint64_t engines_ns[ENGINES]; /* when each engine will have done its last copy */
    uint64_t lost_ns, reached_ns; /* the clock is at least lost_ns behind, and has shown at least reached_ns */
    uint64_t work_ns;             /* when all work of the context will be done, by its clock */
    uint64_t known_ns;            /* the clock was or will be lost_ns behind when it shows this time */
    /* On a shared device: at the real time asked_ns, the server expected the clock to show expected_from_ns at the real
     * time expected_ns. */
    uint64_t asked_ns, expected_ns, expected_from_ns;
    struct loss losses[LOSSES]; /* a ring of the last losses */
    size_t n_losses;
    struct context *next; /* every context that was ever created: a handle is looked up here before it is used */
};

struct driver {
    bool ready;
    int pid; /* the process that called cuInit; a forked child has another */
    uint32_t n_devices;
    struct sim_device devices[SIM_MAX_DEVICES];
    struct context primary[SIM_MAX_DEVICES];
    unsigned primary_refs[SIM_MAX_DEVICES];
    struct context *contexts;
    uint64_t next_id;
};

extern struct driver driver;

/* init.c: the lock, the connection, and the checks with which every exported function begins */

/* Takes the lock. Fails without the lock if the process has not called cuInit, or is a fork of the process that has. */
CUresult sim_enter_init(void);
/* Does the same for a query that needs no device, so that it does not wait while another process has locked this one.
 */
CUresult sim_enter_query(void);
/* Returns whether this process has called cuInit. */
bool sim_is_ready(void);
/* As sim_enter_init, and fails if the thread has no current context or the context is destroyed. */
CUresult sim_enter(struct context **current);
/* Releases the lock and returns `result`. */
CUresult sim_leave(CUresult result);
void sim_unlock(void);
void sim_lock(void);
/* Sends a request to the server and returns its status, or -1 without a server. */
int sim_ask(uint32_t op, struct sim_request request, void *payload, size_t room);
/* Does the same with a descriptor, as link_call_file. */
int sim_ask_file(uint32_t op, struct sim_request request, void *payload, size_t room, int *file);
/* Converts the server's status for a request of memory. */
CUresult sim_result(int status);
/* Takes `bytes` of the device. `requested`: the bytes in the program's request; `context` NULL: the process holds the
 * memory.
 */
CUresult sim_take(struct context *context, int device, enum sim_kind kind, uint64_t bytes, uint64_t requested);
void sim_give(struct context *context, int device, enum sim_kind kind, uint64_t bytes, uint64_t requested);
bool sim_is_device(CUdevice device);
/* Returns whether `context` is a context, alive or destroyed. */
bool context_is_known(const struct context *context);

/* thread.c: each thread's stack of contexts */

/* Returns the calling thread's current context, or NULL. The context may be destroyed. */
struct context *context_current(void);
bool thread_is_full(void);
void thread_push(struct context *context);
/* Removes and returns the current context; NULL: the stack is empty. */
struct context *thread_pop(void);

/* clock.c: the clock of a context. It stops while the context has work and another context has the device. */

/* Returns the latest time that the clock can show now. */
uint64_t context_now(const struct context *context);
/* Adds work of `ns` that begins at `from` or later. Returns when it will be done, by the context's clock. */
uint64_t context_work(struct context *context, uint64_t ns, uint64_t from);
/* Returns when work that is added now begins, which is `from` or later. */
uint64_t context_start(const struct context *context, uint64_t from);
/* Records that the context had lost `lost` nanoseconds at the real time `at`. */
void context_lost(struct context *context, uint64_t at, uint64_t lost);
bool context_reached(struct context *context, uint64_t until);
/* Waits until the clock shows `until`. Releases the lock while it sleeps. */
void context_wait(struct context *context, uint64_t until);
/* Returns the real time at which the clock showed `at`. */
uint64_t context_real(const struct context *context, uint64_t at);
/* Converts a time of one context's clock to that of another. */
uint64_t context_translate(const struct context *from, const struct context *to, uint64_t at);

/* growth.c: memory that a context takes without a request */

void growth_begins(struct context *context);
CUresult growth_limit(struct context *context, CUlimit limit, size_t value);
CUresult growth_code(struct context *context, bool has_malloc, bool has_printf);
CUresult growth_launch(struct context *context, const struct needs *needs);
CUresult growth_stream(struct context *context);
void growth_stream_ends(struct context *context);
CUresult growth_nodes(struct context *context, uint64_t n);
void growth_nodes_end(struct context *context, uint64_t n);
CUresult growth_register(struct context *context, uint64_t bytes);
void growth_unregister(struct context *context, uint64_t bytes);

#endif
