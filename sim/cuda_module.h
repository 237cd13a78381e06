/* Modules: code in a context. A module's memory is taken when it is first asked for a function, that of a library's
 * when one of its kernels is first used, unless loading is eager. */
#ifndef FGPU_SIM_CUDA_MODULE_H
#define FGPU_SIM_CUDA_MODULE_H

#include "cuda_state.h"

struct image {
    uint64_t bytes; /* 0: small, and has room where the context's own code is */
    char *entries;  /* names, one after the other; NULL: all there are */
};

struct function {
    char name[128];
    uint64_t ns;
    struct party party;
    struct shape shape;   /* of cuLaunch and its like, which are told nothing else */
    unsigned shared_most; /* bytes that a launch may ask for */
    struct module *module;
    struct function *next;
};

struct module {
    struct context *context;
    struct image image;
    bool is_loaded, is_library;
    struct function *functions;
    struct module *next;
};

/* cuda_image.c */
CUresult image_read(const void *data, struct image *out);
CUresult image_copy(const struct image *image, struct image *out);
void image_clear(struct image *image);
bool image_has(const struct image *image, const char *name);
CUresult image_from_file(const char *path, char **out); /* to be freed */

/* cuda_module.c */
CUresult module_new(struct context *context, const struct image *image, struct module **out);
void module_drop(struct module *module);
CUresult module_load(struct module *module);
struct function *module_function(struct module *module, const char *name);
struct function *function_find(struct context *context, CUfunction handle);

/* cuda_library.c */
struct function *library_function(struct context *context, CUkernel handle);
void libraries_end(const struct context *context);

#endif
