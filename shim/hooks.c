/*
 * hooks.c: how a program reaches us. Owns the table of hooks and the driver's own addresses; decides nothing.
 *
 * Three ways lead here: the exported names (programs linked against the driver), dlsym, and cuGetProcAddress, which
 * hands out pointers that no symbol lookup would see. A name that this driver lacks stays lacking.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#include "shim.h"

/*
 * Since glibc 2.34 these live in libc, before that in libdl, which a program that loads nothing does not have: it must
 * run. So they are weak, and of no version: a version names the file that must have it (see libc.S).
 */
#pragma weak dlopen
#pragma weak dlclose
#pragma weak dlerror
#pragma weak dlvsym
#ifdef __x86_64__
#define OLDEST "GLIBC_2.2.5"
#else
#define OLDEST "GLIBC_2.17"
#endif

/* What libc itself had there to load modules by. One of those may bring libdl in later, and then ask us for symbols. */
extern void *__libc_dlopen_mode(const char *, int) __attribute__((weak));
extern void *__libc_dlsym(void *, const char *) __attribute__((weak));
#define LIBC_DLOPEN 0x80000000u

#define FGPU_PASS ((void *)1) /* probe.S knows this number: not ours, jump */

enum library { DRIVER, NVML, LIBRARIES };
static const char *const sonames[LIBRARIES] = {"libcuda.so.1", "libnvidia-ml.so.1"};

/* One behind the other, found by their places: the loader of every program would have to write pointers. */
static const struct names {
#define TEXT(name) char name[sizeof #name];
    FGPU_DRIVER_TABLE(TEXT, TEXT)
    FGPU_NVML_TABLE(TEXT, TEXT)
#undef TEXT
} names = {
#define TEXT(name) #name,
    FGPU_DRIVER_TABLE(TEXT, TEXT) FGPU_NVML_TABLE(TEXT, TEXT)};

static const struct entry {
    void *hook; /* NULL: not hooked */
    uint16_t name;
    uint8_t library;
} table[FGPU_NAMES] = {
#define HOOK(name) {name, offsetof(struct names, name), LIBRARY},
#define NEED(name) {NULL, offsetof(struct names, name), LIBRARY},
#define LIBRARY DRIVER
    FGPU_DRIVER_TABLE(HOOK, NEED)
#undef LIBRARY
#define LIBRARY NVML
        FGPU_NVML_TABLE(HOOK, NEED)};

static const char *name_of(enum fgpu_name at) { return (const char *)&names + table[at].name; }

static _Atomic(void *) real[FGPU_NAMES]; /* found in the library of the right name */
static _Atomic(void *)
    foreign[FGPU_NAMES]; /* found by the program in a copy under another name: used only without the former */

void *(*fgpu_real_dlsym)(void *, const char *);
HIDDEN void *fgpu_lookup(void *handle, const char *name);
static void *(*dl_open)(const char *, int);
static int (*dl_close)(void *);
static char *(*dl_error)(void);

/* Another library's constructor may call dlsym before ours has run, so lookups resolve it too; all find the same. */
__attribute__((constructor)) static void resolve_dlsym(void)
{
    void *found = NULL;
    if (fgpu_real_dlsym) return;
    if (dlvsym) {
        dl_open = dlopen;
        dl_close = dlclose;
        dl_error = dlerror;
        found = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
        if (!found) found = dlvsym(RTLD_NEXT, "dlsym", OLDEST);
    } else if (__libc_dlopen_mode && __libc_dlsym) {
        void *libdl = __libc_dlopen_mode("libdl.so.2", (int)(RTLD_LAZY | RTLD_NOLOAD | LIBC_DLOPEN));
        if (!libdl) return;
        dl_open = __libc_dlsym(libdl, "dlopen");
        dl_close = __libc_dlsym(libdl, "dlclose");
        dl_error = __libc_dlsym(libdl, "dlerror");
        found = __libc_dlsym(libdl, "dlsym");
    }
    __atomic_store_n((void **)&fgpu_real_dlsym, found, __ATOMIC_RELEASE);
}

/* In the loaded library of the right name. Never loads one: a program that runs without a driver must go on doing so.
 */
static void *find(enum fgpu_name at)
{
    if (!fgpu_real_dlsym) resolve_dlsym();
    if (!fgpu_real_dlsym) return NULL;
    void *found = NULL;
    void *library = dl_open(sonames[table[at].library], RTLD_LAZY | RTLD_NOLOAD);
    if (library) {
        found = fgpu_real_dlsym(library, name_of(at));
        dl_close(library);
    }
    return found;
}

void *fgpu_symbol(void *library, enum fgpu_name at)
{
    void *found = library ? fgpu_real_dlsym(library, name_of(at)) : NULL;
    if (library && !found) dl_error();
    return found;
}

void *fgpu_open_loaded(const char *path)
{
    void *library = dl_open(path, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) dl_error();
    return library;
}

void fgpu_close(void *library) { dl_close(library); }

void *fgpu_real(enum fgpu_name at)
{
    if (!LIKELY(!fgpu_beside)) return fgpu_real_beside(at);
    void *found = atomic_load_explicit(&real[at], memory_order_relaxed);
    if (LIKELY(found)) return found;
    int saved = errno;
    found = find(at);
    if (found)
        atomic_store_explicit(&real[at], found, memory_order_relaxed);
    else
        found = atomic_load_explicit(&foreign[at], memory_order_relaxed);
    /* Not kept: this may be a stub that loads the driver at its first call and would then be handed our hook to call.
     */
    if (!found && fgpu_real_dlsym) {
        found = fgpu_real_dlsym(RTLD_NEXT, name_of(at));
        if (!found) dl_error(); /* our failure, not the program's: it may ask dlerror next */
    }
    errno = saved;
    return found;
}

/* A library that was unloaded and loaded again lies elsewhere: then none of its addresses may be used again. */
static void *find_anew(enum fgpu_name at)
{
    void *found = find(at), *known = atomic_load_explicit(&real[at], memory_order_relaxed);
    if (known && known != found)
        for (int i = 0; i < FGPU_NAMES; i++)
            if (table[i].library == table[at].library) atomic_store_explicit(&real[i], NULL, memory_order_relaxed);
    if (found) atomic_store_explicit(&real[at], found, memory_order_relaxed);
    return found;
}

static enum fgpu_name hooked(const char *name)
{
    /* Nearly every lookup of nearly every program ends at this line. */
    if (!(name[0] == 'c' && name[1] == 'u') && !(name[0] == 'n' && name[1] == 'v')) return FGPU_NAMES;
    for (enum fgpu_name at = 0; at < FGPU_NAMES; at++)
        if (table[at].hook && !strcmp(name_of(at), name)) return at;
    return FGPU_NAMES;
}

/* What dlsym answers, or FGPU_PASS. The program's own lookup comes last, so that dlerror tells of that and not of ours.
 */
void *fgpu_lookup(void *handle, const char *name)
{
    if (!fgpu_real_dlsym) resolve_dlsym();
    if (!name || handle == RTLD_NEXT || !fgpu_real_dlsym) return FGPU_PASS;
    enum fgpu_name at = hooked(name);
    if (at == FGPU_NAMES) return FGPU_PASS;
    int saved = errno;
    void *hook = table[at].hook, *driver = find_anew(at), *found = fgpu_real_dlsym(handle, name), *beside;
    if (found == hook) {
        /* A search of the whole program meets our own export first: the driver behind it decides. */
        if (!driver) driver = fgpu_real_dlsym(RTLD_NEXT, name);
        found = driver ? hook : NULL;
    } else if (found && found == driver) {
        found = hook;
    } else if (found && !driver && handle != RTLD_DEFAULT) {
        atomic_store_explicit(&foreign[at], found, memory_order_relaxed);
        found = hook;
    } else if (found && (beside = fgpu_hook_beside(at, found))) {
        found = hook = beside;
    } /* else another preload before us, or what is left to a further driver: theirs, the kernel sees what it does */
    errno = saved;
    return found;
}

/* `asked` has no version ("cuCtxCreate"); which one came back is told by its address alone. */
static void substitute(const char *asked, void **answer)
{
    size_t length = strlen(asked);
    for (enum fgpu_name at = 0; at < FGPU_NAMES; at++) {
        const char *name = name_of(at);
        if (!table[at].hook || strncmp(name, asked, length) || (name[length] && name[length] != '_')) continue;
        if (fgpu_real(at) != *answer) continue;
        void *hook = fgpu_beside ? fgpu_entry_beside(at) : table[at].hook;
        if (!hook) return;
        *answer = hook;
        return;
    }
}

EXPORT CUresult cuGetProcAddress(const char *symbol, void **pfn, int cudaVersion, cuuint64_t flags)
{
    __typeof__(&cuGetProcAddress) driver = REAL(cuGetProcAddress);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(symbol, pfn, cudaVersion, flags);
    if (result == CUDA_SUCCESS && symbol && pfn && *pfn) substitute(symbol, pfn);
    return result;
}

EXPORT CUresult cuGetProcAddress_v2(const char *symbol, void **pfn, int cudaVersion, cuuint64_t flags,
                                    CUdriverProcAddressQueryResult *symbolStatus)
{
    __typeof__(&cuGetProcAddress_v2) driver = REAL(cuGetProcAddress_v2);
    if (!driver) return CUDA_ERROR_NOT_SUPPORTED;
    CUresult result = driver(symbol, pfn, cudaVersion, flags, symbolStatus);
    if (result == CUDA_SUCCESS && symbol && pfn && *pfn) substitute(symbol, pfn);
    return result;
}

EXPORT CUresult cuInit(unsigned int Flags)
{
    int announced = fgpu_announce();
    __typeof__(&cuInit) driver = REAL(cuInit);
    CUresult result = driver ? driver(Flags) : CUDA_ERROR_NOT_SUPPORTED;
    fgpu_arrive(announced);
    return result;
}
