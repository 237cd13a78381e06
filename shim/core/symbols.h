/* symbols.h: declarations for the files of core/, and for lookup.c. Other files need only hook_table.h. */
#ifndef FGPU_SYMBOLS_H
#define FGPU_SYMBOLS_H

#include "core/hook_table.h"

/* -- symbols.c: the names, and lookups of them */

enum fgpu_library { FGPU_LIBCUDA, FGPU_LIBNVML, FGPU_LIBRARIES };

/* The names are stored one after the other and found by offset. With pointers, the loader of every program would have
 * to process one relocation for each name. */
struct fgpu_names {
#define TEXT(name) char name[sizeof #name];
    FGPU_DRIVER_TABLE(TEXT, TEXT)
    FGPU_NVML_TABLE(TEXT, TEXT)
#undef TEXT
};
extern HIDDEN const struct fgpu_names fgpu_names;
extern HIDDEN const struct fgpu_symbol {
    uint16_t name;
    uint8_t library;
    uint8_t length; /* of the name */
} fgpu_symbols[FGPU_NAMES];

static inline const char *fgpu_name_of(enum fgpu_name at) { return (const char *)&fgpu_names + fgpu_symbols[at].name; }

HIDDEN enum fgpu_name fgpu_name_at(const char *name); /* FGPU_NAMES: in no table */

extern HIDDEN void *(*fgpu_real_dlsym)(void *, const char *);
extern HIDDEN void *(*fgpu_real_dlopen)(const char *, int);
HIDDEN void fgpu_resolve_dlsym(void);
HIDDEN void *fgpu_find(enum fgpu_name at, bool *is_loaded); /* in the library of the expected name, if it is loaded */
HIDDEN void *fgpu_symbol(void *library, enum fgpu_name at);
HIDDEN const char *fgpu_file_of(enum fgpu_name at); /* the expected name of its library */
HIDDEN void *fgpu_open_loaded(const char *path);    /* NULL: it is not loaded */
HIDDEN void fgpu_close(void *library);

/* -- driver.c */
HIDDEN void fgpu_keep(enum fgpu_name at, void *found); /* NULL: the library that is loaded now lacks it */
HIDDEN void *fgpu_kept(enum fgpu_name at);
HIDDEN void fgpu_keep_foreign(enum fgpu_name at, void *found); /* found in a copy of the driver under another name */

/* -- exports.c. `hooks`: by name, the offset of the hook from the table; 0: there is none */
static inline void *fgpu_hook(const int32_t hooks[], enum fgpu_name at)
{
    return hooks[at] ? (char *)(uintptr_t)hooks + hooks[at] : NULL;
}
HIDDEN void *fgpu_find_anew(enum fgpu_name at, const int32_t hooks[]);
HIDDEN void fgpu_load_for_good(enum fgpu_name at, const char *opened, const int32_t hooks[]);

/* -- second_driver.c: a further driver in the same process */
HIDDEN void *fgpu_real_of_second(enum fgpu_name at);
HIDDEN void *fgpu_base_of(const void *address, const char **path); /* base address of the file that contains it */

/* Return whether an address is in the second driver. The first call decides which file the second driver is. */
HIDDEN bool fgpu_is_of_second(void *address);

#endif
