/* Stands before the simulated driver, found as libcudX.so.1 (see the test): now and then a query takes long. */
#include <cuda.h>
#include <dlfcn.h>
#include <unistd.h>

#define EVERY 40
#define LONG_US 1100000 /* longer than a turn in flight.c lasts */

CUresult cuEventQuery(CUevent event)
{
    static unsigned calls;
    static CUresult (*driver)(CUevent);
    if (!driver) driver = dlsym(dlopen("libcudX.so.1", RTLD_NOW), "cuEventQuery");
    CUresult result = driver(event);
    if (__atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED) % EVERY == 0) usleep(LONG_US);
    return result;
}
