/* Another preloaded library, which passes each call on by RTLD_NEXT. It breaks if a dlsym() hides its caller. */
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
/* Wraps a hooked function too. The next definition must be the shim's. */
int cuMemAlloc_v2(unsigned long long *pointer, size_t size)
{
    int (*next)(unsigned long long *, size_t) = dlsym(RTLD_NEXT, "cuMemAlloc_v2");
    strings += 100;
    return next(pointer, size);
}
