/* Preloaded between a sanitizer's library and the shim. The sanitizer's library looks up the functions that it replaces
 * before it is ready to check code, so these lookups must not run the shim, whose code it checks. They name no library
 * and get libc's dlsym(). A lookup that names a library is one of the program, and gets the shim's.
 */
#define _GNU_SOURCE
#include <dlfcn.h>

typedef void *lookup(void *, const char *);

/* The last call is a jump, because the called dlsym() identifies the caller by its return address. */
void *dlsym(void *restrict handle, const char *restrict name)
{
    lookup *next = (lookup *)dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
    if (handle != RTLD_NEXT && handle != RTLD_DEFAULT) next = (lookup *)next(RTLD_NEXT, "dlsym");
    return next(handle, name);
}
