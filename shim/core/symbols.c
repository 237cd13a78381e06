/*
 * symbols.c: lookups of the driver's functions by name. Owns the names, and the addresses of libc's dlopen and related
 * functions.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

#include "core/symbols.h"

/*
 * Since glibc 2.34 these functions are in libc, before that in libdl. A program that loads nothing has no libdl, and
 * must run. So the symbols are weak and have no version: a version would name the file that must have it (see
 * base/libc.S).
 */
#pragma weak dlclose
#pragma weak dlerror
#pragma weak dlvsym
#ifdef __x86_64__
#define OLDEST "GLIBC_2.2.5"
#else
#define OLDEST "GLIBC_2.17"
#endif

/* The functions by which libc loaded its own modules before glibc 2.34. Such a module may load libdl later, and then
 * look up symbols through the shim. */
extern void *__libc_dlopen_mode(const char *, int) __attribute__((weak));
extern void *__libc_dlsym(void *, const char *) __attribute__((weak));
#define LIBC_DLOPEN 0x80000000u

static const char *const sonames[FGPU_LIBRARIES] = {"libcuda.so.1", "libnvidia-ml.so.1"};

const struct fgpu_names fgpu_names = {
#define TEXT(name) #name,
    FGPU_DRIVER_TABLE(TEXT, TEXT) FGPU_NVML_TABLE(TEXT, TEXT)};
#undef TEXT

const struct fgpu_symbol fgpu_symbols[FGPU_NAMES] = {
#define PLACE(name) {offsetof(struct fgpu_names, name), LIBRARY, sizeof #name - 1},
#define LIBRARY FGPU_LIBCUDA
    FGPU_DRIVER_TABLE(PLACE, PLACE)
#undef LIBRARY
#define LIBRARY FGPU_LIBNVML
        FGPU_NVML_TABLE(PLACE, PLACE)};

enum fgpu_name fgpu_name_at(const char *name)
{
    size_t length = strlen(name);
    for (enum fgpu_name at = 0; at < FGPU_NAMES; at++)
        if (fgpu_symbols[at].length == length && !strcmp(fgpu_name_of(at), name)) return at;
    return FGPU_NAMES;
}

const char *fgpu_file_of(enum fgpu_name at) { return sonames[fgpu_symbols[at].library]; }

void *(*fgpu_real_dlsym)(void *, const char *);
void *(*fgpu_real_dlopen)(const char *, int); /* the shim exports a dlopen of its own: look up the next one */
static int (*dl_close)(void *);
static char *(*dl_error)(void);

/* Find the real dlsym. The constructor of another library may call dlsym before this constructor has run, so lookups
 * call this function too; all calls find the same address. */
__attribute__((constructor)) void fgpu_resolve_dlsym(void)
{
    void *found = NULL;
    if (fgpu_real_dlsym) return;
    if (dlvsym) {
        dl_close = dlclose;
        dl_error = dlerror;
        /* The oldest version is in every glibc. A lookup that fails calls malloc, which may be another library's, and
         * that may call dlsym to find the next one. */
        found = dlvsym(RTLD_NEXT, "dlsym", OLDEST);
        if (!found) found = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
        if (!found) return;
        fgpu_real_dlopen = ((__typeof__(fgpu_real_dlsym))found)(RTLD_NEXT, "dlopen");
    } else if (__libc_dlopen_mode && __libc_dlsym) {
        void *libdl = __libc_dlopen_mode("libdl.so.2", (int)(RTLD_LAZY | RTLD_NOLOAD | LIBC_DLOPEN));
        if (!libdl) return;
        fgpu_real_dlopen = __libc_dlsym(libdl, "dlopen");
        dl_close = __libc_dlsym(libdl, "dlclose");
        dl_error = __libc_dlsym(libdl, "dlerror");
        found = __libc_dlsym(libdl, "dlsym");
    }
    __atomic_store_n((void **)&fgpu_real_dlsym, found, __ATOMIC_RELEASE);
}

/* Find a function in the loaded library of the expected name. Never load the library: a program that runs without a
 * driver must still run without one. A library with the function stays open, because the caller keeps the address. */
void *fgpu_find(enum fgpu_name at, bool *is_loaded)
{
    *is_loaded = false;
    if (!fgpu_real_dlsym) fgpu_resolve_dlsym();
    if (!fgpu_real_dlsym) return NULL;
    void *found = NULL;
    void *library = fgpu_real_dlopen(fgpu_file_of(at), RTLD_LAZY | RTLD_NOLOAD);
    if (library) {
        *is_loaded = true;
        found = fgpu_real_dlsym(library, fgpu_name_of(at));
        if (!found) dl_close(library);
    }
    return found;
}

void *fgpu_symbol(void *library, enum fgpu_name at)
{
    void *found = library ? fgpu_real_dlsym(library, fgpu_name_of(at)) : NULL;
    if (library && !found) dl_error();
    return found;
}

void *fgpu_open_loaded(const char *path)
{
    void *library = fgpu_real_dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) dl_error();
    return library;
}

void fgpu_close(void *library) { dl_close(library); }
