/* A libcuda in front of the simulated driver, libcudX.so.1 (see driver_behind()). It records which of the shim's own
 * calls are made, and which of them are made in a thread whose capture mode is not relaxed. Each of these functions has
 * at most six arguments, which are numbers and pointers. */
#define _GNU_SOURCE
#include "core/hook_table.h"

#include <dlfcn.h>

#define LEAVE(name)
/* The functions that only the shim calls, and four that programs call too. */
#define EACH(ASIDE)                                                                                                    \
    FGPU_DRIVER_TABLE(LEAVE, ASIDE)                                                                                    \
    ASIDE(cuEventCreate)                                                                                               \
    ASIDE(cuEventQuery)                                                                                                \
    ASIDE(cuMemPoolTrimTo)                                                                                             \
    ASIDE(cuDeviceGraphMemTrim)

#define NUMBER(name) AT_##name,
enum { EACH(NUMBER) ALL };
#define TEXT(name) #name,
static const char *const names[] = {EACH(TEXT)};

typedef long call(long, long, long, long, long, long);

static _Thread_local CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
static _Atomic(call *) behind[ALL];
static _Atomic int made[ALL], unrelaxed[ALL];
static _Atomic int noting;

EXPORT void modes_note(int on) { noting = on; }
EXPORT const char *modes_name(int at) { return at < ALL ? names[at] : NULL; }
EXPORT int modes_made(int at) { return made[at]; }
EXPORT int modes_unrelaxed(int at) { return unrelaxed[at]; }

static long pass(int at, long a, long b, long c, long d, long e, long f)
{
    call *driver = behind[at];
    if (!driver) behind[at] = driver = (call *)dlsym(dlopen("libcudX.so.1", RTLD_NOW), names[at]);
    bool exchanges = at == AT_cuThreadExchangeStreamCaptureMode;
    made[at] += noting;
    unrelaxed[at] += noting && !exchanges && mode != CU_STREAM_CAPTURE_MODE_RELAXED;
    CUstreamCaptureMode next = exchanges && a ? *(CUstreamCaptureMode *)a : mode;
    long result = driver ? driver(a, b, c, d, e, f) : CUDA_ERROR_NOT_SUPPORTED; /* the simulated driver lacks some */
    if (!(CUresult)result) mode = next;
    return result;
}

#define STAND(name)                                                                                                    \
    EXPORT long aside_##name(long, long, long, long, long, long) __asm__(#name);                                       \
    long aside_##name(long a, long b, long c, long d, long e, long f) { return pass(AT_##name, a, b, c, d, e, f); }
EACH(STAND)
