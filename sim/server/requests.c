/* Answers one request with one reply. The socket never blocks: a client that does not read its reply is dropped. */
#include "server/state.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_RECORDS (SIM_MAX_CLIENTS + SIM_MAX_DEVICES)

/* One buffer for every payload: the server answers one request at a time. */
static union {
    struct sim_device device;
    struct sim_memory memory;
    struct sim_process processes[SIM_MAX_CLIENTS];
    struct sim_record records[MAX_RECORDS];
    struct sim_share share;
    struct sim_time time;
    struct sim_queue queue;
    struct sim_xid xid;
    struct sim_limits limits;
    uint32_t result;
} payload;

struct answer {
    enum sim_status status;
    uint32_t count;
    size_t size;       /* of the payload */
    int file;          /* 0: no descriptor is sent with the answer */
    bool is_ours;      /* the server closes the descriptor when it is sent */
    bool is_later;     /* there is no answer yet */
    const char *wrong; /* not NULL: how the client violates the protocol */
};

static struct answer answer_memory(uint32_t device)
{
    const struct gpu *gpu = &server.gpus[device];
    payload.memory = (struct sim_memory){.total = gpu->info.memory_total,
                                         .reserved = gpu->info.memory_reserved,
                                         .used = gpu->used,
                                         .busy_us = view_busy_us(device)};
    return (struct answer){.size = sizeof payload.memory};
}

static struct answer answer_processes(const struct client *client, const struct sim_request *request)
{
    uint32_t n = 0;
    if (!(request->flags & SIM_FLAG_FOREIGN_PROC))
        n = view_processes(client, request->device, payload.processes, SIM_MAX_CLIENTS);
    for (uint32_t i = 0; fault_nvml_is_blind() && i < n; i++) payload.processes[i].bytes = UINT64_MAX;
    return (struct answer){.count = n, .size = n * sizeof *payload.processes};
}

static struct answer answer_dump(const struct client *client)
{
    if (!client->own_user) return (struct answer){.status = SIM_NOT_ALLOWED};
    uint32_t n = view_dump(payload.records, MAX_RECORDS);
    return (struct answer){.count = n, .size = n * sizeof *payload.records};
}

static struct answer answer_fault(const struct client *client, const struct sim_request *request)
{
    if (!client->is_root) return (struct answer){.status = SIM_NOT_ALLOWED};
    if (request->kind >= SIM_FAULTS) return (struct answer){.wrong = "unknown fault"};
    bool is_of_one = request->kind == SIM_FAULT_XID || request->kind == SIM_FAULT_ONE_LOST;
    if (is_of_one && request->device >= server.n_gpus) return (struct answer){.status = SIM_NO_DEVICE};
    fault_set(request->kind, request->device, request->bytes);
    return (struct answer){0};
}

static struct answer answer_xid(const struct sim_request *request)
{
    payload.xid = fault_xid(request->device, request->requested);
    return (struct answer){.size = sizeof payload.xid};
}

static struct answer answer_share(struct client *client, const struct sim_request *request, int sent)
{
    const uint64_t key[2] = {request->context, request->requested};
    struct answer a = {.size = sizeof payload.share};
    switch (request->op) {
    case SIM_SHARE:
        a.status = share_new(client, request, sent, &payload.share);
        break;
    case SIM_OPEN:
        a.status = share_open(client, key, &payload.share, &a.file);
        break;
    case SIM_IMPORT:
        a.status = share_import(client, request->kind, sent, &payload.share, &a.file);
        break;
    case SIM_EXPORT:
        a.status = share_export(client, key, request->flags & SIM_FLAG_RANGE, &a.file);
        a.is_ours = true;
        a.size = 0;
        break;
    case SIM_RESIZE:
        a.status = share_resize(client, key, request->bytes);
        a.size = 0;
        break;
    default:
        a.size = 0;
        a.wrong = share_drop(client, key) ? NULL : "drops memory that it does not share";
    }
    if (a.status) a = (struct answer){.status = a.status};
    uint32_t device = payload.share.device; /* the client has its own numbers of the devices */
    for (uint32_t i = 0; a.size && i < server.n_gpus; i++)
        if (client->devices[i] == device) payload.share.device = i;
    return a;
}

static struct answer answer_work(struct client *client, const struct sim_request *request)
{
    struct sim_request work = *request;
    if (work.bytes > 3600000000u) work.bytes = 0; /* an hour: a longer kernel is an error of the test */
    if (work.op == SIM_QUEUE) {
        payload.queue = turns_queue(client, &work);
        return (struct answer){.size = sizeof payload.queue};
    }
    payload.time = turns_work(client, &work);
    return (struct answer){.size = sizeof payload.time};
}

static struct answer answer_look(const struct client *client, const struct sim_request *request)
{
    if (request->op == SIM_LOOK_QUEUE) {
        payload.queue = turns_look_queue(client, request);
        return (struct answer){.size = sizeof payload.queue};
    }
    payload.time = turns_look(client, request);
    return (struct answer){.size = sizeof payload.time};
}

static struct answer answer_attach(struct client *client)
{
    struct answer a = {.status = ledger_attach(client)};
    int file = client->checkpoint.gate ? -1 : checkpoint_gate(client);
    if (file >= 0) a.file = file;
    a.is_ours = file >= 0;
    return a;
}

static struct answer answer_checkpoint(struct client *client, const struct sim_request *request)
{
    struct answer a = {.size = sizeof payload.result};
    if (request->kind >= SIM_CHECKPOINTS) return (struct answer){.wrong = "unknown call for another process"};
    payload.result = 0;
    a.is_later = checkpoint_begin(client, request, &a.status, &payload.result);
    return a;
}

static struct answer answer_limits(const struct client *client, const struct sim_request *request, int sent)
{
    if (request->op == SIM_SET_LIMITS) return (struct answer){.status = limits_set(client, request, sent)};
    enum sim_status status = limits_get(request->device, sent, &payload.limits);
    return (struct answer){.status = status, .size = status ? 0 : sizeof payload.limits};
}

/* Returns whether the message requests memory. */
static bool is_taking(const struct client *client, const struct sim_request *request)
{
    if (request->op == SIM_RESIDENT) return request->bytes > client->resident[request->device];
    return request->op == SIM_TAKE || request->op == SIM_SET_LOCAL;
}

/* Returns whether the request fails because a device is lost. Called for requests to the driver, not for the dump. */
static bool is_lost_on(const struct client *client, const struct sim_request *request)
{
    bool is_stale = client->is_stale || client->stale_devices >> request->device & 1;
    if (request->flags & SIM_FLAG_NVML) return fault_is_lost(request->device) || fault_nvml_is_gone() || is_stale;
    if (request->op == SIM_ATTACH) return fault_devices_are_lost();
    return fault_is_lost(request->device) && is_taking(client, request);
}

static struct answer answer(struct client *client, const struct sim_request *named, int sent)
{
    if (named->op == SIM_HELLO) return (struct answer){.count = server.n_gpus};
    if (named->op == SIM_DUMP) return answer_dump(client);
    if (named->op == SIM_FAULT) return answer_fault(client, named);
    if (named->op == SIM_CHECKPOINT) return answer_checkpoint(client, named);
    if (client->is_parked) return (struct answer){.wrong = "uses devices while it is checkpointed"};
    if (named->device >= server.n_gpus) return (struct answer){.status = SIM_NO_DEVICE};
    struct sim_request at = *named, *request = &at;
    at.device = client->devices[named->device];
    if (request->kind >= SIM_KINDS) return (struct answer){.wrong = "unknown kind of memory"};
    if (is_lost_on(client, request)) return (struct answer){.status = SIM_LOST};
    if (client->met_ecc && is_taking(client, request)) return (struct answer){.status = SIM_ECC};
    switch (request->op) {
    case SIM_SHARE:
    case SIM_OPEN:
    case SIM_EXPORT:
    case SIM_IMPORT:
    case SIM_DROP:
    case SIM_RESIZE:
        return answer_share(client, request, sent);
    case SIM_DEVICE:
        payload.device = server.gpus[request->device].info;
        return (struct answer){.size = sizeof payload.device};
    case SIM_ATTACH:
        return answer_attach(client);
    case SIM_TAKE:
        return (struct answer){.status = limits_take(client, request)};
    case SIM_SET_LOCAL:
        return (struct answer){.status = local_set(client, request)};
    case SIM_RESIDENT:
        return (struct answer){.status = managed_set(client, request->device, request->bytes)};
    case SIM_GIVE:
        return (struct answer){.wrong = ledger_give(client, request) ? NULL : "releases more than it holds"};
    case SIM_UNLIST:
        return (struct answer){.wrong = ledger_unlist(client, request) ? NULL : "unlists more than it holds"};
    case SIM_CLOSE:
        return (struct answer){.wrong =
                                   teardown_context(client, request) ? NULL : "closes a context that is not its own"};
    case SIM_MEMORY:
        return answer_memory(request->device);
    case SIM_PROCESSES:
        return answer_processes(client, request);
    case SIM_XID:
        return answer_xid(request);
    case SIM_SET_LIMITS:
    case SIM_GET_LIMITS:
        return answer_limits(client, request, sent);
    case SIM_WORK:
    case SIM_QUEUE:
        return answer_work(client, request);
    case SIM_LOOK:
    case SIM_LOOK_QUEUE:
        return answer_look(client, request);
    default:
        return (struct answer){.wrong = "unknown request"};
    }
}

/* Room for one descriptor beside a message. */
union control {
    char bytes[CMSG_SPACE(sizeof(int))];
    struct cmsghdr align;
};

static void attach(struct msghdr *message, union control *control, int file)
{
    message->msg_control = control;
    message->msg_controllen = sizeof *control;
    struct cmsghdr *header = CMSG_FIRSTHDR(message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof file);
    memcpy(CMSG_DATA(header), &file, sizeof file);
}

static void send_answer(struct client *client, uint32_t op, struct answer a)
{
    if (a.wrong) {
        client_drop(client, a.wrong);
        return;
    }
    struct sim_reply reply = {.magic = SIM_MAGIC, .op = op, .status = a.status, .count = a.count};
    struct iovec parts[2] = {{&reply, sizeof reply}, {&payload, a.size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    union control control = {0};
    if (a.file) attach(&message, &control, a.file);
    if (sendmsg(client->sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        client_drop(client, "does not read its replies");
    if (a.is_ours) close(a.file);
}

static void reply_to(struct client *client, const struct sim_request *request, int sent)
{
    struct answer a = answer(client, request, sent);
    if (!a.is_later) send_answer(client, request->op, a);
}

void requests_checkpoints_serve(void)
{
    for (struct client *c = server.clients; c < server.clients + SIM_MAX_CLIENTS && server.n_busy; c++) {
        struct answer a = {.size = sizeof payload.result};
        struct client *caller;
        if (!c->checkpoint.is_busy || !checkpoint_step(c, &caller, &a.status)) continue;
        payload.result = 0;
        if (caller) send_answer(caller, SIM_CHECKPOINT, a);
    }
}

static bool must_wait(const struct sim_request *request)
{
    if (request->op == SIM_CHECKPOINT) return request->kind < SIM_CHECKPOINTS && fault_call_hangs(request->kind);
    return request->flags & SIM_FLAG_NVML && now_ns() < fault_nvml_until_ns();
}

static void hold(struct client *client, const struct sim_request *request, int sent)
{
    client->held = *request;
    client->held_file = sent >= 0 ? fcntl(sent, F_DUPFD_CLOEXEC, 0) : -1;
    client->is_held = true;
    server.n_held++;
    client_listen(client, false);
}

void requests_held_serve(void)
{
    for (struct client *c = server.clients; c < server.clients + SIM_MAX_CLIENTS && server.n_held; c++) {
        if (c->state != CLIENT_OPEN || !c->is_held || must_wait(&c->held)) continue;
        c->is_held = false;
        server.n_held--;
        client_listen(c, true);
        int file = c->held_file;
        reply_to(c, &c->held, file);
        if (file >= 0) close(file);
    }
}

/* Returns the result of a recv(), and a descriptor that came with the message, or -1. */
static ssize_t receive(int sock, struct sim_request *request, int *sent)
{
    union control control = {0};
    struct iovec part = {request, sizeof *request};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(sock, &message, MSG_DONTWAIT | MSG_TRUNC | MSG_CMSG_CLOEXEC);
    const struct cmsghdr *header = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    *sent = -1;
    if (header && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS)
        memcpy(sent, CMSG_DATA(header), sizeof *sent);
    return got;
}

static void serve(struct client *client, const struct sim_request *request, ssize_t got, int sent)
{
    if (got != sizeof *request || request->magic != SIM_MAGIC)
        client_drop(client, "malformed request");
    else if (must_wait(request))
        hold(client, request, sent);
    else
        reply_to(client, request, sent);
}

/* For a client that waits, or whose process has ended, only the end of the connection matters. */
void request_serve(struct client *client, bool is_hung_up)
{
    struct sim_request request;
    int sent;
    if (client->is_held || client->has_ended) {
        if (is_hung_up) client_close(client);
        return;
    }
    ssize_t got = receive(client->sock, &request, &sent);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0)
        client_close(client);
    else
        serve(client, &request, got, sent);
    if (got == sizeof request && request.flags & SIM_FLAG_NVML) client->uses_nvml = true;
    if (sent >= 0) close(sent);
}
