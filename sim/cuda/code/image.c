/* Images: code before it is loaded. An image that begins with `fgpu-module <N>MiB` takes N MiB of the device at its
 * first use. Assembly has the kernels and the data that it declares. Any other image has every kernel that a program
 * requests, and takes no visible memory, because a context has room for small code. */
#include "cuda/code/code.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_MIB (1ull << 24)
#define MAX_FILE (256 * MIB)

/* Compares byte by byte: a real image may be shorter than this text. */
static uint64_t bytes_of(const char *image)
{
    static const char sign[] = "fgpu-module ";
    unsigned long long mib;
    int end = 0;
    if (strncmp(image, sign, sizeof sign - 1)) return 0;
    if (sscanf(image + sizeof sign - 1, "%10lluMiB%n", &mib, &end) != 1 || !end) return 0;
    return mib > MAX_MIB ? 0 : mib * MIB;
}

/* Assembly is text, and may begin with comments. */
static bool is_assembly(const char *image)
{
    static const char sign[] = ".version";
    for (;;) {
        while (isspace((unsigned char)*image)) image++;
        if (strncmp(image, "//", 2)) return !strncmp(image, sign, sizeof sign - 1);
        while (*image && *image != '\n') image++;
    }
}

CUresult image_new(const void *data, struct image **out)
{
    struct image *image = calloc(1, sizeof *image);
    if (!image) return CUDA_ERROR_OUT_OF_MEMORY;
    image->users = 1;
    image->bytes = bytes_of(data);
    image->is_assembly = is_assembly(data);
    CUresult result = image->is_assembly ? ptx_read(data, image) : CUDA_SUCCESS;
    if (result)
        image_drop(image);
    else
        *out = image;
    return result;
}

struct image *image_use(struct image *image)
{
    image->users++;
    return image;
}

void image_drop(struct image *image)
{
    if (--image->users) return;
    symbols_free(image->entries);
    symbols_free(image->globals);
    free(image);
}

bool image_has(const struct image *image, const char *name)
{
    return !image->is_assembly || symbol_find(image->entries, name);
}

uint64_t image_local(const struct image *image, const char *name)
{
    const struct symbol *entry = symbol_find(image->entries, name);
    return entry ? entry->size : 0;
}

/* Reads the whole file as text. The caller does not have the lock yet. */
CUresult image_from_file(const char *path, char **out)
{
    FILE *file = fopen(path, "re");
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    long size = fseek(file, 0, SEEK_END) ? -1 : ftell(file);
    bool fits = size > 0 && (unsigned long)size <= MAX_FILE && !fseek(file, 0, SEEK_SET);
    char *text = fits ? calloc(1, (size_t)size + 1) : NULL;
    size_t got = text ? fread(text, 1, (size_t)size, file) : 0;
    fclose(file);
    if (got) {
        *out = text;
        return CUDA_SUCCESS;
    }
    free(text);
    return fits && !text ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_INVALID_IMAGE;
}
