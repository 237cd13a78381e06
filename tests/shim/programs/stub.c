/* A stub in the place of the driver: it loads the driver at its first call, as generated import libraries do. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

static int calls;
int stub_calls(void) { return calls; }
int cuMemAlloc_v2(unsigned long long *pointer, size_t size)
{
    int (*driver)(unsigned long long *, size_t) = dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuMemAlloc_v2");
    calls++;
    return driver(pointer, size);
}
