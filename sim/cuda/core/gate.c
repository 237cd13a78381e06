/* Another process can lock this one: its calls then wait at the gate, which the server closes and opens. The restore
 * thread executes the server's orders. As in the real driver, it is a thread of the process itself: the process keeps
 * the copy of its device memory, so that its cgroup is charged, and opens the driver's nodes again. */
#include "cuda/core/gate.h"

#include "wire/wire.h"

#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define STACK (256u << 10)
#define PAGE 4096u

static struct sim_gate *gate;
static int node = -1; /* open until the process ends, as the real library's descriptors of /dev/nvidiactl are */
static __thread bool is_inside;
static char *copy;
static uint64_t copy_bytes;

static uint32_t read_word(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_SEQ_CST); }

static void write_word(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_SEQ_CST); }

/* Keeps errno, which belongs to the program. */
static void wait_while(uint32_t *word, uint32_t value)
{
    int saved = errno;
    syscall(SYS_futex, word, FUTEX_WAIT, value, NULL, NULL, 0);
    errno = saved;
}

bool node_open(void)
{
    if (node < 0) node = open(FGPU_SIM_DIR "/" SIM_NODE_NAME, O_RDONLY | O_CLOEXEC);
    return node >= 0 || errno == ENXIO; /* ENXIO: a device node, and no driver behind it */
}

static void node_close(void)
{
    if (node >= 0) close(node);
    node = -1;
}

/* Returns false if the process has no room for the copy. */
static bool take_copy(uint64_t bytes)
{
    copy = bytes ? mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : NULL;
    if (copy == MAP_FAILED) return false;
    copy_bytes = bytes;
    for (uint64_t at = 0; at < bytes; at += PAGE) ((volatile char *)copy)[at] = 1;
    node_close();
    return true;
}

static bool drop_copy(void)
{
    if (!node_open()) return false;
    if (copy) munmap(copy, copy_bytes);
    copy = NULL;
    return true;
}

static void *restore_thread(void *unused)
{
    uint32_t done = 0;
    write_word(&gate->thread, (uint32_t)syscall(SYS_gettid));
    syscall(SYS_futex, &gate->thread, FUTEX_WAKE, 1, NULL, NULL, 0);
    for (;; wait_while(&gate->order, done)) {
        uint32_t order = read_word(&gate->order), what = read_word(&gate->what);
        if (order == done) continue;
        bool is_right = true;
        if (what == SIM_PARK) is_right = take_copy(__atomic_load_n(&gate->bytes, __ATOMIC_SEQ_CST));
        if (what == SIM_RESTORE) is_right = drop_copy();
        write_word(&gate->has_failed, !is_right);
        write_word(&gate->done, done = order);
    }
    return unused;
}

/* The program's signals are for the program's threads. */
static void start_thread(void)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    if (pthread_attr_init(&attributes)) return;
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool is_running = !pthread_create(&thread, &attributes, restore_thread, NULL);
    while (is_running && !read_word(&gate->thread)) wait_while(&gate->thread, 0);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* A statically linked program loads a second C library with the driver. pthread_create crashes there. */
static bool has_loader(void)
{
    const ElfW(Phdr) *headers = (const void *)getauxval(AT_PHDR);
    for (unsigned long i = 0; headers && i < getauxval(AT_PHNUM); i++)
        if (headers[i].p_type == PT_INTERP) return true;
    return false;
}

void gate_begin(int file)
{
    if (file < 0) return;
    void *at = mmap(NULL, sizeof *gate, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (at == MAP_FAILED || !has_loader()) return;
    gate = at;
    start_thread();
}

/* A thread that finds the gate closed after it has entered steps back, so that the lock does not wait for it. */
void gate_enter(void)
{
    if (!gate) return;
    for (;;) {
        __atomic_fetch_add(&gate->n_inside, 1, __ATOMIC_SEQ_CST);
        if (!read_word(&gate->is_closed)) break;
        __atomic_fetch_sub(&gate->n_inside, 1, __ATOMIC_SEQ_CST);
        wait_while(&gate->is_closed, 1);
    }
    is_inside = true;
}

uint32_t gate_device(uint32_t device) { return gate ? read_word(&gate->devices[device]) : device; }

bool gate_is_parked(void) { return gate && read_word(&gate->is_parked); }

void gate_read_completion(void)
{
    if (gate_is_parked()) raise(SIGSEGV);
}

void gate_leave(void)
{
    if (!gate || !is_inside) return;
    is_inside = false;
    __atomic_fetch_sub(&gate->n_inside, 1, __ATOMIC_SEQ_CST);
}
