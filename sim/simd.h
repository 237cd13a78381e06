/* The server's state: devices, and one slot per connected process with what it holds. All of it is fixed in size or
 * bounded by SIM_MAX_CLIENTS and SIM_MAX_CONTEXTS; nothing else grows. */
#ifndef FGPU_SIM_SIMD_H
#define FGPU_SIM_SIMD_H

#include "wire.h"

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define MAX_DEPTH 32 /* nested pid namespaces: the kernel's own bound */

/* A process's pid in each pid namespace from the server's own (level 0) down to its own (depth - 1), with the inodes
 * that tell the namespaces apart. Fixed for the life of a process. */
struct identity {
    int depth;
    pid_t pid[MAX_DEPTH];
    ino_t ns[MAX_DEPTH];
};

struct holding {
    uint64_t bytes[SIM_KINDS];
    uint64_t shared[SIM_KINDS]; /* of them; given back by dropping the share */
    uint64_t requested[SIM_KINDS];
};

struct context {
    uint64_t id;
    uint32_t device;
    struct holding holding;
};

/* A client's memory belongs to its open connection, not to its process: a forked child, an executed program or a
 * socket's queue may keep the descriptor of it after the process has ended. */
enum client_state {
    CLIENT_FREE,
    CLIENT_OPEN,   /* some process or queue has the other end of the connection */
    CLIENT_CLOSED, /* the last descriptor of it was closed; the memory goes at free_at_ns */
};

struct client {
    enum client_state state;
    int sock;
    int pidfd;
    uint64_t free_at_ns; /* CLIENT_CLOSED: when the driver is done cleaning up */
    struct identity process;
    bool has_ended; /* its process; nothing more is served */
    bool attached;
    bool own_user;          /* may ask for the dump */
    bool is_root;           /* may order faults */
    bool is_stale;          /* knows the devices as they were before they were lost */
    uint32_t stale_devices; /* the same of single devices, a bit each */
    bool met_ecc;           /* an error that ends whatever it computes */
    bool is_held;           /* a request of NVML waits for the end of a stall */
    struct sim_request held;
    struct holding own[SIM_MAX_DEVICES]; /* what belongs to no context */
    uint64_t resident[SIM_MAX_DEVICES];  /* managed memory that is on the device */
    struct context *contexts;
    uint32_t n_contexts, room;
};

struct gpu {
    struct sim_device info;
    uint64_t used;
    uint64_t driver;   /* of it, what is in no process's row */
    uint64_t exported; /* of that, what several processes may hold */
    uint64_t resident; /* managed memory of all clients, which takes whole chunks */
    uint64_t n_xids;
    uint32_t xids[SIM_KEPT_XIDS]; /* the last ones, each at its number modulo their room */
};

struct server {
    struct gpu gpus[SIM_MAX_DEVICES];
    uint32_t n_gpus;
    struct client clients[SIM_MAX_CLIENTS];
    uint32_t n_closed;   /* clients whose memory is about to go */
    uint32_t n_attached; /* clients that said cuInit */
    uint32_t n_held;     /* clients that wait for the end of a stall */
    int epoll;
};

extern struct server server;

uint64_t now_ns(void);

/* clients.c */
void client_accept(int listener);
void client_process_ends(
    struct client *client);               /* nothing more is served; the memory stays while the connection does */
void client_close(struct client *client); /* the connection is gone; the memory goes later */
void client_free(struct client *client);  /* with all its memory, at once */
void client_listen(const struct client *client, bool listens); /* for requests; the connection's end is always heard */
void client_sweep(void);                                       /* frees what is due */
int client_timeout_ms(void);                                   /* until the next one is due; -1: none */
void client_drop(struct client *client, const char *why);      /* it broke the protocol */
void clients_lose_devices(void);
void clients_lose_device(uint32_t device);
void clients_lose_nvml(void);
void clients_meet_ecc(void);

/* ledger.c */
enum sim_status ledger_attach(struct client *client);
enum sim_status ledger_take(struct client *client, const struct sim_request *request);
bool ledger_give(struct client *client, const struct sim_request *request);
bool ledger_close(struct client *client, const struct sim_request *request);
void ledger_forget(struct client *client);

bool ledger_fits(uint32_t device, uint64_t bytes);
bool ledger_is_listed(uint32_t kind);
struct holding *ledger_holding(struct client *client, uint32_t device, uint32_t kind, uint64_t context);
void ledger_unname(uint32_t device, uint64_t bytes); /* in no process's row any more, and again */
void ledger_name(uint32_t device, uint64_t bytes);
bool ledger_take_unnamed(uint32_t device, uint64_t bytes); /* from the device; false: it has no room */
void ledger_free_unnamed(uint32_t device, uint64_t bytes);

/* local.c */
enum sim_status local_set(struct client *client, const struct sim_request *request);

/* managed.c */
enum sim_status managed_set(struct client *client, uint32_t device, uint64_t bytes);
uint64_t managed_bytes(uint32_t device); /* what the device has given out for it */
void managed_leave(struct client *client);

/* shares.c: memory of several processes. Descriptors that come in stay the caller's, those that go out too. */
#define TAG_EXPORT (1ull << 32) /* of the event that says that an exported descriptor was closed for the last time */
enum sim_status share_new(struct client *client, const struct sim_request *request, int file, struct sim_share *out);
enum sim_status share_open(struct client *client, const uint64_t *key, struct sim_share *out, int *file);
enum sim_status share_import(struct client *client, uint32_t kind, int descriptor, struct sim_share *out, int *file);
enum sim_status share_export(const struct client *client, const uint64_t *key, bool is_range, int *descriptor);
enum sim_status share_resize(struct client *client, const uint64_t *key, uint64_t bytes);
bool share_drop(struct client *client, const uint64_t *key);
void share_export_ends(uint32_t index);
void shares_leave_context(struct client *client, uint64_t context);
void shares_leave(struct client *client);
void shares_end(void);

/* views.c */
pid_t view_pid(const struct client *of, const struct client *asker); /* 0: not visible */
uint32_t view_processes(const struct client *asker, uint32_t device, struct sim_process *out, uint32_t room);
uint32_t view_dump(struct sim_record *out, uint32_t room);
uint64_t view_busy_us(uint32_t device);

/* meters.c: who ran on a device, of the last second */
void meter_ran(uint32_t device, const struct client *client, uint64_t from_ns, uint64_t until_ns);
uint32_t meter_busy_us(uint32_t device, const struct client *client);
void meter_leave(const struct client *client);

/* turns.c: whose turn it is on a device */
void turns_catch_up(uint32_t device);
struct sim_time turns_work(struct client *client, const struct sim_request *request);
struct sim_time turns_look(const struct client *client, const struct sim_request *request);
struct sim_lane turns_queue(struct client *client, const struct sim_request *request);
struct sim_lane turns_look_queue(const struct client *client, const struct sim_request *request);
void turns_leave(const struct client *client, uint64_t context); /* 0: all of them */

/* lanes.c: streams with kernels that run only together with others */
bool lanes_any(void);
uint64_t lane_add(const struct client *client, const struct sim_request *request);
uint64_t lane_done(const struct client *client, const struct sim_request *request);
uint64_t lanes_steady_ns(uint32_t device, const struct client *client, uint64_t context, uint64_t clock_ns);
uint32_t lanes_run(uint32_t device, const struct client *client, uint64_t context, uint64_t clock_ns, uint64_t ns);
void lanes_leave(const struct client *client, uint64_t context); /* 0: all of them */

/* requests.c */
void request_serve(struct client *client, bool is_hung_up);
void requests_held_serve(void); /* those whose stall is over */

/* faults.c */
int fault_start(const char *spec); /* -1: not understood, and said so */
int fault_send(const char *dir, const char *spec);
void fault_set(uint32_t fault, uint32_t device, uint64_t number);
struct sim_xid fault_xid(uint32_t device, uint64_t known);
uint64_t fault_nvml_until_ns(void);
uint64_t fault_end_takes_ns(void);
bool fault_nvml_is_blind(void);
bool fault_nvml_is_gone(void);
bool fault_devices_are_lost(void);
bool fault_is_lost(uint32_t device);
bool fault_fails(uint32_t kind);

/* dump.c */
int dump_print(const char *dir);

#endif
