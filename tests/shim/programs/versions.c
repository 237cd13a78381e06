/* Makes lookups with both versions of glibc's dlsym: that of programs built before glibc 2.34, and the later one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

extern void *before(void *, const char *);
extern void *since(void *, const char *);
__asm__(".symver before, dlsym@GLIBC_2.2.5\n.symver since, dlsym@GLIBC_2.34");

static const char *owner(void *p)
{
    Dl_info info;
    if (!p || !dladdr(p, &info)) return "none";
    return strrchr(info.dli_fname, '/') + 1;
}
int main(void)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW), *maths = dlopen("libm.so.6", RTLD_NOW);
    printf("%s %s\n", owner(before(driver, "cuMemAlloc_v2")), owner(since(driver, "cuMemAlloc_v2")));
    printf("%s %s\n", owner(before(driver, "cuCtxGetDevice")), owner(since(maths, "cuMemAlloc_v2")));
    return 0;
}
