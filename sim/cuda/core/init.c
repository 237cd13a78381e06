/* cuInit, the connection, and the checks with which every other function begins. One lock guards all state of the
 * process. It costs little: a call takes tens of microseconds, as a call of the real driver does, and most of this time
 * is the round trip to the server. Without a server, calls that need it return CUDA_ERROR_UNKNOWN or
 * CUDA_ERROR_OUT_OF_MEMORY. They never wait for a new server. */
#include "cuda/core/driver.h"
#include "cuda/core/gate.h"
#include "wire/link.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

struct driver driver;

static struct link connection = LINK_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void sim_lock(void) { pthread_mutex_lock(&lock); }

void sim_unlock(void) { pthread_mutex_unlock(&lock); }

CUresult sim_leave(CUresult result)
{
    pthread_mutex_unlock(&lock);
    gate_leave();
    return result;
}

/* Compares the pid before it takes the lock: in a forked child another thread of the parent may hold the lock for
 * ever. */
bool sim_is_ready(void) { return __atomic_load_n(&driver.ready, __ATOMIC_ACQUIRE) && driver.pid == getpid(); }

CUresult sim_enter_init(void)
{
    if (!sim_is_ready()) return CUDA_ERROR_NOT_INITIALIZED;
    gate_enter();
    pthread_mutex_lock(&lock);
    return CUDA_SUCCESS;
}

CUresult sim_enter_query(void)
{
    if (!sim_is_ready()) return CUDA_ERROR_NOT_INITIALIZED;
    pthread_mutex_lock(&lock);
    return CUDA_SUCCESS;
}

/* A destroyed context can still be current in a thread. The error then differs from that of a thread without one. */
CUresult sim_enter(struct context **current)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    *current = context_current();
    if (!*current) return sim_leave(CUDA_ERROR_INVALID_CONTEXT);
    return (*current)->alive ? CUDA_SUCCESS : sim_leave(CUDA_ERROR_CONTEXT_IS_DESTROYED);
}

int sim_ask(uint32_t op, struct sim_request request, void *payload, size_t room)
{
    request.op = op;
    return link_call(&connection, request, NULL, payload, room);
}

int sim_ask_file(uint32_t op, struct sim_request request, void *payload, size_t room, int *file)
{
    request.op = op;
    return link_call_file(&connection, request, NULL, payload, room, file);
}

CUresult sim_result(int status)
{
    switch (status) {
    case SIM_OK:
        return CUDA_SUCCESS;
    case SIM_NO_MEMORY:
    case SIM_NOT_ALLOWED:
        return CUDA_ERROR_OUT_OF_MEMORY;
    case SIM_ECC:
        return CUDA_ERROR_ECC_UNCORRECTABLE;
    default:
        return CUDA_ERROR_UNKNOWN;
    }
}

CUresult sim_take(struct context *context, int device, enum sim_kind kind, uint64_t bytes, uint64_t requested)
{
    struct sim_request request = {.device = (uint32_t)device,
                                  .kind = kind,
                                  .context = context ? context->id : 0,
                                  .bytes = bytes,
                                  .requested = requested};
    return sim_result(sim_ask(SIM_TAKE, request, NULL, 0));
}

/* Returns nothing: the server drops a client that releases more than it holds, so that a failure here is a defect of
 * this library. */
void sim_give(struct context *context, int device, enum sim_kind kind, uint64_t bytes, uint64_t requested)
{
    struct sim_request request = {.device = (uint32_t)device,
                                  .kind = kind,
                                  .context = context ? context->id : 0,
                                  .bytes = bytes,
                                  .requested = requested};
    sim_ask(SIM_GIVE, request, NULL, 0);
}

bool sim_is_device(CUdevice device) { return device >= 0 && (uint32_t)device < driver.n_devices; }

/* Handles come from programs and may be anything. A pointer is used only after it was found here. */
bool context_is_known(const struct context *context)
{
    for (const struct context *c = driver.contexts; c; c = c->next)
        if (c == context) return true;
    return false;
}

/* Return whether the process finds a control daemon of MPS. Its kernels run as without MPS. */
static bool finds_mps(void)
{
    const char *folder = getenv("CUDA_MPS_PIPE_DIRECTORY");
    char path[PATH_MAX];
    int saved = errno, length = snprintf(path, sizeof path, "%s/control", folder ?: "/tmp/nvidia-mps");
    bool finds = length < (int)sizeof path && !access(path, W_OK);
    errno = saved;
    return finds;
}

static CUresult initialise(void)
{
    uint32_t n;
    if (link_open(&connection, FGPU_SIM_DIR, &n) || !n) return CUDA_ERROR_NO_DEVICE;
    if (!node_open()) return CUDA_ERROR_NO_DEVICE;
    for (uint32_t i = 0; i < n; i++)
        if (sim_ask(SIM_DEVICE, (struct sim_request){.device = i}, &driver.devices[i], sizeof driver.devices[i]))
            return CUDA_ERROR_NO_DEVICE;
    for (uint32_t i = 0; i < n; i++) driver.devices[i].attributes[CU_DEVICE_ATTRIBUTE_MPS_ENABLED] = finds_mps();
    int gate = -1, status = sim_ask_file(SIM_ATTACH, (struct sim_request){0}, NULL, 0, &gate);
    if (status) return status == SIM_LOST ? CUDA_ERROR_NO_DEVICE : CUDA_ERROR_OUT_OF_MEMORY;
    /* Done last, when nothing can fail any more: a second attempt must find the list as empty as the first did. */
    for (uint32_t i = 0; i < n; i++) {
        driver.primary[i] = (struct context){.device = (int)i, .primary = true, .next = driver.contexts};
        driver.contexts = &driver.primary[i];
    }
    gate_begin(gate);
    driver.n_devices = n;
    driver.pid = getpid();
    __atomic_store_n(&driver.ready, true, __ATOMIC_RELEASE);
    return CUDA_SUCCESS;
}

/* May be called again at any time, and by several threads at once. A program may repeat it after a failure. */
API cuInit(unsigned int flags)
{
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (__atomic_load_n(&driver.ready, __ATOMIC_ACQUIRE) && driver.pid != getpid()) return CUDA_ERROR_NOT_INITIALIZED;
    pthread_mutex_lock(&lock);
    CUresult result = driver.ready ? CUDA_SUCCESS : initialise();
    pthread_mutex_unlock(&lock);
    return result;
}

API cuDriverGetVersion(int *version)
{
    SIM_FRAME();
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    *version = SIM_CUDA_VERSION;
    return CUDA_SUCCESS;
}
