/* kernels: a library for CUDA_INJECTION64_PATH that records when the kernels of a process ran. cuInit() loads it into
 * the process and calls InitializeInjection(). It does not use fgpu. bench/lib/kernel_times.py builds it.
 *
 *   KERNELS_OUT   the file is at this path with ".PID" appended, so that each child process has its own
 *   CUPTI         the path of libcupti, for processes that have not loaded one
 *
 * The file has 64-bit numbers: the kernels that were recorded, the kernels that are missing, 1 if the process has ended
 * by exit() or by a return from main(), and 0; then the union of the intervals in which kernels ran, as pairs of begin
 * and end in nanoseconds of CUPTI's clock, in order. The file is written when the process ends, because CUPTI may
 * deliver records long after later ones. KERNEL is the newest structure of a kernel's record in the header; the
 * compiler's command line defines it. */
#define _GNU_SOURCE
#include <cupti_activity.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BUFFER_BYTES (1 << 20)
#define FLUSH_MS 1000
#define MOST_NS 3600000000000ull /* a longer kernel is a record of another layout */
#define FIRST_ROOM 65536

#define CALLS(X)                                                                                                       \
    X(cuptiActivityRegisterCallbacks)                                                                                  \
    X(cuptiActivityEnable)                                                                                             \
    X(cuptiActivityFlushPeriod)                                                                                        \
    X(cuptiActivityFlushAll)                                                                                           \
    X(cuptiActivityGetNextRecord)                                                                                      \
    X(cuptiActivityGetNumDroppedRecords)

static struct {
#define SLOT(name) __typeof__(&name) name;
    CALLS(SLOT)
} cupti;

struct interval {
    uint64_t begin, end;
};

static struct {
    uint64_t kernels, missing, has_ended, unused;
} header;
static struct interval *pending; /* the intervals of earlier buffers are disjoint and in order */
static size_t count, room;
static int out = -1;
static pid_t owner; /* a forked child has a copy of this library's state, and must not write */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static bool put(const void *data, size_t bytes, off_t at)
{
    while (bytes) {
        ssize_t done = pwrite(out, data, bytes, at);
        if (done <= 0) return false;
        data = (const char *)data + done;
        bytes -= (size_t)done;
        at += done;
    }
    return true;
}

static bool has_room(void)
{
    if (count < room) return true;
    size_t more = room ? 2 * room : FIRST_ROOM;
    struct interval *grown = realloc(pending, more * sizeof *pending);
    if (!grown) return false;
    pending = grown;
    room = more;
    return true;
}

static void add(const KERNEL *kernel)
{
    uint64_t begin = kernel->start, end = kernel->end;
    if (!begin || end < begin || end - begin > MOST_NS || !has_room()) {
        header.missing++;
        return;
    }
    pending[count++] = (struct interval){begin, end};
    header.kernels++;
}

static int by_begin(const void *a, const void *b)
{
    const struct interval *one = a, *other = b;
    return (one->begin > other->begin) - (one->begin < other->begin);
}

/* Sort the intervals from `first` on, and unite them with each other and with earlier intervals. */
static void unite(size_t first)
{
    if (first == count) return;
    qsort(pending + first, count - first, sizeof *pending, by_begin);
    for (uint64_t begin = pending[first].begin; first && pending[first - 1].end >= begin;) first--;
    qsort(pending + first, count - first, sizeof *pending, by_begin);
    size_t last = first;
    for (size_t i = first + 1; i < count; i++) {
        if (pending[i].begin > pending[last].end)
            pending[++last] = pending[i];
        else if (pending[i].end > pending[last].end)
            pending[last].end = pending[i].end;
    }
    count = last + 1;
}

static void CUPTIAPI request(uint8_t **buffer, size_t *size, size_t *most_records)
{
    *buffer = malloc(BUFFER_BYTES);
    *size = *buffer ? BUFFER_BYTES : 0;
    *most_records = 0; /* as many as fit */
}

static void CUPTIAPI complete(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid)
{
    CUpti_Activity *record = NULL;
    size_t dropped = 0;
    (void)size;
    pthread_mutex_lock(&lock);
    size_t first = count;
    while (cupti.cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS)
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL || record->kind == CUPTI_ACTIVITY_KIND_KERNEL)
            add((const KERNEL *)record);
    if (cupti.cuptiActivityGetNumDroppedRecords(context, stream, &dropped) == CUPTI_SUCCESS) header.missing += dropped;
    unite(first);
    pthread_mutex_unlock(&lock);
    free(buffer);
}

static void finish(void)
{
    if (getpid() != owner) return;
    CUptiResult flushed = cupti.cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
    if (flushed != CUPTI_SUCCESS) fprintf(stderr, "kernels: cuptiActivityFlushAll: %d\n", (int)flushed);
    pthread_mutex_lock(&lock);
    header.has_ended = flushed == CUPTI_SUCCESS && put(pending, count * sizeof *pending, sizeof header);
    if (!put(&header, sizeof header, 0)) perror("kernels: pwrite");
    pthread_mutex_unlock(&lock);
}

/* A process must load only one CUPTI. A copy that is loaded already, for example by torch, is used first. */
static bool load(void)
{
    const char *names[] = {"libcupti.so.13", "libcupti.so.12", getenv("CUPTI"), "libcupti.so.13", "libcupti.so.12"};
    void *library = NULL;
    for (size_t i = 0; !library && i < sizeof names / sizeof *names; i++)
        if (names[i]) library = dlopen(names[i], i < 2 ? RTLD_NOW | RTLD_NOLOAD : RTLD_NOW);
    bool all = library != NULL;
#define FIND(name) all = all && (cupti.name = (__typeof__(&name))dlsym(library, #name));
    CALLS(FIND)
    if (!all) fprintf(stderr, "kernels: no CUPTI: %s\n", dlerror());
    return all;
}

static bool start(void)
{
    CUptiResult result = cupti.cuptiActivityRegisterCallbacks(request, complete);
    if (result == CUPTI_SUCCESS) result = cupti.cuptiActivityFlushPeriod(FLUSH_MS);
    if (result == CUPTI_SUCCESS) result = cupti.cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
    if (result != CUPTI_SUCCESS) fprintf(stderr, "kernels: CUPTI records nothing: %d\n", (int)result);
    return result == CUPTI_SUCCESS;
}

/* Return 1 also after a failure: the program then runs without records, and `has_ended` stays 0 in its file. */
int InitializeInjection(void)
{
    char path[4096];
    const char *asked = getenv("KERNELS_OUT");
    if (!asked || owner == getpid()) return 1;
    owner = getpid();
    snprintf(path, sizeof path, "%s.%d", asked, (int)owner);
    out = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (out < 0 || !put(&header, sizeof header, 0)) {
        perror(path);
        return 1;
    }
    if (load() && start()) atexit(finish);
    return 1;
}
