/* The linker: takes images and returns an image, for programs that link before they load. If the first image that was
 * added is an `fgpu-module`, the result is that image, so that its size is kept. Else the result has unknown contents.
 */
#include "cuda/core/driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEAD 64 /* enough of an image to recognise its kind */

struct linker {
    char image[HEAD];
    size_t length;
    struct linker *next;
};

static struct linker *linkers;

static struct linker *find(CUlinkState handle)
{
    for (struct linker *l = linkers; l; l = l->next)
        if (l == (struct linker *)handle) return l;
    return NULL;
}

static CUresult create(unsigned n, CUjit_option *options, void **values, CUlinkState *out)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    if (!out || (n && (!options || !values))) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    struct linker *linker = calloc(1, sizeof *linker);
    if (!linker) return sim_leave(CUDA_ERROR_OUT_OF_MEMORY);
    linker->next = linkers;
    linkers = linker;
    *out = (CUlinkState)linker;
    return sim_leave(CUDA_SUCCESS);
}

API cuLinkCreate(unsigned int numOptions, CUjit_option *options, void **optionValues, CUlinkState *stateOut)
{
    return create(numOptions, options, optionValues, stateOut);
}

API cuLinkCreate_v2(unsigned int numOptions, CUjit_option *options, void **optionValues, CUlinkState *stateOut)
{
    return create(numOptions, options, optionValues, stateOut);
}

static CUresult add(CUlinkState handle, CUjitInputType type, const void *data, size_t size)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct linker *linker = find(handle);
    if (!linker) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (!data || !size || (unsigned)type >= CU_JIT_NUM_INPUT_TYPES) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    if (!linker->length) {
        linker->length = size < HEAD - 1 ? size : HEAD - 1;
        memcpy(linker->image, data, linker->length);
        linker->image[linker->length] = 0;
        /* Linked code is not assembly, so its contents cannot be read. */
        if (strncmp(linker->image, "fgpu-", 5)) linker->length = (size_t)sprintf(linker->image, "linked");
    }
    return sim_leave(CUDA_SUCCESS);
}

API cuLinkAddData(CUlinkState state, CUjitInputType type, void *data, size_t size, const char *name,
                  unsigned int numOptions, CUjit_option *options, void **optionValues)
{
    (void)name, (void)numOptions, (void)options, (void)optionValues;
    return add(state, type, data, size);
}

API cuLinkAddData_v2(CUlinkState state, CUjitInputType type, void *data, size_t size, const char *name,
                     unsigned int numOptions, CUjit_option *options, void **optionValues)
{
    (void)name, (void)numOptions, (void)options, (void)optionValues;
    return add(state, type, data, size);
}

static CUresult add_file(CUlinkState state, CUjitInputType type, const char *path)
{
    char head[HEAD];
    FILE *file = path ? fopen(path, "re") : NULL;
    if (!file) return path ? CUDA_ERROR_FILE_NOT_FOUND : CUDA_ERROR_INVALID_VALUE;
    size_t got = fread(head, 1, sizeof head, file);
    fclose(file);
    return add(state, type, head, got);
}

API cuLinkAddFile(CUlinkState state, CUjitInputType type, const char *path, unsigned int numOptions,
                  CUjit_option *options, void **optionValues)
{
    (void)numOptions, (void)options, (void)optionValues;
    return add_file(state, type, path);
}

API cuLinkAddFile_v2(CUlinkState state, CUjitInputType type, const char *path, unsigned int numOptions,
                     CUjit_option *options, void **optionValues)
{
    (void)numOptions, (void)options, (void)optionValues;
    return add_file(state, type, path);
}

/* The linker owns the image. cuLinkDestroy frees both. */
API cuLinkComplete(CUlinkState state, void **cubinOut, size_t *sizeOut)
{
    struct context *context;
    CUresult result = sim_enter(&context);
    if (result) return result;
    struct linker *linker = find(state);
    if (!linker) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    if (!cubinOut || !linker->length) return sim_leave(CUDA_ERROR_INVALID_VALUE);
    *cubinOut = linker->image;
    if (sizeOut) *sizeOut = linker->length + 1;
    return sim_leave(CUDA_SUCCESS);
}

API cuLinkDestroy(CUlinkState state)
{
    CUresult result = sim_enter_init();
    if (result) return result;
    struct linker **at = &linkers;
    while (*at && *at != (struct linker *)state) at = &(*at)->next;
    if (!*at) return sim_leave(CUDA_ERROR_INVALID_HANDLE);
    struct linker *linker = *at;
    *at = linker->next;
    free(linker);
    return sim_leave(CUDA_SUCCESS);
}
