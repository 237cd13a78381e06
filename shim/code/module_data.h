/* module_data.h: the interface of module_data.c, which requests memory for the data of code, for the files that load or
 * launch code. */
#ifndef FGPU_MODULE_DATA_H
#define FGPU_MODULE_DATA_H

#include "account/account.h"

struct fgpu_loaded;
struct fgpu_load {             /* of code into the current context */
    struct fgpu_loaded *entry; /* NULL: nothing was requested */
    uint64_t handle;           /* of its library; 0: a module, which has no handle yet */
    uint64_t context;
};

/* For use before and after the driver's call. */
HIDDEN CUresult fgpu_load_begins(struct fgpu_load *load, const void *code);
HIDDEN CUresult fgpu_load_of_file_begins(struct fgpu_load *load, const char *path);
HIDDEN CUresult fgpu_load_of_library_begins(struct fgpu_load *load, CUlibrary library);
HIDDEN CUresult fgpu_load_ends(const struct fgpu_load *load, CUresult result, uint64_t module); /* returns `result` */

HIDDEN CUlibrary fgpu_library_of(CUkernel kernel);                  /* NULL: the driver does not report it */
HIDDEN bool fgpu_code_uses_heap(uint64_t handle, uint64_t context); /* a module or library was loaded there */
/* The data of a library is allocated when a context first uses it. Without room in the list, a library with data is
 * refused, and unloaded again. */
HIDDEN CUresult fgpu_library_made(CUlibrary library, const void *code);
HIDDEN CUresult fgpu_library_of_file_made(CUlibrary library, const char *path);

HIDDEN void fgpu_data_leaves(uint64_t handle); /* of a module or library, before and after it is unloaded */
HIDDEN void fgpu_data_left(uint64_t handle, bool is_gone);
HIDDEN void fgpu_data_of_context_ends(uint64_t context);

#endif
