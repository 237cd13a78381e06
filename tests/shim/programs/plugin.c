/*
 * A plugin that uses the driver. With -DOPENS it opens the driver by itself, as a static CUDA runtime does; otherwise
 * it is linked with the driver. With -DLEAF it opens another file, which only its own RUNPATH finds.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>

#ifdef LEAF
int plugin_open(int flags) { return dlopen("leaf.so", flags) != NULL; }
#else
typedef int allocate(unsigned long long *, size_t);
typedef int inform(size_t *, size_t *);

#ifdef OPENS
static void *find(const char *name)
{
    void *driver = dlopen("libcuda.so.1", RTLD_NOW), *found = dlsym(driver, name);
    dlclose(driver);
    return found;
}
#define cuMemAlloc_v2 (*(allocate *)find("cuMemAlloc_v2"))
#define cuMemGetInfo_v2 (*(inform *)find("cuMemGetInfo_v2"))
#else
extern allocate cuMemAlloc_v2;
extern inform cuMemGetInfo_v2;
#endif

int plugin_alloc(size_t bytes)
{
    unsigned long long pointer;
    return cuMemAlloc_v2(&pointer, bytes);
}

size_t plugin_total(void)
{
    size_t available, total;
    return cuMemGetInfo_v2(&available, &total) ? 0 : total;
}
#endif

/* errno and "dlerror() has an error" after plugin_open_deep()'s call of dlopen(). */
int plugin_opened_errno, plugin_opened_dlerror;
void *plugin_open_deep(const char *path)
{
    dlopen("/no/such/file", RTLD_NOW);
    errno = 77;
    void *opened = dlopen(path, RTLD_NOW | RTLD_DEEPBIND);
    plugin_opened_errno = errno;
    plugin_opened_dlerror = dlerror() != NULL;
    return opened;
}
