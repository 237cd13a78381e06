/* Preloaded between a sanitizer's library and the shim: the former looks up what it stands in for before it can look on
 * at anything, and must not meet code that it looks on at. It names no library; programs that name one reach the shim.
 */
#define _GNU_SOURCE
#include <dlfcn.h>

typedef void *lookup(void *, const char *);

/* Both are jumps: who is asked must see who asks. */
void *dlsym(void *restrict handle, const char *restrict name)
{
    lookup *next = (lookup *)dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
    if (handle != RTLD_NEXT && handle != RTLD_DEFAULT) next = (lookup *)next(RTLD_NEXT, "dlsym");
    return next(handle, name);
}
