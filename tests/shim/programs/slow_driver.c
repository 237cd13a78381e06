/* A libcuda in front of the simulated driver, libcudX.so.1 (see driver_behind()): every 40th query takes 1.1 s. */
#include <cuda.h>
#include <dlfcn.h>
#include <unistd.h>

#define EVERY 40
#define LONG_US 1100000 /* longer than a thread may hold its turn in the shim's flight.c */

CUresult cuEventQuery(CUevent event)
{
    static unsigned calls;
    static CUresult (*driver)(CUevent);
    if (!driver) driver = dlsym(dlopen("libcudX.so.1", RTLD_NOW), "cuEventQuery");
    CUresult result = driver(event);
    if (__atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED) % EVERY == 0) usleep(LONG_US);
    return result;
}
