/*
 * second_driver.c: a second driver in the same process (another file of libcuda, which a library has loaded for its own
 * use). Owns the handle of that file, and never closes it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>

#include "core/symbols.h"

HIDDEN __thread bool fgpu_calls_second __attribute__((tls_model("initial-exec"))) = false;

/* There is at most one such driver. A third driver of a process has no hooks; probes report the memory that it
 * allocates. */
static _Atomic(void *) further, further_base; /* the handle of the file, and its base address, which is stored last */

/* Look the function up at every call: programs make few such calls, and a cache would use memory in all other
 * programs. */
void *fgpu_real_of_second(enum fgpu_name at) { return fgpu_symbol(atomic_load(&further), at); }

void *fgpu_base_of(const void *address, const char **path)
{
    int (*ask)(const void *, Dl_info *) = (__typeof__(ask))fgpu_real_dlsym(RTLD_DEFAULT, "dladdr");
    Dl_info info;
    if (!address || !ask || !ask(address, &info)) return NULL;
    *path = info.dli_fname;
    return info.dli_fbase;
}

/* Open the file of a driver that is mapped at `base`. NULL: the file is not a driver, but for example a preload that
 * replaces one function of the driver. All functions of a driver are in one file. */
static void *open_driver(const char *path, const void *base)
{
    const char *other;
    void *library = fgpu_open_loaded(path);
    if (!library || fgpu_base_of(fgpu_real_dlsym(library, "cuDriverGetVersion"), &other) == base) return library;
    fgpu_close(library);
    return NULL;
}

static bool is_further(const char *path, void *base)
{
    void *none = NULL, *known = atomic_load(&further_base);
    if (known) return known == base;
    void *library = open_driver(path, base);
    if (!library) return false;
    if (atomic_compare_exchange_strong(&further, &none, library)) {
        atomic_store(&further_base, base);
        return true;
    }
    fgpu_close(library); /* another thread was first; normally this is the same file */
    return none == library;
}

bool fgpu_is_of_second(void *address)
{
    const char *path = NULL;
    void *base = fgpu_base_of(address, &path);
    return base && is_further(path, base);
}
