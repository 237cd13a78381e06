/*
 * driver.c: the driver functions that hooks call. Owns the addresses that were found; decides nothing. For a name that
 * this driver lacks, lookups still find nothing. They are not repeated: they allocate, and wait for the loader's lock.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>

#include "core/symbols.h"

static _Atomic(void *) real[FGPU_NAMES];    /* found in the library of the expected name */
static _Atomic(void *) foreign[FGPU_NAMES]; /* found by the program in a copy under another name: used only if the
                                               library of the expected name lacks it */
static _Atomic uint8_t absent[FGPU_NAMES / 8 + 1]; /* bits: the loaded library lacks it, and no other library has it */

static COLD void *search(enum fgpu_name at)
{
    void *found;
    if (atomic_load_explicit(&absent[at / 8], memory_order_relaxed) >> at % 8 & 1) return NULL;
    int saved = errno;
    bool is_loaded;
    found = fgpu_find(at, &is_loaded);
    if (found)
        atomic_store_explicit(&real[at], found, memory_order_relaxed);
    else
        found = atomic_load_explicit(&foreign[at], memory_order_relaxed);
    /* The address is not stored: it may be that of a stub, which loads the driver at its first call. The stub's own
     * lookup then returns the shim's hook, and the hook must call the driver, not the stub again. */
    if (!found && fgpu_real_dlsym) found = fgpu_symbol(RTLD_NEXT, at);
    if (!found && is_loaded) atomic_fetch_or(&absent[at / 8], 1 << at % 8);
    errno = saved;
    return found;
}

void *fgpu_real(enum fgpu_name at)
{
    if (!LIKELY(!fgpu_calls_second)) return fgpu_real_of_second(at);
    void *found = atomic_load_explicit(&real[at], memory_order_relaxed);
    return LIKELY(found) ? found : search(at);
}

void fgpu_keep_foreign(enum fgpu_name at, void *found)
{
    atomic_store_explicit(&foreign[at], found, memory_order_relaxed);
    atomic_fetch_and(&absent[at / 8], ~(1 << at % 8));
}

void fgpu_keep(enum fgpu_name at, void *found)
{
    atomic_store_explicit(&real[at], found, memory_order_relaxed);
    atomic_fetch_and(&absent[at / 8], ~(1 << at % 8));
}

void *fgpu_kept(enum fgpu_name at) { return atomic_load_explicit(&real[at], memory_order_relaxed); }
