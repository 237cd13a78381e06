/* The server's state: devices, and a slot for each connected process with what it holds. All of it has a fixed size or
 * is bounded by SIM_MAX_CLIENTS and SIM_MAX_CONTEXTS. */
#ifndef FGPU_SIM_SERVER_STATE_H
#define FGPU_SIM_SERVER_STATE_H

#include "wire/wire.h"

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define MAX_DEPTH 32  /* nested pid namespaces; the kernel has the same bound */
#define MAX_LEVELS 32 /* nested cgroups; deeper ones are not told apart */

/* The pid of a process in each pid namespace from the server's (level 0) to its own (level depth - 1), and the inode of
 * each namespace. They do not change while the process lives. */
struct identity {
    int depth;
    pid_t pid[MAX_DEPTH];
    ino_t ns[MAX_DEPTH];
};

struct holding {
    uint64_t bytes[SIM_KINDS];
    uint64_t shared[SIM_KINDS]; /* the part of bytes that is released when the share is dropped */
    uint64_t requested[SIM_KINDS];
};

struct context {
    uint64_t id;
    uint32_t device;
    struct holding holding;
};

/* A client's memory belongs to its open connection, not to its process. After the process has ended, a forked child, an
 * executed program or a socket's queue may still have the descriptor. */
enum client_state {
    CLIENT_FREE,
    CLIENT_OPEN,   /* some process or queue has the other end of the connection */
    CLIENT_CLOSED, /* the last descriptor of the other end was closed; the memory is freed at free_at_ns */
};

enum process_state { IS_RUNNING, IS_LOCKED, IS_CHECKPOINTED, IS_FAILED }; /* the values of CUprocessState */

/* What other processes do with a process by cuCheckpointProcess*. */
struct checkpoint {
    struct sim_gate *gate; /* NULL: the process cannot be locked */
    enum process_state state;
    bool is_busy; /* a call is in progress */
    uint32_t call;
    struct client *caller; /* NULL: the caller has gone; the call goes on */
    uint64_t until_ns;     /* of a lock; 0: it has no time-out */
};

struct client {
    enum client_state state;
    int sock;
    int pidfd;
    uint64_t closed_at_ns, free_at_ns; /* CLIENT_CLOSED: since when, and when the driver has freed the memory */
    struct identity process;
    bool has_ended; /* the process has ended; no request is served any more */
    bool attached;
    bool uses_nvml;
    bool own_user;          /* the client may ask for the dump */
    bool is_root;           /* the client may set faults */
    bool is_stale;          /* the client's descriptions of the devices are older than the loss of the devices */
    uint32_t stale_devices; /* the same for single devices, one bit each */
    bool met_ecc;           /* an uncorrectable memory error has ended the client's work */
    bool is_held;           /* a request waits for the end of a stall */
    bool is_parked;         /* the process is checkpointed: its memory is not on the devices */
    struct sim_request held;
    int held_file;                       /* the descriptor that came with it, or -1 */
    struct holding own[SIM_MAX_DEVICES]; /* memory that belongs to no context */
    uint64_t resident[SIM_MAX_DEVICES];  /* managed memory that is on the device */
    struct context *contexts;
    uint32_t n_contexts, room;
    uint32_t devices[SIM_MAX_DEVICES]; /* the device that the process uses as each one; its requests have the latter */
    struct checkpoint checkpoint;
    ino_t cgroups[MAX_LEVELS]; /* the cgroups around the process, when the server last looked */
    uint32_t n_cgroups;
};

struct gpu {
    struct sim_device info;
    uint64_t used;
    uint64_t driver;   /* the part of used that is in no process's row */
    uint64_t exported; /* the part of driver that several processes may hold */
    uint64_t resident; /* managed memory of all clients; the device allocates it in whole chunks */
    uint64_t n_xids;
    uint32_t xids[SIM_KEPT_XIDS]; /* the last XIDs; number n is at index n modulo SIM_KEPT_XIDS */
};

struct server {
    struct gpu gpus[SIM_MAX_DEVICES];
    uint32_t n_gpus;
    bool has_limits;   /* the driver has limits of cgroups */
    uint32_t parallel; /* contexts run side by side, and two take this percentage of their time; 0: they alternate */
    struct client clients[SIM_MAX_CLIENTS];
    uint32_t n_closed;   /* clients in state CLIENT_CLOSED */
    uint32_t n_attached; /* clients that have called cuInit */
    uint32_t n_held;     /* clients that wait for the end of a stall */
    uint32_t n_busy;     /* clients for which a call of cuCheckpointProcess* is in progress */
    int epoll;
};

/* state.c */

extern struct server server;

/* Returns the time of CLOCK_MONOTONIC. */
uint64_t now_ns(void);

/* faults.c: the faults that are set */

#define MAX_FAULTS 8 /* in one specification */

struct fault_order {
    enum sim_fault fault;
    uint64_t number;
    uint32_t device;
};

/* Sets a fault. fault_set does the same, and applies the fault to clients. */
void fault_record(uint32_t fault, uint32_t device, uint64_t number);
/* Returns the first XID of the device after the first `known` of them. */
struct sim_xid fault_xid(uint32_t device, uint64_t known);
/* Returns when the stall of NVML ends. */
uint64_t fault_nvml_until_ns(void);
/* Returns how much longer than usual the memory of a process outlives it. */
uint64_t fault_end_takes_ns(void);
/* Returns whether NVML has no value for the memory of a process. */
bool fault_nvml_is_blind(void);
bool fault_nvml_is_gone(void);
bool fault_devices_are_lost(void);
bool fault_is_lost(uint32_t device);
/* Counts a call of the function, and returns whether it fails. */
bool fault_call_fails(uint32_t call);
bool fault_call_hangs(uint32_t call);
bool fault_call_loses(uint32_t call);
/* Counts an allocation of this kind, and returns whether it fails. */
bool fault_fails(uint32_t kind);

/* fault_spec.c */

/* Parses a specification into at most MAX_FAULTS orders. Returns their number, or 0 after a message on stderr. */
unsigned fault_parse(const char *spec, struct fault_order *orders);
/* Sends a specification to the server in `dir`. Returns the exit status. */
int fault_send(const char *dir, const char *spec);

/* ledger.c: the bytes that each client holds on each device */

enum sim_status ledger_attach(struct client *client);
/* Takes memory, or opens a context. Changes nothing if it fails. */
enum sim_status ledger_take(struct client *client, const struct sim_request *request);
/* Releases memory. Returns false if the client holds less. */
bool ledger_give(struct client *client, const struct sim_request *request);
/* Turns memory of the process that its row shows into memory that no row shows. Returns false if it has less. */
bool ledger_unlist(struct client *client, const struct sim_request *request);
/* Returns whether the request names a context of the client on the request's device. */
bool ledger_has_context(struct client *client, const struct sim_request *request);
void ledger_close(struct client *client, uint64_t context);
/* Releases everything that a client holds except managed memory. */
void ledger_forget(struct client *client);
/* Takes everything that a client holds off the devices; the client's figures remain. ledger_unpark does the reverse, or
 * changes nothing if there is no room. */
void ledger_park(struct client *client);
bool ledger_unpark(struct client *client);
/* Lets a checkpointed client have on device to[i] what it had on device i. */
void ledger_move(struct client *client, const uint32_t *to);
/* Returns how many bytes of all devices a client holds. */
uint64_t ledger_bytes(const struct client *client);
/* Returns whether a client has allocated managed memory. */
bool ledger_has_managed(const struct client *client);
/* Returns whether the device has room for so many bytes more. */
bool ledger_fits(uint32_t device, uint64_t bytes);
/* Returns whether memory of this kind is in the row of the process that has it. */
bool ledger_is_listed(uint32_t kind);
/* Returns where memory of the kind is counted; NULL: the context is not the client's, or is on another device. */
struct holding *ledger_holding(struct client *client, uint32_t device, uint32_t kind, uint64_t context);
/* Counts bytes that several processes may hold as memory of no process; ledger_name does the reverse. */
void ledger_unname(uint32_t device, uint64_t bytes);
void ledger_name(uint32_t device, uint64_t bytes);
/* Takes such bytes from the device. Returns false if the device has no room. */
bool ledger_take_unnamed(uint32_t device, uint64_t bytes);
void ledger_free_unnamed(uint32_t device, uint64_t bytes);

/* local_memory.c */

/* Sets how many bytes of local memory per thread a context has room for. */
enum sim_status local_set(struct client *client, const struct sim_request *request);

/* managed_memory.c */

/* Sets how many bytes of the client's managed memory are on the device. */
enum sim_status managed_set(struct client *client, uint32_t device, uint64_t bytes);
/* Returns how many bytes the device has allocated for managed memory. */
uint64_t managed_bytes(uint32_t device);
void managed_leave(struct client *client);

/* shared_memory.c: memory of several processes. The caller keeps the descriptors that it passes; the server keeps those
 * that it returns. */

#define TAG_EXPORT                                                                                                     \
    (1ull << 32) /* the epoll tag of the event that an exported descriptor was closed by its last owner */
enum sim_status share_new(struct client *client, const struct sim_request *request, int file, struct sim_share *out);
enum sim_status share_open(struct client *client, const uint64_t *key, struct sim_share *out, int *file);
enum sim_status share_import(struct client *client, uint32_t kind, int descriptor, struct sim_share *out, int *file);
enum sim_status share_export(const struct client *client, const uint64_t *key, bool is_range, int *descriptor);
/* Sets how many bytes of a pool its maker has reserved. */
enum sim_status share_resize(struct client *client, const uint64_t *key, uint64_t bytes);
/* Returns false if the client does not hold the memory. */
bool share_drop(struct client *client, const uint64_t *key);
bool share_is_holder(const struct client *client);
void share_export_ends(uint32_t index);
void shares_leave_context(struct client *client, uint64_t context);
void shares_leave(struct client *client);
void shares_end(void);

/* utilization.c: how long each client's kernels ran on a device in the last second */

void meter_ran(uint32_t device, const struct client *client, uint64_t from_ns, uint64_t until_ns);
uint32_t meter_busy_us(uint32_t device, const struct client *client);
void meter_leave(const struct client *client);

/* queues.c: streams with kernels that run only together with others */

bool queues_any(void);
/* Adds work, and returns its index. Returns 0 if the queue is full, UINT64_MAX if the work is impossible. */
uint64_t queue_add(const struct client *client, const struct sim_request *request);
/* Returns the index of the last work that is done; UINT64_MAX: there is no such queue. */
uint64_t queue_done(const struct client *client, const struct sim_request *request);
/* Returns when the work with the requested index was done, by the context's clock; 0: it is unknown. */
uint64_t queue_done_ns(const struct client *client, const struct sim_request *request);
/* Returns for how long nothing will begin or end in the queues of a context. */
uint64_t queues_steady_ns(uint32_t device, const struct client *client, uint64_t context, uint64_t clock_ns);
/* Runs the queues of a context for `ns`, until clock_ns. Returns how many have work left. */
uint32_t queues_run(uint32_t device, const struct client *client, uint64_t context, uint64_t clock_ns, uint64_t ns);
/* Removes the queues of a context; 0: of all contexts of the client. */
void queues_leave(const struct client *client, uint64_t context);

/* scheduler.c: which context runs on a device */

/* Advances the device's timeline to the present. */
void turns_catch_up(uint32_t device);
struct sim_time turns_work(struct client *client, const struct sim_request *request);
struct sim_time turns_look(const struct client *client, const struct sim_request *request);
struct sim_queue turns_queue(struct client *client, const struct sim_request *request);
struct sim_queue turns_look_queue(const struct client *client, const struct sim_request *request);
/* Returns whether the client has work on any device. */
bool turns_has_work(const struct client *client);
/* Kills the work of a context; 0: of all contexts of the client. */
void turns_leave(const struct client *client, uint64_t context);

/* views.c: the information about other processes that a process may read */

/* Returns the pid of a client in the pid namespace of another client; 0: it is not visible there. */
pid_t view_pid(const struct client *of, const struct client *asker);
/* Fills in the rows of the device's processes that the asker may see, and returns their number. */
uint32_t view_processes(const struct client *asker, uint32_t device, struct sim_process *out, uint32_t room);
/* Returns the bytes in the row of a client. */
uint64_t view_bytes(const struct client *client, uint32_t device);
uint32_t view_dump(struct sim_record *out, uint32_t room);
/* Returns for how many microseconds of the last second kernels ran. */
uint64_t view_busy_us(uint32_t device);

/* cgroups.c */

/* Returns the number of the cgroups that a process is in, and their inodes, outermost first; 0: they are unknown. */
uint32_t cgroups_around(pid_t pid, ino_t *inodes);
/* Returns the inode of a cgroup, or 0 if the descriptor is not the folder of one that exists. */
ino_t cgroup_inode(int folder);

/* limits.c: limits of cgroups on the memory of a device. Without a limit, none of these functions costs anything. */

/* The caller keeps the folder. */
enum sim_status limits_set(const struct client *client, const struct sim_request *request, int folder);
enum sim_status limits_get(uint32_t device, int folder, struct sim_limits *out);
/* Returns whether a client may have so many bytes more. */
bool limits_allow(struct client *client, uint32_t device, uint64_t bytes);
/* Returns whether a checkpointed client may have its memory again. */
bool limits_allow_return(struct client *client);
/* ledger_take within the limits. */
enum sim_status limits_take(struct client *client, const struct sim_request *request);

/* teardown.c */

/* Ends a context. Returns false if it is not the client's. */
bool teardown_context(struct client *client, const struct sim_request *request);
/* Frees everything that a client holds. */
void teardown_client(struct client *client);

/* checkpoint.c: what one process does with another by cuCheckpointProcess* */

/* Creates the gate of a client. Returns a descriptor of its memory, or -1. */
int checkpoint_gate(struct client *client);
/* Begins a call. Returns true if it is in progress; otherwise *status and *result have its result. */
bool checkpoint_begin(struct client *caller, const struct sim_request *request, enum sim_status *status,
                      uint32_t *result);
/* Advances the call for a client. Returns true if it has ended; *caller may be NULL. */
bool checkpoint_step(struct client *target, struct client **caller, enum sim_status *status);
/* Forgets a client as a caller. */
void checkpoint_caller_ends(const struct client *caller);
void checkpoint_end(struct client *client);

/* clients.c */

void client_accept(int listener);
/* Serves no request of the client any more. The memory remains while the connection does. */
void client_process_ends(struct client *client);
/* Ends the connection. The memory is freed later. */
void client_close(struct client *client);
/* Frees the client and its memory at once. */
void client_free(struct client *client);
/* Sets whether the server reads requests of the client. It always detects the end of the connection. */
void client_listen(const struct client *client, bool listens);
/* Frees the closed clients whose free_at_ns has passed. */
void client_sweep(void);
/* Returns the milliseconds until the server has to act without an event; -1: it need not. */
int client_timeout_ms(void);
/* Closes the connection of a client that violated the protocol. */
void client_drop(struct client *client, const char *why);
void clients_lose_devices(void);
void clients_lose_device(uint32_t device);
void clients_lose_nvml(void);
void clients_cut_nvml(void);
void clients_meet_ecc(void);

/* fault_effects.c */

void fault_set(uint32_t fault, uint32_t device, uint64_t number);
/* Sets the faults of the server's environment. Returns -1 after a message on stderr; NULL: there are none. */
int fault_start(const char *spec);

/* requests.c */

/* Reads and answers one request. `is_hung_up`: the other end of the connection is closed. */
void request_serve(struct client *client, bool is_hung_up);
/* Answers the requests whose stall is over. */
void requests_held_serve(void);
/* Answers the calls of cuCheckpointProcess* that have ended. */
void requests_checkpoints_serve(void);

/* dump.c */

/* Prints the ledger of the server in `dir`. Returns the exit status. */
int dump_print(const char *dir);

#endif
