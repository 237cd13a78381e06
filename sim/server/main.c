/* fgpu-simd: the process with the state of the simulated GPUs. It owns the devices, the socket and the lock file, and
 * does not trust its clients. When it exits, no simulated device exists any more, as after the driver was unloaded. */
#include "server/data/models.h"
#include "server/state.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define TAG_LISTENER UINT64_MAX
#define TAG_SIGNAL (UINT64_MAX - 1)
#define MIN_MEMORY (1ull << 30)
#define MAX_MEMORY (1ull << 44)
#define NICE (-15) /* a device does not wait for the programs of its host */

static int fail(const char *what, const char *about)
{
    fprintf(stderr, "fgpu-simd: %s: %s\n", what, about);
    return 1;
}

/* Parses 16GiB or 16384MiB; no other unit is accepted, so that 1000 and 1024 cannot be confused. Returns 0 if the
 * text is not a size. */
static uint64_t parse_size(const char *text)
{
    char *unit;
    errno = 0;
    unsigned long long n = strtoull(text, &unit, 10);
    int shift = !strcmp(unit, "GiB") ? 30 : !strcmp(unit, "MiB") ? 20 : -1;
    if (errno || shift < 0 || n > MAX_MEMORY >> shift) return 0;
    uint64_t bytes = (uint64_t)n << shift;
    return bytes >= MIN_MEMORY ? bytes : 0;
}

static int read_limits(void)
{
    const char *limits = getenv("FGPU_SIM_MEMORY_LIMITS");
    if (limits && strcmp(limits, "0") && strcmp(limits, "1"))
        return fail("FGPU_SIM_MEMORY_LIMITS is neither 0 nor 1", limits);
    server.has_limits = limits && *limits == '1';
    return 0;
}

/* Reads the server's environment. No client's environment has any effect. */
static int make_devices(void)
{
    const char *gpus = getenv("FGPU_SIM_GPUS"), *memory = getenv("FGPU_SIM_MEMORY"), *model = getenv("FGPU_SIM_MODEL");
    char *end = NULL;
    long n = gpus ? strtol(gpus, &end, 10) : 1;
    if (gpus && (end == gpus || *end || n < 0 || n > SIM_MAX_DEVICES))
        return fail("FGPU_SIM_GPUS is not a number from 0 to 16", gpus);
    uint64_t bytes = memory ? parse_size(memory) : 0;
    if (memory && !bytes) return fail("FGPU_SIM_MEMORY is not a size such as 16GiB (1GiB to 16384GiB)", memory);
    for (long i = 0; i < n; i++)
        if (model_device(model ? model : "h200", (uint32_t)i, bytes, &server.gpus[i].info))
            return fail("FGPU_SIM_MODEL is none of h200, a100, t4", model);
    const char *parallel = getenv("FGPU_SIM_PARALLEL");
    long percent = parallel ? strtol(parallel, &end, 10) : 0;
    if (parallel && (end == parallel || *end || percent < 100 || percent > 400))
        return fail("FGPU_SIM_PARALLEL is not a percentage from 100 to 400", parallel);
    server.parallel = (uint32_t)percent;
    server.n_gpus = (uint32_t)n;
    return read_limits() ? 1 : fault_start(getenv("FGPU_SIM_FAULT"));
}

/* Creates the socket under another name and renames it when it listens. A client that finds the socket then finds it
 * ready and with its mode. */
static int listen_at(const char *socket_path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (snprintf(address.sun_path, sizeof address.sun_path, "%s.new", socket_path) >= (int)sizeof address.sun_path)
        return -1;
    int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    unlink(address.sun_path);
    if (sock < 0 || bind(sock, (struct sockaddr *)&address, sizeof address) || chmod(address.sun_path, 0666) ||
        listen(sock, 256) || rename(address.sun_path, socket_path)) {
        if (sock >= 0) close(sock);
        return -1;
    }
    return sock;
}

/* Returns -2 if another server has the lock. The lock shows whether a server runs. The socket does not, because a
 * socket file outlives its server. */
static int lock_directory(const char *dir)
{
    char path[256];
    if (mkdir(dir, 0755) && errno != EEXIST) return -1;
    if (snprintf(path, sizeof path, "%s/lock", dir) >= (int)sizeof path) return -1;
    int lock = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (lock >= 0 && flock(lock, LOCK_EX | LOCK_NB)) {
        close(lock);
        return -2;
    }
    return lock;
}

static int make_node(const char *dir)
{
    char path[256];
    if (snprintf(path, sizeof path, "%s/" SIM_NODE_NAME, dir) >= (int)sizeof path) return -1;
    int node = open(path, O_RDONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0444);
    if (node < 0) return -1;
    int result = fchmod(node, 0444); /* independent of the umask */
    close(node);
    return result;
}

static int watch(int fd, uint64_t tag)
{
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = tag};
    return epoll_ctl(server.epoll, EPOLL_CTL_ADD, fd, &event);
}

static int signals(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigprocmask(SIG_BLOCK, &set, NULL);
    return signalfd(-1, &set, SFD_CLOEXEC);
}

static void loop(int listener)
{
    struct epoll_event events[64];
    for (;;) {
        int n = epoll_wait(server.epoll, events, 64, client_timeout_ms());
        bool arrivals = false;
        for (int i = 0; i < n; i++) {
            uint64_t tag = events[i].data.u64;
            if (tag == TAG_SIGNAL) return;
            if (tag == TAG_LISTENER) {
                arrivals = true;
                continue;
            }
            if (tag >= TAG_EXPORT) {
                share_export_ends((uint32_t)(tag - TAG_EXPORT));
                continue;
            }
            struct client *client = &server.clients[tag >> 1];
            if (client->state == CLIENT_FREE) continue;
            if (tag & 1)
                client_process_ends(client);
            else if (client->state == CLIENT_OPEN)
                request_serve(client, events[i].events & (EPOLLHUP | EPOLLERR));
        }
        requests_held_serve();
        requests_checkpoints_serve();
        /* Slots are reused only here, because the batch has no event of their last client any more. */
        client_sweep();
        if (arrivals) client_accept(listener);
    }
}

static int serve(const char *dir)
{
    char socket_path[256];
    if (snprintf(socket_path, sizeof socket_path, "%s/" SIM_SOCKET_NAME, dir) >= (int)sizeof socket_path)
        return fail("path too long", dir);
    if (make_devices()) return 1;
    setpriority(PRIO_PROCESS, 0, NICE); /* fails without the privilege */
    /* 0 stands for "no descriptor" in a struct answer, so no descriptor of the server may have that number. */
    if (fcntl(0, F_GETFD) < 0) open("/dev/null", O_RDONLY);
    int lock = lock_directory(dir);
    if (lock < 0) return fail(dir, lock == -2 ? "another server is running here" : strerror(errno));
    if (make_node(dir)) return fail(dir, strerror(errno));
    /* Two descriptors for each client, and one for each share, export and limit. */
    const rlim_t wanted = 2 * SIM_MAX_CLIENTS + SIM_MAX_SHARES + SIM_MAX_EXPORTS + SIM_MAX_LIMITS + 64;
    struct rlimit files = {wanted, wanted}, now;
    if (!getrlimit(RLIMIT_NOFILE, &now) && now.rlim_cur < files.rlim_cur) {
        files.rlim_max = now.rlim_max > files.rlim_cur ? now.rlim_max : files.rlim_cur;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    int listener = listen_at(socket_path), sigfd = signals();
    server.epoll = epoll_create1(EPOLL_CLOEXEC);
    if (listener < 0 || sigfd < 0 || server.epoll < 0 || watch(listener, TAG_LISTENER) || watch(sigfd, TAG_SIGNAL))
        return fail(socket_path, strerror(errno));
    puts("ready");
    fflush(stdout);
    loop(listener);
    unlink(socket_path);
    for (struct client *c = server.clients; c < server.clients + SIM_MAX_CLIENTS; c++) client_free(c);
    shares_end();
    close(listener);
    close(sigfd);
    close(server.epoll);
    close(lock);
    return 0;
}

int main(int argc, char **argv)
{
    const char *dir = FGPU_SIM_DIR, *fault = NULL;
    bool dump = false;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--dump")) {
            dump = true;
        } else if (!strcmp(argv[i], "--dir") && i + 1 < argc) {
            dir = argv[++i];
        } else if (!strcmp(argv[i], "--fault") && i + 1 < argc) {
            fault = argv[++i];
        } else {
            fputs("usage: fgpu-simd [--dir DIR] [--dump | --fault SPEC]\n", stderr);
            return 2;
        }
    }
    if (fault) return fault_send(dir, fault);
    return dump ? dump_print(dir) : serve(dir);
}
