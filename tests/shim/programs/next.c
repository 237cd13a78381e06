/* Another preload, of the kind that breaks when dlsym hides its caller: every call goes on by RTLD_NEXT. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

static int strings;
int next_calls(void) { return strings; }
int puts(const char *s)
{
    int (*next)(const char *) = dlsym(RTLD_NEXT, "puts");
    strings++;
    return next == puts ? -1 : next(s);
}
/* It wraps a hooked name as well: the shim must be what follows it. */
int cuMemAlloc_v2(unsigned long long *pointer, size_t size)
{
    int (*next)(unsigned long long *, size_t) = dlsym(RTLD_NEXT, "cuMemAlloc_v2");
    strings += 100;
    return next(pointer, size);
}
