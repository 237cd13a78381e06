/* One request in, one reply out. The socket never blocks: a peer that does not read its reply is dropped. */
#include "simd.h"

#include <errno.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define MAX_RECORDS (SIM_MAX_CLIENTS + SIM_MAX_DEVICES)

/* One buffer for every payload: there is one request at a time. */
static union {
    struct sim_device device;
    struct sim_memory memory;
    struct sim_process processes[SIM_MAX_CLIENTS];
    struct sim_record records[MAX_RECORDS];
} payload;

struct answer {
    enum sim_status status;
    uint32_t count;
    size_t size;       /* of the payload */
    const char *wrong; /* the peer breaks the protocol, and this is how */
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
    return (struct answer){.count = n, .size = n * sizeof *payload.processes};
}

static struct answer answer_dump(const struct client *client)
{
    if (!client->own_user) return (struct answer){.status = SIM_NOT_ALLOWED};
    uint32_t n = view_dump(payload.records, MAX_RECORDS);
    return (struct answer){.count = n, .size = n * sizeof *payload.records};
}

static struct answer answer(struct client *client, const struct sim_request *request)
{
    if (request->op == SIM_HELLO) return (struct answer){.count = server.n_gpus};
    if (request->op == SIM_DUMP) return answer_dump(client);
    if (request->device >= server.n_gpus) return (struct answer){.status = SIM_NO_DEVICE};
    if (request->kind >= SIM_KINDS) return (struct answer){.wrong = "unknown kind of memory"};
    switch (request->op) {
    case SIM_DEVICE:
        payload.device = server.gpus[request->device].info;
        return (struct answer){.size = sizeof payload.device};
    case SIM_ATTACH:
        return (struct answer){.status = ledger_attach(client)};
    case SIM_TAKE:
        return (struct answer){.status = ledger_take(client, request)};
    case SIM_GIVE:
        return (struct answer){.wrong = ledger_give(client, request) ? NULL : "gives back what it does not hold"};
    case SIM_CLOSE:
        return (struct answer){.wrong = ledger_close(client, request) ? NULL : "closes a context that is not its own"};
    case SIM_MEMORY:
        return answer_memory(request->device);
    case SIM_PROCESSES:
        return answer_processes(client, request);
    case SIM_WORK: {
        uint64_t now = now_ns(), *until = &client->busy_until_ns[request->device];
        if (request->bytes <= 3600000000u) /* an hour: a longer kernel is a mistake */
            *until = (*until > now ? *until : now) + request->bytes * 1000;
        return (struct answer){0};
    }
    default:
        return (struct answer){.wrong = "unknown request"};
    }
}

void request_serve(struct client *client)
{
    struct sim_request request;
    ssize_t got = recv(client->sock, &request, sizeof request, MSG_DONTWAIT | MSG_TRUNC);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got <= 0) {
        client_end(client);
        return;
    }
    if (got != sizeof request || request.magic != SIM_MAGIC) {
        client_drop(client, "malformed request");
        return;
    }
    struct answer a = answer(client, &request);
    if (a.wrong) {
        client_drop(client, a.wrong);
        return;
    }
    struct sim_reply reply = {.magic = SIM_MAGIC, .op = request.op, .status = a.status, .count = a.count};
    struct iovec parts[2] = {{&reply, sizeof reply}, {&payload, a.size}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    if (sendmsg(client->sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        client_drop(client, "does not read its replies");
}
