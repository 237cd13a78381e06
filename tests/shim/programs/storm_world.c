/* storm_world.c: gatekeeper, kernel and operator of a program with the shim, inside that program. Owns the pages.
 *
 * The gatekeeper answers hellos with pages as the real one does. The shim's probe symbols jump to functions of this
 * file, because a sanitizer cannot check the accesses of a uprobe's program. Pages are changed in the shim's mapping,
 * because a sanitizer treats another mapping of the same page as different memory. Whole words are written, as kernel
 * and gatekeeper write them.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <inttypes.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "storm.h"

#define LEVELS 2
#define FIRST_INDEX 3
#define MOST_PAGES 64

struct storm_counts storm_counts;

static struct fgpu_usage_page *usage[LEVELS]; /* mappings of this file */
static int usage_files[LEVELS], listener;
static struct fgpu_control_page *_Atomic controls[MOST_PAGES]; /* mappings of this file, of the newest pages */
static _Atomic unsigned given;
static struct fgpu_device devices[DEVICES];
static _Atomic unsigned known;
static _Atomic uint64_t epoch = 1;
static _Atomic uint32_t gate = 1 << FGPU_GATE_SHIFT | FGPU_GATED | FGPU_GATE_OPEN;
static _Atomic unsigned mapped; /* number of hellos whose pages the shim has mapped */
static pthread_t turning;
static pid_t self;
static long again_us; /* between two hellos */

static void must(bool it, const char *what)
{
    if (it) return;
    perror(what);
    _exit(90);
}

void storm_nap(long us)
{
    struct timespec moment = {us / 1000000, us % 1000000 * 1000};
    nanosleep(&moment, NULL);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#define PUT(place, value) __atomic_store_n(&(place), (value), __ATOMIC_RELAXED)
#define GET(place) __atomic_load_n(&(place), __ATOMIC_RELAXED)

/* -- the kernel */

static bool fits(struct fgpu_usage *u, uint64_t bytes)
{
    uint64_t used = GET(u->used);
    do
        if (used > GET(u->limit) || bytes > GET(u->limit) - used) return false;
    while (!__atomic_compare_exchange_n(&u->used, &used, used + bytes, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return true;
}

/* A process's tag is its pid. */
static void answer(unsigned kind, uint64_t ticket, uint64_t verdict)
{
    uint64_t slot = ticket & (FGPU_VERDICTS - 1);
    if (kind & FGPU_TAGGED)
        PUT(usage[0]->answers[slot], (uint64_t)getpid() << FGPU_TAG_SHIFT | (ticket & FGPU_TICKET_BITS) << 2 | verdict);
    else
        PUT(usage[0]->verdicts[slot], ticket << 2 | verdict);
}

static void admit(unsigned device, uint64_t bytes, unsigned kind, uint64_t ticket)
{
    if (kind & (FGPU_FREED | FGPU_ANNOUNCE | FGPU_CALLED | FGPU_LACKS)) return;
    bool is_hello = (kind & FGPU_KIND_MASK) == FGPU_HELLO;
    bool granted = is_hello || (device < FGPU_DEVICES && fits(&usage[0]->devices[device], bytes));
    storm_counts.asked += !is_hello;
    storm_counts.refused += !granted;
    if (is_hello && getpid() == self) atomic_fetch_add(&mapped, 1);
    storm_counts.tagged += !!(kind & FGPU_TAGGED);
    storm_counts.patient += !!(kind & FGPU_PATIENT);
    answer(kind, ticket, granted ? FGPU_ADMITTED : FGPU_REFUSED);
}

/* Releases bytes of pools. Frees of other memory are not recorded here. */
static void release(unsigned device, uint64_t bytes, unsigned kind, uint64_t ticket)
{
    (void)kind, (void)ticket;
    if (device >= FGPU_DEVICES) return;
    uint64_t *used = (uint64_t *)&usage[0]->devices[device].used, had = GET(*used);
    while (!__atomic_compare_exchange_n(used, &had, had - (bytes < had ? bytes : had), false, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED)) {
    }
}

/* Makes a symbol jump to a function: mov $to, %rax; jmp *%rax. A symbol has sixteen bytes. Its first byte stays a nop,
 * because an agent of this host may have attached a probe there, after which the program continues at the second byte.
 */
static void divert(void *symbol, void *to)
{
    unsigned char code[12] = {0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0};
    memcpy(code + 2, &to, sizeof to);
    char *page = (char *)((uintptr_t)symbol & ~(uintptr_t)4095);
    must(symbol && !mprotect(page, 8192, PROT_READ | PROT_WRITE | PROT_EXEC), "probe symbol");
    memcpy((char *)symbol + 1, code, sizeof code);
    must(!mprotect(page, 8192, PROT_READ | PROT_EXEC), "probe symbol");
}

/* -- the gatekeeper */

static void *new_page(const char *name, int *file)
{
    *file = memfd_create(name, MFD_CLOEXEC);
    must(*file >= 0 && !ftruncate(*file, FGPU_PAGE_BYTES), name);
    void *page = mmap(NULL, FGPU_PAGE_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, *file, 0);
    must(page != MAP_FAILED, name);
    return page;
}

/* Returns the tag for a peer, and 0 for every second page, as from a gatekeeper that gives no tags. */
static uint32_t tag_of(int peer)
{
    struct ucred of;
    socklen_t size = sizeof of;
    must(!getsockopt(peer, SOL_SOCKET, SO_PEERCRED, &of, &size), "peer");
    return given % 2 ? (uint32_t)of.pid : 0;
}

static int new_control(uint32_t tag)
{
    int file;
    struct fgpu_control_page *page = new_page("control", &file);
    page->version = FGPU_LAYOUT;
    page->flags = FGPU_MANAGED;
    memcpy(page->boot, "a gatekeeper now", 16);
    page->heartbeat_ns = now_ns();
    page->epoch = epoch;
    page->device_count = known;
    page->tag = tag;
    memcpy(page->devices, devices, sizeof devices);
    for (int i = FIRST_INDEX; i < FIRST_INDEX + DEVICES; i++) page->gates[i] = gate;
    struct fgpu_control_page *before = atomic_exchange(&controls[atomic_fetch_add(&given, 1) % MOST_PAGES], page);
    if (before) munmap(before, FGPU_PAGE_BYTES);
    return file;
}

static void greet(int peer)
{
    struct fgpu_hello hello;
    if (recv(peer, &hello, sizeof hello, 0) != sizeof hello) return;
    int status, files[2 + LEVELS] = {new_control(tag_of(peer)), -1, usage_files[0], usage_files[1]};
    munmap(new_page("status", &status), FGPU_PAGE_BYTES);
    files[1] = status;
    struct fgpu_answer answer = {.magic = FGPU_MAGIC,
                                 .version = FGPU_LAYOUT,
                                 .size = sizeof answer,
                                 .code = FGPU_CODE_MANAGED,
                                 .levels = LEVELS,
                                 .devices = known,
                                 .epoch = epoch};
    union {
        char bytes[CMSG_SPACE(sizeof files)];
        struct cmsghdr align;
    } control = {0};
    struct iovec part = {&answer, sizeof answer};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof files);
    memcpy(CMSG_DATA(header), files, sizeof files);
    sendmsg(peer, &message, MSG_NOSIGNAL);
    close(files[0]);
    close(status);
    storm_counts.hellos++;
}

static void *keep_the_gate(void *unused)
{
    for (int peer; (peer = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0; close(peer)) greet(peer);
    return unused;
}

void storm_world_knows(int device, const CUuuid *uuid)
{
    memcpy(devices[device].uuid, uuid, 16);
    devices[device].index = (uint32_t)(FIRST_INDEX + device);
    known = (unsigned)device + 1;
}

/* -- the operator: changes of pages while programs read them */

struct places {
    struct fgpu_control_page *control;
    struct fgpu_status_page *status;
    struct fgpu_usage_page *usage;
};

/* Returns the newest set of pages: the one whose control page is still mapped read-only. */
static struct places find(void)
{
    char line[512];
    uintptr_t from, to;
    struct places found = {0};
    FILE *maps = fopen("/proc/self/maps", "re");
    while (fgets(line, sizeof line, maps))
        if (strstr(line, "r--s") && strstr(line, "memfd:control") &&
            sscanf(line, "%" SCNxPTR "-%" SCNxPTR, &from, &to) == 2)
            found.control = (void *)from;
    fclose(maps);
    must(found.control, "control page");
    found.status = (void *)((char *)found.control + FGPU_PAGE_BYTES);
    found.usage = (void *)((char *)found.control + 2 * FGPU_PAGE_BYTES);
    must(!mprotect(found.control, (2 + LEVELS) * FGPU_PAGE_BYTES, PROT_READ | PROT_WRITE), "control page");
    return found;
}

static void beat(struct fgpu_control_page *here)
{
    PUT(here->heartbeat_ns, now_ns());
    for (int i = 0; i < MOST_PAGES; i++) { /* pages of children too */
        struct fgpu_control_page *page = controls[i];
        if (page) PUT(page->heartbeat_ns, now_ns());
    }
}

static void turn(struct places here, unsigned round)
{
    uint32_t word = round / 2 + 2, bits = round % 2 ? FGPU_GATED : FGPU_GATED | FGPU_GATE_OPEN;
    if (round % 16 == 15) bits = 0; /* not gated for a while */
    atomic_store(&gate, word << FGPU_GATE_SHIFT | bits);
    for (int i = FIRST_INDEX; i < FIRST_INDEX + DEVICES; i++) {
        PUT(here.control->budget_ns[i], round % 3 ? 400000u * (round % 7) : 0);
        PUT(here.control->passes[i], GET(here.status->devices[i].launches) + round % 3);
        PUT(here.control->gates[i], gate);
        syscall(SYS_futex, &here.control->gates[i], FUTEX_WAKE, 1 << 30, NULL, NULL, 0);
    }
}

static void show_rows(struct fgpu_control_page *page, unsigned round)
{
    uint32_t sequence = GET(page->sequence);
    __atomic_store_n(&page->sequence, sequence + 1, __ATOMIC_SEQ_CST);
    PUT(page->row_count, round % 5);
    for (unsigned i = 0; i < round % 5; i++) {
        PUT(page->rows[i].pid, round + i);
        PUT(page->rows[i].device, FIRST_INDEX + i % DEVICES);
        PUT(page->rows[i].bytes, (uint64_t)round << 20);
    }
    __atomic_store_n(&page->sequence, sequence + 2, __ATOMIC_SEQ_CST);
}

static void limit(struct fgpu_usage_page *pages, unsigned round)
{
    for (int i = FIRST_INDEX; i < FIRST_INDEX + DEVICES; i++) {
        PUT(pages[0].devices[i].limit, round % 4 ? LIMIT : round % 8 ? ALMOST_NONE : FGPU_NO_LIMIT);
        PUT(pages[1].devices[i].limit, 2 * LIMIT);
        if (!(round % 9)) PUT(pages[0].devices[i].used, 0); /* most of the admitted memory has been freed by now */
    }
    for (int i = FIRST_INDEX; i < FIRST_INDEX + DEVICES; i++) /* orphaned memory, for which a request waits a moment */
        for (int level = 0; level < LEVELS; level++) {
            PUT(pages[level].orphaned[i], round % 3 ? LIMIT / (round % 5 + 1) : 0);
            PUT(pages[level].orphaned_ns[i], now_ns() - 3950000000u);
            PUT(pages[level].looked_ns[i], round % 7 ? 0 : now_ns());
        }
    for (int i = FIRST_INDEX; i < FIRST_INDEX + DEVICES; i++) /* and decisions about room on a full device */
        PUT(pages[0].room_ns[i], (now_ns() + (round % 3) * 4000000u) | (round % 2 ? FGPU_NO_ROOM : 0));
    PUT(pages[0].flags, round % 6 ? FGPU_WAITS : FGPU_OBSERVE);
    PUT(pages[1].flags, round % 10 ? 0 : FGPU_OBSERVE);
}

static void *take_turns(void *unused)
{
    for (unsigned round = 1, seen = 0; !storm_over;) {
        while (atomic_load(&mapped) == seen && !storm_over) storm_nap(1000);
        seen = atomic_load(&mapped);
        if (storm_over) break;
        struct places here = find();
        for (uint64_t began = now_ns(); !storm_over && now_ns() - began < (uint64_t)again_us * 1000; round++) {
            beat(here.control);
            turn(here, round);
            show_rows(here.control, round);
            limit(here.usage, round);
            storm_counts.changes++;
            storm_nap(2000);
        }
        atomic_fetch_add(&epoch, 1);
        PUT(here.control->epoch, epoch);
    }
    return unused;
}

void storm_world_turns(long us)
{
    again_us = us;
    atomic_fetch_add(&epoch, 1);
    for (int i = 0; i < MOST_PAGES; i++)
        if (controls[i]) PUT(controls[i]->epoch, epoch);
    must(!pthread_create(&turning, NULL, take_turns, NULL), "thread");
}

/* Ends all waits at gates. */
void storm_world_end(void)
{
    pthread_join(turning, NULL);
    atomic_store(&gate, 0); /* the gates are open for a later hello too */
    for (int i = 0; i < MOST_PAGES; i++)
        for (int d = 0; controls[i] && d < FGPU_DEVICES; d++) {
            PUT(controls[i]->gates[d], 0);
            syscall(SYS_futex, &controls[i]->gates[d], FUTEX_WAKE, 1 << 30, NULL, NULL, 0);
        }
}

void storm_world_begin(void *shim)
{
    static const struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = FGPU_SOCKET};
    pthread_t keeper;
    self = getpid();
    for (int i = 0; i < LEVELS; i++) {
        usage[i] = new_page("usage", &usage_files[i]);
        usage[i]->version = FGPU_LAYOUT;
        for (int d = 0; d < FGPU_DEVICES; d++) usage[i]->devices[d].limit = LIMIT;
    }
    divert(dlsym(shim, "fgpu_admit"), (void *)admit);
    divert(dlsym(shim, "fgpu_release"), (void *)release);
    listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    must(!mkdir("/run/fgpu", 0755) && !mkdir(FGPU_SOCKET_DIR, 0755), FGPU_SOCKET_DIR);
    must(!bind(listener, (const void *)&address, sizeof address) && !listen(listener, 64), FGPU_SOCKET);
    must(!pthread_create(&keeper, NULL, keep_the_gate, NULL), "thread");
    pthread_detach(keeper);
}
