/* The acts of hostile.c. Each act runs in a separate process, and returns its outcome. */
#define CALL(name, ...) (((__typeof__(&name))dlsym(driver, #name))(__VA_ARGS__))
#define SHIM_SOCKET "/run/fgpu/shim/shim.sock"
#define CONTROL_SOCKET "/run/fgpu/control.sock"

static void *driver;

static bool take(const char *library, uint64_t bytes)
{
    CUcontext context;
    CUdeviceptr at;
    driver = dlopen(library, RTLD_NOW);
    return driver && !CALL(cuInit, 0) && !CALL(cuDevicePrimaryCtxRetain, &context, 0) &&
           !CALL(cuCtxSetCurrent, context) && !CALL(cuMemAlloc_v2, &at, bytes);
}

static enum outcome work(void) { return take("libcuda.so.1", between(1, 32) * MIB) ? GOOD : BAD; }

static enum outcome write_status(void)
{
    char line[512], rights[8];
    unsigned char *pages[16];
    unsigned long begin, count = 0, end;
    if (!take("libcuda.so.1", MIB)) return BAD;
    FILE *maps = fopen("/proc/self/maps", "re");
    while (maps && count < 16 && fgets(line, sizeof line, maps))
        if (strstr(line, "fgpu-status") && sscanf(line, "%lx-%lx %7s", &begin, &end, rights) == 3 && rights[1] == 'w')
            pages[count++] = (unsigned char *)begin;
    for (int i = 0; count && i < 20000; i++) pages[any() % count][any() % 4096] = (unsigned char)any();
    pause_ms(between(0, 300));
    return count ? GOOD : BAD;
}

static enum outcome call_shim(void)
{
    void (*admit)(unsigned, uint64_t, unsigned, uint64_t) = dlsym(RTLD_DEFAULT, "fgpu_admit");
    void (*give)(unsigned, uint64_t, unsigned, uint64_t) = dlsym(RTLD_DEFAULT, "fgpu_release");
    if (!admit || !give) return BAD;
    (void)take("libcuda.so.1", between(1, 8) * MIB);
    for (int i = 0; i < 500; i++) {
        uint64_t which = any() % 2, bytes = any() >> any() % 64;
        unsigned device = any() % 8 ? 0 : (unsigned)any();
        if (!which) admit(device, bytes, (unsigned)any() % 8, any());
        if (which == 1) give(device, bytes, (unsigned)any() % 8, any());
    }
    return GOOD;
}

static int connect_to(const char *path, int type)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    snprintf(at.sun_path, sizeof at.sun_path, "%s", path);
    int sock = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    if (sock < 0 || !connect(sock, (struct sockaddr *)&at, sizeof at)) return sock;
    int error = errno;
    close(sock);
    errno = error;
    return -1;
}

static enum outcome say(uint64_t least, uint64_t most, bool is_hello)
{
    unsigned char bytes[512] = "fgpu\3\0\100";
    int sock = connect_to(SHIM_SOCKET, SOCK_SEQPACKET);
    if (sock < 0) return BAD;
    for (unsigned i = 0; !is_hello && i < sizeof bytes; i++) bytes[i] = (unsigned char)any();
    bool sent = !most || send(sock, bytes, between(least, most), MSG_NOSIGNAL) > 0;
    pause_ms(between(0, 400));
    return sent ? GOOD : BAD;
}

static enum outcome say_garbage(void) { return say(1, 512, false); }
static enum outcome say_part(void) { return say(1, 63, true); }
static enum outcome say_nothing(void) { return say(0, 0, true); }

/* The tenant has up to HEADS cgroups inside its own, and up to BRANCHES inside each of them. inside() writes the path
 * of `file` in a random one of the HEADS. */
#define HEADS 12
#define BRANCHES 24

static void inside(char *path, size_t size, const char *file)
{
    snprintf(path, size, "%s/h%u%s", cgroup, (unsigned)(any() % HEADS), file);
}

static enum outcome make_cgroup(void)
{
    char path[4096], branch[4200];
    inside(path, sizeof path, "");
    bool made = !mkdir(path, 0755);
    for (unsigned i = 0, most = (unsigned)between(0, BRANCHES); i < most; i++) {
        snprintf(branch, sizeof branch, "%s/b%u", path, i);
        made |= !mkdir(branch, 0755);
    }
    return made ? GOOD : BAD;
}

static enum outcome remove_cgroup(void)
{
    char path[4096], branch[4200];
    bool removed = false;
    inside(path, sizeof path, "");
    for (unsigned i = 0; i < BRANCHES; i++) {
        snprintf(branch, sizeof branch, "%s/b%u", path, i);
        removed |= !rmdir(branch);
    }
    removed |= !rmdir(path);
    return removed ? GOOD : BAD;
}

static enum outcome move_about(void)
{
    static const char *const files[] = {"/cgroup.procs", "/b0/cgroup.procs", "/b1/cgroup.procs"};
    char path[4096];
    bool moved = false;
    (void)take("libcuda.so.1", between(1, 16) * MIB);
    for (int i = 0; i < 20; i++) {
        inside(path, sizeof path, files[any() % 3]);
        int file = open(path, O_WRONLY | O_CLOEXEC);
        moved |= file >= 0 && write(file, "0", 1) == 1;
        if (file >= 0) close(file);
        pause_ms(between(0, 20));
    }
    return moved ? GOOD : BAD;
}

static enum outcome fork_often(void)
{
    int status, good = 0;
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        if (!child) _exit(0);
        good += child > 0 && waitpid(child, &status, 0) == child;
    }
    return good ? GOOD : BAD;
}

/* Starts 100 to 300 processes at the same time. Every 16th uses the device. */
static enum outcome make_crowd(void)
{
    unsigned number = (unsigned)between(100, 300), made = 0;
    for (unsigned i = 0; i < number; i++) {
        pid_t child = fork();
        if (!child) {
            if (i % 16 == 0) (void)take("libcuda.so.1", MIB);
            pause_ms(100);
            _exit(0);
        }
        made += child > 0;
    }
    while (wait(NULL) > 0) {
    }
    return made >= 100 ? GOOD : BAD;
}

static enum outcome execute(void)
{
    (void)take("libcuda.so.1", MIB);
    execl(self, self, "leaf", (char *)NULL);
    return BAD;
}

static void *take_one(void *none)
{
    for (int i = 0; i < 10; i++) (void)take("libcuda.so.1", MIB);
    return none;
}

static enum outcome use_threads(void)
{
    pthread_t threads[8];
    int number = 0;
    while (number < 8 && !pthread_create(&threads[number], NULL, take_one, NULL)) number++;
    for (int i = 0; i < number; i++) pthread_join(threads[i], NULL);
    return number ? GOOD : BAD;
}

/* Executes itself without the shim, to use the host's driver or the tenant's copy of it. */
static enum outcome bypass(void)
{
    char most[24], seed[24], file[12];
    snprintf(most, sizeof most, "%" PRIu64, most_mib);
    snprintf(seed, sizeof seed, "%" PRIu64, any());
    snprintf(file, sizeof file, "%d", dup(bypasses));
    unsetenv("LD_PRELOAD");
    execl(self, self, any() % 2 ? libcuda : "libcuda.so.1", most, seed, file, (char *)NULL);
    return BAD;
}

/* Allocates a little first, so that NVML shows the process and its copy of the driver is probed. Then allocates up to
 * MOST_MIB. */
static enum outcome take_without_asking(const char *library)
{
    CUdeviceptr at;
    char line[32];
    bool took = take(library, between(1, 64) * MIB);
    snprintf(line, sizeof line, "%d\n", getpid());
    if (took) took = write(bypasses, line, strlen(line)) > 0;
    pause_ms(between(1200, 2000));
    for (uint64_t mib = 128; took && mib < most_mib; mib += 128)
        if (CALL(cuMemAlloc_v2, &at, 128 * MIB)) break;
    pause_ms(between(100, 800));
    return took ? GOOD : BAD;
}

static void send_descriptor(int sock, int fd)
{
    char byte = 0, room[CMSG_SPACE(sizeof fd)] = {0};
    struct iovec data = {&byte, 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET, head->cmsg_type = SCM_RIGHTS, head->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(head), &fd, sizeof fd);
    (void)!sendmsg(sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Returns -1 if there is no descriptor to receive. */
static int receive_descriptor(int sock)
{
    char byte, room[CMSG_SPACE(sizeof(int))];
    struct iovec data = {&byte, 1};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room};
    if (recvmsg(sock, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) <= 0) return -1;
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    int fd = -1;
    if (head && head->cmsg_type == SCM_RIGHTS) memcpy(&fd, CMSG_DATA(head), sizeof fd);
    return fd;
}

static enum outcome export_memory(void)
{
    CUmemAllocationProp prop = {.type = CU_MEM_ALLOCATION_TYPE_PINNED,
                                .requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                .location = {.type = CU_MEM_LOCATION_TYPE_DEVICE}};
    CUmemGenericAllocationHandle handle;
    int fd;
    if (!take("libcuda.so.1", MIB) || CALL(cuMemCreate, &handle, between(1, 50) * 2 * MIB, &prop, 0)) return BAD;
    if (CALL(cuMemExportToShareableHandle, &fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0)) return BAD;
    send_descriptor(exports[1], fd);
    return GOOD;
}

static enum outcome stop_in_turn(void)
{
    int status;
    pid_t child = fork();
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        (void)take("libcuda.so.1", between(1, 32) * MIB);
        for (;;) pause();
    }
    pause_ms(between(100, 300));
    bool stopped = child > 0 && !kill(child, SIGSTOP);
    pause_ms(between(100, 600));
    if (child > 0) kill(child, SIGKILL), waitpid(child, &status, 0);
    return stopped ? GOOD : BAD;
}

static enum outcome ask_control(void)
{
    static const char *const asked[] = {"{\"verb\":\"put\",\"target\":\"hostile\",\"memory\":\"15GiB\"}\n",
                                        "{\"verb\":\"reload\"}\n", "{\"verb\":\"detach\"}\n", "{\"verb\":7}\n", "}\n"};
    const char *line = asked[any() % 5];
    char answer[4096] = "";
    int sock = connect_to(CONTROL_SOCKET, SOCK_STREAM);
    if (sock < 0) return errno == EACCES ? REFUSED : BAD;
    if (send(sock, line, strlen(line), MSG_NOSIGNAL) < 0) return BAD;
    struct pollfd one = {sock, POLLIN, 0};
    if (poll(&one, 1, 2000) <= 0 || recv(sock, answer, sizeof answer - 1, 0) <= 0) return BAD;
    return strncmp(answer, "{\"ok\"", 5) ? REFUSED : ACCEPTED;
}
