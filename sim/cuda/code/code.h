/* Code: images, modules, libraries, and the kernels in them.
 *
 * A module is code in a context. Its load puts its data on the device, and the first request for a function puts its
 * code there. For a library, the first request in a context for its module, a global or a kernel's function puts the
 * data there, and the code follows when a kernel is loaded or launched. With eager loading, the code is loaded with the
 * data. */
#ifndef FGPU_SIM_CUDA_CODE_CODE_H
#define FGPU_SIM_CUDA_CODE_CODE_H

#include "cuda/core/driver.h"

struct symbol {
    struct symbol *next;
    uint64_t size;   /* of an entry: bytes of local memory per thread */
    uint64_t offset; /* of data: from the start of the module's data */
    char name[];
};

struct image {
    unsigned users;
    bool is_assembly;            /* the image has no kernels but its entries */
    bool has_malloc, has_printf; /* the image calls these functions of the device */
    uint64_t bytes;              /* of code; 0: the code is small, and fits beside the context's own code */
    uint64_t data;               /* bytes of all globals */
    struct symbol *entries, *globals;
};

struct shape {
    unsigned grid[3], block[3], shared;
};

struct function {
    char name[128];
    uint64_t ns;
    struct party party;
    struct needs needs;
    struct shape shape;   /* for cuLaunch and its relatives, which have no arguments for it */
    unsigned shared_most; /* the most bytes of shared memory that a launch may request */
    struct module *module;
    struct function *next;
};

struct module {
    struct context *context;
    struct image *image;
    struct range *data; /* NULL: the module has none */
    bool is_loaded, is_library;
    struct function *functions;
    struct module *next;
};

struct kernel_entry {
    char name[128];
    struct library *library;
    struct kernel_entry *next;
};

/* The module of a library in one context. */
struct placed {
    struct module *module;
    struct placed *next;
};

struct library {
    struct image *image;
    struct kernel_entry *kernels;
    struct placed *placed;
    struct library *next;
};

/* How a launch of a kernel runs. */
struct kernel_run {
    uint64_t ns;
    struct party party;
    struct needs needs;
};

/* symbols.c */
bool symbol_new(struct symbol **list, const char *name, size_t length, uint64_t size, uint64_t offset);
const struct symbol *symbol_find(const struct symbol *list, const char *name);
void symbols_free(struct symbol *list);

/* ptx.c */

/* Fills in what the assembly declares. */
CUresult ptx_read(const char *text, struct image *image);

/* image.c */

/* Creates an image with one user. */
CUresult image_new(const void *data, struct image **out);
struct image *image_use(struct image *image);
/* Removes a user. Frees the image if it was the last user. */
void image_drop(struct image *image);
bool image_has(const struct image *image, const char *name);
/* Returns the bytes of local memory per thread of a kernel. */
uint64_t image_local(const struct image *image, const char *name);
/* Reads a file as text. The caller frees the text. */
CUresult image_from_file(const char *path, char **out);

/* module_table.c: the modules of contexts, and the functions in them */

/* Returns whether CUDA_MODULE_LOADING requests that code is loaded with its module. */
bool module_is_eager(void);
CUresult module_new(struct context *context, struct image *image, struct module **out);
void module_drop(struct module *module);
/* Puts the code of a module on the device, unless it is there. */
CUresult module_load(struct module *module);
struct module *module_find(const struct context *context, CUmodule handle);
CUresult module_global(const struct module *module, const char *name, CUdeviceptr *at, size_t *bytes);
/* Returns the function of this name, and makes it at the first request; NULL: no memory, or the name is too long. */
struct function *module_function(struct module *module, const char *name);
struct function *function_find(const struct context *context, CUfunction handle);
void modules_end(struct context *context);

/* library_table.c: the libraries of the process, and their modules in contexts */

struct library *library_new(struct image *image);
void library_free(struct library *library);
struct library *library_find(CUlibrary handle);
struct kernel_entry *library_kernel(CUkernel handle);
/* Returns the library's module in a context, and makes it at the first request. */
CUresult library_place(struct library *library, struct context *context, struct module **out);
CUresult library_function(struct context *context, CUkernel handle, struct function **out);
/* Removes the modules of a context from all libraries, before modules_end frees them. */
void libraries_end(const struct context *context);

/* kernel.c: what a device can launch */

/* Finds a function, or the function of a library's kernel. */
CUresult function_get(struct context *context, CUfunction handle, struct function **out);
/* Returns whether a block may have so many threads in its three directions. */
bool block_is_possible(int device, const unsigned *block);
/* Returns how many blocks of this shape one multiprocessor runs at a time. */
int kernel_blocks_at_once(const int32_t *limits, const struct shape *shape);
/* Checks a launch and returns how it runs. Loads the kernel's module. */
CUresult kernel_check(struct context *context, CUfunction handle, const struct shape *shape, bool cooperates,
                      struct kernel_run *run);
int kernel_attribute(int device, CUfunction_attribute attribute, int shared, uint64_t local);

#endif
