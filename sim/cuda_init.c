/* cuInit, the connection, and the checks that every other function begins with. */
#include "cuda_state.h"
#include "link.h"

#include <string.h>
#include <unistd.h>

struct driver driver;

static struct link connection = LINK_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void sim_lock(void) { pthread_mutex_lock(&lock); }

void sim_unlock(void) { pthread_mutex_unlock(&lock); }

CUresult sim_leave(CUresult result)
{
    pthread_mutex_unlock(&lock);
    return result;
}

/* The pid is compared before the lock is taken: in a forked child another thread of the parent may seem to hold it for
 * ever. */
CUresult sim_enter_init(void)
{
    if (!__atomic_load_n(&driver.ready, __ATOMIC_ACQUIRE) || driver.pid != getpid()) return CUDA_ERROR_NOT_INITIALIZED;
    pthread_mutex_lock(&lock);
    return CUDA_SUCCESS;
}

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

CUresult sim_take(struct context *context, int device, enum sim_kind kind, uint64_t bytes, uint64_t requested)
{
    struct sim_request request = {.device = (uint32_t)device,
                                  .kind = kind,
                                  .context = context ? context->id : 0,
                                  .bytes = bytes,
                                  .requested = requested};
    switch (sim_ask(SIM_TAKE, request, NULL, 0)) {
    case SIM_OK:
        return CUDA_SUCCESS;
    case SIM_NO_MEMORY:
    case SIM_NOT_ALLOWED:
        return CUDA_ERROR_OUT_OF_MEMORY;
    default:
        return CUDA_ERROR_UNKNOWN;
    }
}

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

static CUresult initialise(void)
{
    uint32_t n;
    if (link_open(&connection, FGPU_SIM_DIR, &n) || !n) return CUDA_ERROR_NO_DEVICE;
    for (uint32_t i = 0; i < n; i++) {
        if (sim_ask(SIM_DEVICE, (struct sim_request){.device = i}, &driver.devices[i], sizeof driver.devices[i]))
            return CUDA_ERROR_NO_DEVICE;
        driver.primary[i].device = (int)i;
        driver.primary[i].primary = true;
        driver.primary[i].next = driver.contexts;
        driver.contexts = &driver.primary[i];
    }
    driver.n_devices = n;
    driver.pid = getpid();
    __atomic_store_n(&driver.ready, true, __ATOMIC_RELEASE);
    return CUDA_SUCCESS;
}

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
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    *version = SIM_CUDA_VERSION;
    return CUDA_SUCCESS;
}
