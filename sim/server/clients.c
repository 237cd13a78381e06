/* Connections: accepting them, identifying the process of each by its pidfd, and freeing a client's memory as late
 * as the real driver does. A client has its memory until the last descriptor of its connection is closed, in
 * whichever process or socket queue that is. The end of the client's process alone frees nothing. */
#include "server/state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/nsfs.h>

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

/* The real driver frees memory 82 to 97 ms after a kill, and the memory of several processes one after another. */
#define CLEANUP_MIN_NS 80000000u
#define CLEANUP_SPREAD_NS 17000000u

static int peer_pidfd(int sock)
{
    int pidfd = -1;
    socklen_t size = sizeof pidfd;
    if (!getsockopt(sock, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &size)) return pidfd;
    struct ucred cred;
    size = sizeof cred;
    if (errno != ENOPROTOOPT || getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &size)) return -1;
    return (int)syscall(SYS_pidfd_open, cred.pid, 0u); /* before Linux 6.5 */
}

/* Reads the pids from the kernel, not from the peer: the fdinfo of a pidfd lists them from the reader's namespace
 * down. */
static int read_pids(int pidfd, pid_t *pids)
{
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", pidfd);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t got = read(fd, text, sizeof text - 1);
    close(fd);
    if (got <= 0) return 0;
    text[got] = 0;
    char *at = strstr(text, "NSpid:");
    if (!at) return 0;
    at += strlen("NSpid:");
    int n = 0;
    while (n < MAX_DEPTH && *at && *at != '\n') {
        char *end;
        long pid = strtol(at, &end, 10);
        if (end == at) break;
        pids[n++] = (pid_t)pid;
        at = end;
    }
    return n > 0 && pids[0] > 0 ? n : 0; /* 0: outside the server's namespace; -1: the process has ended */
}

/* Returns false for a process that has ended, or that is in a pid namespace outside the server's. */
static bool identify(int pidfd, struct identity *process)
{
    char path[64];
    struct stat st;
    process->depth = read_pids(pidfd, process->pid);
    if (!process->depth) return false;
    snprintf(path, sizeof path, "/proc/%d/ns/pid", process->pid[0]);
    int ns = open(path, O_RDONLY | O_CLOEXEC);
    for (int level = process->depth - 1; level >= 0; level--) {
        if (ns < 0 || fstat(ns, &st)) {
            if (ns >= 0) close(ns);
            return false;
        }
        process->ns[level] = st.st_ino;
        int parent = level ? ioctl(ns, NS_GET_PARENT) : -1;
        close(ns);
        ns = parent;
    }
    /* Checks that the process still exists. Otherwise its pid may have named another process meanwhile. */
    pid_t again[MAX_DEPTH];
    return read_pids(pidfd, again) == process->depth;
}

/* The dump shows the host pid of every process, which a container must not read. No user in a container may set faults,
 * with any uid there. */
static bool is_here_as(int sock, const struct identity *process, uid_t uid)
{
    struct ucred cred;
    socklen_t size = sizeof cred;
    return process->depth == 1 && !getsockopt(sock, SOL_SOCKET, SO_PEERCRED, &cred, &size) && cred.uid == uid;
}

static bool watch(int fd, uint64_t tag)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = tag};
    return !epoll_ctl(server.epoll, EPOLL_CTL_ADD, fd, &event);
}

void client_accept(int listener)
{
    int sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (sock < 0) {
        /* Without descriptors the listener stays readable, and the loop would spin without a pause. */
        if (errno == EMFILE || errno == ENFILE) usleep(10000);
        return;
    }
    uint32_t slot = 0;
    while (slot < SIM_MAX_CLIENTS && server.clients[slot].state != CLIENT_FREE) slot++;
    struct identity process;
    int pidfd = slot < SIM_MAX_CLIENTS ? peer_pidfd(sock) : -1;
    if (pidfd < 0 || !identify(pidfd, &process) || !watch(sock, (uint64_t)slot << 1) ||
        !watch(pidfd, (uint64_t)slot << 1 | 1)) {
        if (pidfd >= 0) close(pidfd);
        close(sock);
        return;
    }
    bool is_root = is_here_as(sock, &process, 0);
    server.clients[slot] = (struct client){.state = CLIENT_OPEN,
                                           .sock = sock,
                                           .pidfd = pidfd,
                                           .process = process,
                                           .own_user = is_root || is_here_as(sock, &process, geteuid()),
                                           .is_root = is_root};
    for (uint32_t i = 0; i < SIM_MAX_DEVICES; i++) server.clients[slot].devices[i] = i;
}

static bool holds_anything(const struct client *client)
{
    for (uint32_t device = 0; device < server.n_gpus; device++) {
        if (client->resident[device]) return true;
        for (int kind = 0; kind < SIM_KINDS; kind++)
            if (client->own[device].bytes[kind]) return true;
    }
    return client->n_contexts > 0 || client->attached;
}

void client_listen(const struct client *client, bool listens)
{
    struct epoll_event event = {.events = listens ? EPOLLIN : 0, .data.u64 = (uint64_t)(client - server.clients) << 1};
    epoll_ctl(server.epoll, EPOLL_CTL_MOD, client->sock, &event);
}

static void forget_held(struct client *client)
{
    if (client->is_held && client->held_file >= 0) close(client->held_file);
    server.n_held -= client->is_held;
    client->is_held = false;
}

/* Requests of another process that has the connection now are not read any more. */
void client_process_ends(struct client *client)
{
    epoll_ctl(server.epoll, EPOLL_CTL_DEL, client->pidfd, NULL);
    client->has_ended = true;
    if (client->state != CLIENT_OPEN) return;
    forget_held(client);
    checkpoint_caller_ends(client);
    client_listen(client, false);
    turns_leave(client, 0);
}

/* Closes the connection at once; the memory is counted until later, and the slot stays in use, as on a real device.
 * The pidfd stays open until then. It keeps the pid namespaces of the process in the kernel, so that no new
 * namespace gets the inode of one of them and lists the process as its own. */
void client_close(struct client *client)
{
    if (client->state != CLIENT_OPEN) return;
    forget_held(client);
    checkpoint_caller_ends(client);
    close(client->sock);
    client->sock = -1;
    client->state = CLIENT_CLOSED;
    turns_leave(client, 0);
    server.n_closed++;
    uint64_t now = now_ns();
    client->closed_at_ns = now;
    client->free_at_ns =
        holds_anything(client) ? now + CLEANUP_MIN_NS + now % CLEANUP_SPREAD_NS + fault_end_takes_ns() : now;
}

void client_free(struct client *client)
{
    client_close(client);
    if (client->state != CLIENT_CLOSED) return;
    teardown_client(client);
    checkpoint_end(client);
    close(client->pidfd);
    client->state = CLIENT_FREE;
    server.n_closed--;
}

void client_drop(struct client *client, const char *why)
{
    /* A hostile peer can be dropped as fast as it connects. The log must not grow at that rate. */
    static uint64_t quiet_until_ns;
    if (now_ns() >= quiet_until_ns) {
        fprintf(stderr, "fgpu-simd: pid %d dropped: %s\n", client->process.pid[0], why);
        quiet_until_ns = now_ns() + 1000000000u;
    }
    client_close(client);
}

/* Every user of NVML must initialise it again. */
void clients_lose_nvml(void)
{
    for (struct client *client = server.clients; client < server.clients + SIM_MAX_CLIENTS; client++)
        if (client->state == CLIENT_OPEN) client->is_stale = true;
}

void clients_cut_nvml(void)
{
    for (struct client *client = server.clients; client < server.clients + SIM_MAX_CLIENTS; client++)
        if (client->state == CLIENT_OPEN && client->uses_nvml) client_drop(client, "NVML is cut off");
}

/* Like clients_lose_nvml. Each CUDA program also loses its memory, and gets an error from every later call. */
void clients_lose_devices(void)
{
    clients_lose_nvml();
    for (struct client *client = server.clients; client < server.clients + SIM_MAX_CLIENTS; client++)
        if (client->state == CLIENT_OPEN && client->attached) client_drop(client, "its device is lost");
}

/* Returns whether the client has a context on the device. The loss of a device drops only such clients. */
static bool has_context_on(const struct client *client, uint32_t device)
{
    for (uint32_t i = 0; i < client->n_contexts; i++)
        if (client->contexts[i].device == device) return true;
    return false;
}

void clients_lose_device(uint32_t device)
{
    for (struct client *client = server.clients; client < server.clients + SIM_MAX_CLIENTS; client++) {
        if (client->state != CLIENT_OPEN) continue;
        client->stale_devices |= 1u << device;
        if (has_context_on(client, device)) client_drop(client, "its device is lost");
    }
}

void clients_meet_ecc(void)
{
    for (struct client *client = server.clients; client < server.clients + SIM_MAX_CLIENTS; client++)
        if (client->state == CLIENT_OPEN && client->attached) client->met_ecc = true;
}

void client_sweep(void)
{
    uint64_t now = server.n_closed ? now_ns() : 0;
    for (uint32_t slot = 0; slot < SIM_MAX_CLIENTS && server.n_closed; slot++) {
        struct client *client = &server.clients[slot];
        if (client->state == CLIENT_CLOSED && client->free_at_ns <= now) client_free(client);
    }
}

/* Rounds up: if epoll_wait returned a little too early, the loop would spin until the time has come. A call of
 * cuCheckpointProcess* waits for another process, which the server looks at each millisecond. */
int client_timeout_ms(void)
{
    if (server.n_busy) return 1;
    uint64_t next = UINT64_MAX, now = now_ns();
    if (server.n_held && fault_nvml_until_ns() > now) next = fault_nvml_until_ns();
    if (!server.n_closed && next == UINT64_MAX) return -1;
    for (uint32_t slot = 0; slot < SIM_MAX_CLIENTS; slot++)
        if (server.clients[slot].state == CLIENT_CLOSED && server.clients[slot].free_at_ns < next)
            next = server.clients[slot].free_at_ns;
    if (next == UINT64_MAX) return -1;
    return next <= now ? 0 : (int)((next - now) / 1000000 + 1);
}
