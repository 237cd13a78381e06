/* What one process's libcuda knows: contexts, address ranges, streams. Everything is guarded by one lock, which
 * sim_enter takes and sim_leave gives back; no function here that is called between the two calls an exported one,
 * because the exported ones are what others attach probes to and count. */
#ifndef FGPU_SIM_CUDA_STATE_H
#define FGPU_SIM_CUDA_STATE_H

/* Every function under its own name: no cuMemAlloc that silently means cuMemAlloc_v2. */
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>

#include "wire.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MIB (1ull << 20)
#define GRANULE (2 * MIB) /* what the driver takes from a device at a time */
#define SMALL_MAX MIB     /* up to here allocations share granules */
#define UNIT 512u         /* alignment within a shared granule */
#define UNITS (GRANULE / UNIT)
#define POOL_STEP (32 * MIB) /* what a memory pool grows by */
#define N_LIMITS 9           /* those of driver 580 */
#define LOSSES 1024          /* as far back as anybody could ask how late something was */
#define MAX_STACK 128        /* contexts pushed by one thread */

#define API __attribute__((visibility("default"))) CUresult CUDAAPI

/* A function and its twin for programs compiled with a default stream per thread: two exports, one body. */
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

struct capture;
struct node;

/* What the next piece of captured work in a stream depends on. */
struct tail {
    struct node **nodes;
    size_t n;
};

struct stream {
    unsigned flags;
    int priority;
    uint64_t id;
    uint64_t done_ns;    /* when the last work in it is done */
    uint64_t lane_index; /* not 0: the server does its work, up to this */
    struct context *context;
    struct capture *capture; /* NULL: work is done, not recorded */
    struct tail tail;
    struct stream *next;
};

enum side { HOST, DEVICE, EITHER }; /* of a copy */

enum engine { TO_DEVICE, FROM_DEVICE, ON_DEVICE, ENGINES }; /* what does copies, beside whatever computes */

/* One of the kernels that run only together. of 0: it runs by itself. */
struct party {
    uint64_t key;
    uint32_t of;
};

struct shape {
    unsigned grid[3], block[3], shared;
};

/* What a kernel takes of its context when it is launched. */
struct needs {
    uint64_t local;     /* bytes a thread */
    bool heap, printer; /* calls the device's malloc, or printf */
};

struct kernel_run {
    uint64_t ns;
    struct party party;
    struct needs needs;
};

/* At this moment of a context's clock so much had been lost. */
struct loss {
    uint64_t at_ns, lost_ns;
};

/* What it has taken by itself. Nothing of this is given back before the context's end but what is registered. */
struct growth {
    uint64_t local;            /* bytes a thread that there is room for */
    bool has_malloc, has_heap; /* code that calls malloc was loaded; was launched */
    bool has_printf, has_printed;
    uint64_t streams, nodes, registered; /* how many there are, and of what size */
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
    struct peer *peers; /* whose memory may be used from here */
    size_t limits[N_LIMITS];
    struct growth growth;
    uint64_t engines_ns[ENGINES];                     /* when each will have done its last copy */
    uint64_t lost_ns, reached_ns;                     /* its clock: at least that far behind, has said at least that */
    uint64_t work_ns;                                 /* when all its work will be done, by that clock */
    uint64_t asked_ns, expected_ns, expected_from_ns; /* that moment should be so, really: when the device is shared */
    struct loss losses[LOSSES];                       /* the last ones, round and round */
    size_t n_losses;
    struct context *next; /* all there ever were: a handle is looked up here before it is believed */
};

struct block { /* one granule that allocations share */
    uintptr_t start;
    uint64_t key[2]; /* not 0: other processes may have it */
    bool backed;
    unsigned used; /* units */
    uint8_t taken[UNITS];
    struct block *next;
};

enum range_kind {
    RANGE_DEVICE,
    RANGE_MANAGED,
    RANGE_HOST,
    RANGE_REGISTERED,
    RANGE_POOL,
    RANGE_MAPPED,
    RANGE_GRAPH,
    RANGE_IPC,
    RANGE_DATA, /* of a module */
};

struct range {
    uintptr_t start;
    size_t size; /* as asked */
    size_t span; /* address space that goes back at free; 0: the block's */
    size_t physical;
    size_t backed; /* how far contents exist, from start */
    enum range_kind kind;
    int device;
    uint64_t id;
    uint64_t key[2]; /* not 0: other processes may have it, or it is theirs */
    bool is_foreign; /* RANGE_POOL: of an imported pool */
    struct context *context;
    struct block *block;
    struct vmm_handle *handle;
    struct pool *pool;
    uint16_t *places;          /* RANGE_MANAGED: of each granule the devices that it is on, as bits; NULL: on none */
    unsigned access;           /* RANGE_MAPPED: CUmemAccess_flags; RANGE_HOST: flags of its making */
    struct range *prev, *next; /* in its context */
};

struct driver {
    bool ready;
    int pid; /* who said cuInit: a forked child is not that process */
    uint32_t n_devices;
    struct sim_device devices[SIM_MAX_DEVICES];
    struct context primary[SIM_MAX_DEVICES];
    unsigned primary_refs[SIM_MAX_DEVICES];
    struct context *contexts;
    uint64_t next_id;
};

extern struct driver driver;

/* cuda_init.c */
CUresult sim_enter_init(void);                /* initialised and not forked; takes the lock */
CUresult sim_enter(struct context **current); /* and with a living current context */
CUresult sim_leave(CUresult result);          /* gives the lock back, returns its argument */
void sim_unlock(void);
void sim_lock(void);
int sim_ask(uint32_t op, struct sim_request request, void *payload, size_t room);
int sim_ask_file(uint32_t op, struct sim_request request, void *payload, size_t room, int *file); /* as link.h */
CUresult sim_result(int status); /* of a server that was asked for memory */
CUresult sim_take(struct context *context, int device, enum sim_kind kind, uint64_t bytes, uint64_t requested);
void sim_give(struct context *context, int device, enum sim_kind kind, uint64_t bytes, uint64_t requested);
bool sim_is_device(CUdevice device);

/* cuda_context.c */
struct context *context_current(void);
bool context_is_known(const struct context *context); /* alive or not */
CUresult primary_retain(int device);
void primary_leave(int device);

/* cuda_space.c */
static inline size_t granules(size_t size) { return (size + GRANULE - 1) / GRANULE * GRANULE; }
uintptr_t space_reserve(size_t size, size_t alignment, bool usable);
void space_return(uintptr_t start, size_t size);
struct range *range_find(uintptr_t at);
struct range *range_new(struct context *context, uintptr_t start, size_t size);
void range_drop(struct range *range);
void ranges_end(struct context *context);
uint8_t *range_touch(struct range *range, uintptr_t at, size_t length);
uintptr_t block_carve(struct context *context, size_t size, struct block **block);
bool block_has_room(struct context *context, size_t size);
bool block_return(struct context *context, struct block *block, uintptr_t start, size_t size);

/* cuda_memory.c */
CUresult memory_allocate(struct context *context, size_t size, CUdeviceptr *out);
CUresult memory_free(uintptr_t at);

/* cuda_share.c: what other processes may have is known by a key */
static inline bool has_key(const uint64_t *key) { return key[0] || key[1]; }
CUresult share_memory(struct sim_request request, void *start, size_t size, size_t filled, uint64_t *key);
CUresult share_range(struct range *range, uint64_t *key);
CUresult share_export(const uint64_t *key, uint32_t flags, int *descriptor);
CUresult share_import(int descriptor, enum sim_kind kind, struct sim_share *share, int *file);
CUresult share_open(const uint64_t *key, struct sim_share *share, int *file);
CUresult share_resize(const uint64_t *key, uint64_t bytes); /* of a pool */
void share_drop(const uint64_t *key);
void *share_map(int file, size_t size);

/* cuda_vmm.c */
CUresult vmm_key(const struct range *range, uint64_t *key); /* of the memory that is mapped there */

/* cuda_ipc.c */
void ipc_forget(struct range *range); /* of a context that ends */

/* cuda_managed.c: which managed memory is on a device */
void managed_touch(struct range *range, uintptr_t at, size_t size);
void managed_drop(struct range *range);

/* cuda_growth.c: what contexts take by themselves */
void growth_begins(struct context *context);
CUresult growth_limit(struct context *context, CUlimit limit, size_t value);
CUresult growth_code(struct context *context, bool has_malloc, bool has_printf);
CUresult growth_launch(struct context *context, const struct needs *needs);
CUresult growth_stream(struct context *context); /* one more */
void growth_stream_ends(struct context *context);
CUresult growth_nodes(struct context *context, uint64_t n);
void growth_nodes_end(struct context *context, uint64_t n);
CUresult growth_register(struct context *context, uint64_t bytes);
void growth_unregister(struct context *context, uint64_t bytes);

/* cuda_peer.c */
void peers_end(struct context *context);

/* cuda_array.c */
void arrays_end(const struct context *context);

/* cuda_pool.c */
void pool_freed(struct range *range);
void pools_settle(int device); /* what a synchronisation gives back */

/* cuda_time.c: moments of a context's own clock, which others' turns on the device make stand still */
uint64_t context_now(const struct context *context); /* at most */
uint64_t context_work(struct context *context, uint64_t ns, uint64_t from);
uint64_t context_start(const struct context *context, uint64_t from); /* of what begins now, not before `from` */
void context_lost(struct context *context, uint64_t at, uint64_t lost);
bool context_reached(struct context *context, uint64_t until);
void context_wait(struct context *context, uint64_t until); /* lets go of the lock meanwhile */
uint64_t context_real(const struct context *context, uint64_t at);
uint64_t context_translate(const struct context *from, const struct context *to, uint64_t at);

/* cuda_stream.c */
struct stream *stream_find(struct context *context, CUstream stream, bool per_thread);
uint64_t context_done_ns(const struct context *context);
CUresult stream_work(struct context *context, struct stream *stream, uint64_t ns, const struct party *party);
CUresult stream_copy(struct context *context, struct stream *stream, uint64_t ns, enum engine engine);
void stream_wait(struct context *context, struct stream *stream);
uint64_t stream_ready(const struct context *context, const struct stream *stream);
CUresult stream_enter(CUstream handle, bool per_thread, struct context **context, struct stream **stream);
void streams_end(struct context *context);

CUresult stream_enter_work(CUstream handle, bool per_thread, struct context **context, struct stream **stream);

/* cuda_lane.c: streams whose work the server does */
bool lane_reached(struct context *context, uint64_t lane, uint64_t index);
void lane_wait(struct context *context, uint64_t lane, uint64_t index); /* lets go of the lock meanwhile */
void lanes_wait(struct context *context);                               /* likewise */
bool lane_is_used(struct context *context, struct stream *stream);
CUresult lane_queue(struct context *context, struct stream *stream, uint64_t ns, const struct party *party);

/* cuda_event.c */
void events_end(struct context *context);

/* cuda_capture.c */
CUresult capture_permits(void); /* or 900, and the captures that forbid it are broken: for potentially unsafe calls */
CUresult capture_permits_use(struct stream *stream);       /* of a stream, for work or for questions about its work */
CUresult capture_permits_waiting(struct context *context); /* for all work of a context */
void capture_break(struct capture *capture);
void capture_abandon(struct stream *stream); /* that is about to be destroyed */
void captures_end(struct context *context);
bool capture_is_alive(const struct capture *capture, uint64_t id);
uint64_t capture_id(const struct capture *capture);
CUresult tail_join(struct tail *tail, const struct tail *more);
CUresult tail_copy(struct tail *tail, const struct tail *from);
void tail_clear(struct tail *tail);

/* cuda_graph_memory.c */
CUresult graph_memory_free(struct range *range);
bool graph_memory_is_live(const struct range *range);
void graph_memory_end(int device);

/* cuda_module.c */
void modules_end(struct context *context);
CUresult kernel_check(struct context *context, CUfunction handle, const struct shape *shape, bool cooperates,
                      struct kernel_run *run);
CUresult kernel_begin(struct context *context, struct stream *stream, const struct kernel_run *run);
CUresult kernel_launch(CUfunction handle, struct shape shape, CUstream stream, bool per_thread, bool cooperates);
bool block_is_possible(int device, const unsigned *block); /* of threads in three directions */

#endif
