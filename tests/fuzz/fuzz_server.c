/*
 * fuzz_server.c: requests of programs to the simulated driver. Each request gets a reply, or its program is
 * disconnected. A device never has more memory in use than it has, and none after all programs have exited. The fuzzer
 * runs the server's own parts, at a real socket.
 *
 * An input: requests of 12 bytes, each by one of three programs. Numbers are taken from a table, so that programs use
 * the same contexts, keys and queues.
 */
#define main simd_main
#include "../../sim/server/main.c"
#undef main

#include <sys/time.h>

#define PROGRAMS 3
#define REQUEST 12
#define CHECK(true)                                                                                                    \
    if (!(true)) __builtin_trap()

static const uint64_t numbers[] = {
    0,        1,          2,          3,          1000,           4096,       1 << 20,     2 << 20,
    1u << 31, 1ull << 32, 1ull << 62, UINT64_MAX, UINT64_MAX - 1, 1ull << 63, 3600000000u, 500};
static struct sockaddr_un address = {.sun_family = AF_UNIX};
static int listener, contents, programs[PROGRAMS];
static const struct itimerval patience = {.it_value = {.tv_sec = 60}};
static uint64_t keys[2]; /* the key of the memory that was shared last */

static uint64_t number(uint8_t byte) { return numbers[byte % (sizeof numbers / sizeof *numbers)]; }

static void begin(void)
{
    char folder[] = "/tmp/fgpu-fuzz-XXXXXX", path[64];
    setenv("FGPU_SIM_GPUS", "2", 1);
    setenv("FGPU_SIM_MODEL", "t4", 1);
    CHECK(mkdtemp(folder) && !make_devices());
    snprintf(path, sizeof path, "%s/driver", folder);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    listener = listen_at(path);
    server.epoll = epoll_create1(EPOLL_CLOEXEC);
    contents = open("/dev/null", O_RDONLY | O_CLOEXEC);
    CHECK(listener >= 0 && server.epoll >= 0 && contents > 0);
}

static void connect_all(void)
{
    for (int i = 0; i < PROGRAMS; i++) {
        programs[i] = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        CHECK(!connect(programs[i], (struct sockaddr *)&address, sizeof address));
        client_accept(listener);
        CHECK(server.clients[i].state == CLIENT_OPEN);
    }
}

static void send_one(int to, const struct sim_request *request, size_t size, bool with_file)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec part = {(void *)request, size};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (with_file) {
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &contents, sizeof contents);
    }
    sendmsg(to, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

/* Reads a reply. Keeps its key, and closes its descriptor. */
static void take_reply(int from)
{
    static char buffer[1 << 18];
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec part = {buffer, sizeof buffer};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t got = recvmsg(from, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    const struct cmsghdr *header = got > 0 ? CMSG_FIRSTHDR(&message) : NULL;
    const struct sim_reply *reply = (const void *)buffer;
    if (header) close(*(const int *)(const void *)CMSG_DATA(header));
    if (got <= 0) return;
    CHECK((size_t)got >= sizeof *reply && reply->magic == SIM_MAGIC);
    if (reply->op == SIM_SHARE && reply->status == SIM_OK) memcpy(keys, reply + 1, sizeof keys);
}

static void ask(const uint8_t *data)
{
    struct client *client = &server.clients[data[0] % PROGRAMS];
    struct sim_request request = {.magic = data[0] & 0x80 ? 0 : SIM_MAGIC,
                                  .op = data[1] % (SIM_OPS + 1),
                                  .device = data[2] % 4,
                                  .kind = data[3] % (SIM_FAULTS + 1),
                                  .context = number(data[4]),
                                  .bytes = number(data[5]),
                                  .requested = number(data[6]),
                                  .flags = data[7],
                                  .parties = data[8] % 20,
                                  .key = number(data[9]),
                                  .queue = number(data[10])};
    if (data[11] & 1) {
        request.context = keys[0];
        request.requested = keys[1];
    }
    if (client->state != CLIENT_OPEN) return;
    if (data[1] == 255) client_process_ends(client);
    send_one(programs[data[0] % PROGRAMS], &request, data[0] & 0x40 ? data[11] % sizeof request : sizeof request,
             data[11] & 2);
    request_serve(client, false);
    take_reply(programs[data[0] % PROGRAMS]);
}

static void check_devices(void)
{
    for (uint32_t i = 0; i < server.n_gpus; i++)
        CHECK(server.gpus[i].used <= server.gpus[i].info.memory_total && server.gpus[i].driver <= server.gpus[i].used &&
              server.gpus[i].exported + managed_bytes(i) <= server.gpus[i].driver);
}

/* Ends all programs. The server handles closed descriptors as in its own loop. Memory is freed without the usual delay.
 */
static void end_all(void)
{
    struct epoll_event events[64];
    fault_set(SIM_FAULT_RESET, 0, 0);
    for (int i = 0; i < PROGRAMS; i++) {
        close(programs[i]);
        client_free(&server.clients[i]);
    }
    for (int n; (n = epoll_wait(server.epoll, events, 64, 0)) > 0;)
        for (int i = 0; i < n; i++)
            if (events[i].data.u64 >= TAG_EXPORT) share_export_ends((uint32_t)(events[i].data.u64 - TAG_EXPORT));
    for (uint32_t i = 0; i < server.n_gpus; i++)
        CHECK(!server.gpus[i].used && !server.gpus[i].driver && !server.gpus[i].exported && !server.gpus[i].resident);
    CHECK(!server.n_closed && !server.n_attached && !server.n_held && !queues_any());
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bool begun;
    if (!begun) begin();
    begun = true;
    setitimer(ITIMER_VIRTUAL, &patience,
              NULL); /* of processor time: SIGVTALRM kills the fuzzer at an endless request */
    connect_all();
    for (size_t at = 0; at + REQUEST <= size; at += REQUEST) {
        ask(data + at);
        check_devices();
    }
    if (size % REQUEST == 1) fault_start("slow-end:3s,reset"); /* faults, as the environment may set them */
    end_all();
    return 0;
}
