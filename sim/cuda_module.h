/* Modules: code in a context. A module's data is on the device from its loading on, its code when it is first asked for
 * a function; both of a library's when one of its kernels is first used in a context. Where loading is eager, code
 * comes with the data. */
#ifndef FGPU_SIM_CUDA_MODULE_H
#define FGPU_SIM_CUDA_MODULE_H

#include "cuda_state.h"

struct symbol {
    struct symbol *next;
    uint64_t size;   /* of an entry: bytes of local memory a thread */
    uint64_t offset; /* of data, from the module's first */
    char name[];
};

struct image {
    unsigned users;
    bool is_assembly;            /* entries are all that it has */
    bool has_malloc, has_printf; /* calls the device's own */
    uint64_t bytes;              /* of code; 0: small, and has room where the context's own code is */
    uint64_t data;               /* bytes of all globals */
    struct symbol *entries, *globals;
};

struct function {
    char name[128];
    uint64_t ns;
    struct party party;
    struct needs needs;
    struct shape shape;   /* of cuLaunch and its like, which are told nothing else */
    unsigned shared_most; /* bytes that a launch may ask for */
    struct module *module;
    struct function *next;
};

struct module {
    struct context *context;
    struct image *image;
    struct range *data; /* NULL: none */
    bool is_loaded, is_library;
    struct function *functions;
    struct module *next;
};

/* cuda_ptx.c */
CUresult ptx_read(const char *text, struct image *image);

/* cuda_image.c */
bool symbol_new(struct symbol **list, const char *name, size_t length, uint64_t size, uint64_t offset);
const struct symbol *symbol_find(const struct symbol *list, const char *name);
CUresult image_new(const void *data, struct image **out);
struct image *image_use(struct image *image);
void image_drop(struct image *image);
bool image_has(const struct image *image, const char *name);
uint64_t image_local(const struct image *image, const char *name); /* of a kernel, bytes a thread */
CUresult image_from_file(const char *path, char **out);            /* to be freed */

/* cuda_module.c */
CUresult module_new(struct context *context, struct image *image, struct module **out);
void module_drop(struct module *module);
CUresult module_load(struct module *module);
CUresult module_global(const struct module *module, const char *name, CUdeviceptr *at, size_t *bytes);
struct function *module_function(struct module *module, const char *name);
struct function *function_find(const struct context *context, CUfunction handle);         /* NULL: there is none */
CUresult function_get(struct context *context, CUfunction handle, struct function **out); /* or that of a kernel */

/* cuda_launch.c */
int kernel_attribute(int device, CUfunction_attribute attribute, int shared, uint64_t local);

/* cuda_library.c */
CUresult library_function(struct context *context, CUkernel handle, struct function **out);
void libraries_end(const struct context *context);

#endif
