/* Images: what is to be known of code before it is loaded. One that begins with `fgpu-module <N>MiB` takes N MiB of the
 * device, any other nothing that could be seen: the context has room for small code. Assembly has the kernels that it
 * has, any other image every kernel that it is asked for. */
#include "cuda_module.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_MIB (1ull << 24)
#define MAX_FILE (256 * MIB)

/* Compared byte by byte: a real image may end before this text would. */
static uint64_t bytes_of(const char *image)
{
    static const char sign[] = "fgpu-module ";
    unsigned long long mib;
    int end = 0;
    if (strncmp(image, sign, sizeof sign - 1)) return 0;
    if (sscanf(image + sizeof sign - 1, "%10lluMiB%n", &mib, &end) != 1 || !end) return 0;
    return mib > MAX_MIB ? 0 : mib * MIB;
}

/* Assembly is text, and may begin with remarks. */
static bool is_assembly(const char *image)
{
    static const char sign[] = ".version";
    for (;;) {
        while (isspace((unsigned char)*image)) image++;
        if (strncmp(image, "//", 2)) return !strncmp(image, sign, sizeof sign - 1);
        while (*image && *image != '\n') image++;
    }
}

static bool is_in_name(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%'; }

/* The names after each `.entry`, one after the other, and an empty one at the end. */
static char *entries_of(const char *text)
{
    static const char sign[] = ".entry";
    char *names = calloc(1, strlen(text) + 2), *to = names;
    for (const char *at = text; names && (at = strstr(at, sign));) {
        at += sizeof sign - 1;
        if (!isspace((unsigned char)*at)) continue;
        while (isspace((unsigned char)*at)) at++;
        const char *name = at;
        while (is_in_name(*at)) *to++ = *at++;
        if (at != name) *to++ = 0;
    }
    return names;
}

CUresult image_read(const void *data, struct image *out)
{
    *out = (struct image){.bytes = bytes_of(data)};
    if (!is_assembly(data)) return CUDA_SUCCESS;
    out->entries = entries_of(data);
    return out->entries ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult image_copy(const struct image *image, struct image *out)
{
    size_t length = 0;
    *out = *image;
    if (!image->entries) return CUDA_SUCCESS;
    while (image->entries[length]) length += strlen(image->entries + length) + 1;
    out->entries = malloc(length + 1);
    if (!out->entries) return CUDA_ERROR_OUT_OF_MEMORY;
    memcpy(out->entries, image->entries, length + 1);
    return CUDA_SUCCESS;
}

void image_clear(struct image *image)
{
    free(image->entries);
    *image = (struct image){0};
}

bool image_has(const struct image *image, const char *name)
{
    if (!image->entries) return true;
    for (const char *entry = image->entries; *entry; entry += strlen(entry) + 1)
        if (!strcmp(entry, name)) return true;
    return false;
}

/* The whole file, as text. Before the lock is taken. */
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
