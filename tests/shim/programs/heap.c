/* A preloaded allocator that finds the next one by dlsym, as tcmalloc and many debuggers of heaps do. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

void *malloc(size_t size)
{
    static void *(*next)(size_t);
    if (!next) next = dlsym(RTLD_NEXT, "malloc");
    return next(size);
}
