/*
 * drive.c FOLDER RUNS [SEED]: replaces libFuzzer without clang and without measuring coverage. Runs the inputs of a
 * folder unchanged, then RUNS inputs that are random or changed from these. Linked to a harness instead of libFuzzer,
 * and built with gcc's sanitizers. Exit status 1 if the heap has grown by more than 1 MiB since a fifth of the runs, or
 * if a file is left open.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MOST_INPUTS 4096
#define MOST_BYTES 4096
#define MOST_GROWTH (1l << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
static struct input {
    uint8_t *data;
    size_t size;
} inputs[MOST_INPUTS];
static size_t n_inputs;
static uint64_t state;

static uint64_t dice(uint64_t sides)
{
    state += 0x9e3779b97f4a7c15u;
    uint64_t z = state;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return (z ^ z >> 31) % sides;
}

static void read_inputs(const char *folder)
{
    struct dirent **names;
    int n = scandir(folder, &names, NULL, alphasort);
    for (int i = 0; i < n && n_inputs < MOST_INPUTS; i++) {
        char path[4096];
        snprintf(path, sizeof path, "%s/%s", folder, names[i]->d_name);
        FILE *file = names[i]->d_name[0] == '.' ? NULL : fopen(path, "rb");
        free(names[i]);
        if (!file) continue;
        struct input *input = &inputs[n_inputs++];
        input->data = malloc(MOST_BYTES);
        input->size = fread(input->data, 1, MOST_BYTES, file);
        fclose(file);
    }
    if (n >= 0) free(names);
}

/* Changes a copy once: a bit, a byte, bytes of 0 or 0xff, bytes removed or repeated, or bytes of another input. */
static size_t change(uint8_t *data, size_t size)
{
    size_t at = dice(size + 1), length = 1 + dice(16);
    if (at + length > size) length = size - at;
    switch (dice(6)) {
    case 0:
        if (at < size) data[at] ^= (uint8_t)(1u << dice(8));
        return size;
    case 1:
        if (at < size) data[at] = (uint8_t)dice(256);
        return size;
    case 2:
        for (size_t i = 0; i < length; i++) data[at + i] = dice(2) ? 0xff : 0;
        return size;
    case 3:
        memmove(data + at, data + at + length, size - at - length);
        return size - length;
    case 4:
        if (size + length > MOST_BYTES) return size;
        memmove(data + at + length, data + at, size - at);
        return size + length;
    default: {
        const struct input *other = &inputs[dice(n_inputs)];
        size_t from = dice(other->size + 1), more = other->size - from;
        if (more > MOST_BYTES - at) more = MOST_BYTES - at;
        memcpy(data + at, other->data + from, more);
        return at + more > size ? at + more : size;
    }
    }
}

/* Runs one input in a buffer of exactly its size, so that a sanitizer finds an access beyond the input. */
static void run_one(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size ? size : 1);
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

static void run_another(void)
{
    uint8_t data[MOST_BYTES];
    size_t size;
    if (!n_inputs || !dice(5)) {
        size = dice(300);
        for (size_t i = 0; i < size; i++) data[i] = (uint8_t)dice(256);
    } else {
        const struct input *from = &inputs[dice(n_inputs)];
        size = from->size;
        memcpy(data, from->data, size);
        for (uint64_t n = 1 + dice(6); n; n--) size = change(data, size);
    }
    run_one(data, size);
}

size_t __sanitizer_get_current_allocated_bytes(void);

static long open_files(void)
{
    long n = 0;
    DIR *folder = opendir("/proc/self/fd");
    while (folder && readdir(folder)) n++;
    closedir(folder);
    return n;
}

int main(int argc, char **argv)
{
    if (argc < 3) return 2;
    long runs = atol(argv[2]), before = 0, files = 0;
    state = argc > 3 ? strtoull(argv[3], NULL, 10) : 0;
    read_inputs(argv[1]);
    for (size_t i = 0; i < n_inputs; i++) run_one(inputs[i].data, inputs[i].size);
    for (long run = 0; run < runs; run++) {
        if (run == runs / 5) {
            before = (long)__sanitizer_get_current_allocated_bytes();
            files = open_files();
        }
        run_another();
    }
    long grown = (long)__sanitizer_get_current_allocated_bytes() - before, more = open_files() - files;
    printf("%zu inputs, %ld runs, %ld bytes more, %ld files more\n", n_inputs, runs, grown, more);
    for (size_t i = 0; i < n_inputs; i++) free(inputs[i].data);
    return grown > MOST_GROWTH || more;
}
