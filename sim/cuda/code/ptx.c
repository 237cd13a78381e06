/* Assembly (PTX). It is read for the memory that the code takes of a device: its kernels with their local memory, its
 * data, and calls of malloc or printf. Everything else is skipped, and so is invalid text. */
#include "cuda/code/code.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#define MOST_BYTES (1ull << 46) /* more than any device has; sums of two cannot wrap */

/* A position at a token: a word with its dots, a number, or one other character. Length 0: the end of the text. */
struct reader {
    const char *token;
    size_t length;
};

static const char *skip_comment(const char *at)
{
    if (at[1] == '/') return at + strcspn(at, "\n");
    const char *end = strstr(at + 2, "*/");
    return end ? end + 2 : at + strlen(at);
}

static const char *skip_space(const char *at)
{
    for (;;) {
        while (isspace((unsigned char)*at)) at++;
        if (at[0] != '/' || (at[1] != '/' && at[1] != '*')) return at;
        at = skip_comment(at);
    }
}

static bool is_in_word(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.'; }

static size_t token_length(const char *at)
{
    size_t length = 0;
    if (*at == '"') {
        length = 1 + strcspn(at + 1, "\"");
        return at[length] ? length + 1 : length;
    }
    while (is_in_word(at[length])) length++;
    return length ? length : *at != 0;
}

static void next(struct reader *r)
{
    r->token = skip_space(r->token + r->length);
    r->length = token_length(r->token);
}

static bool is(const struct reader *r, const char *word)
{
    return r->length == strlen(word) && !strncmp(r->token, word, r->length);
}

static bool is_name(const struct reader *r)
{
    return is_in_word(*r->token) && *r->token != '.' && !isdigit((unsigned char)*r->token);
}

/* Skips to the bracket that closes the current one. Every function here stops at the last token that it has read. */
static void skip_group(struct reader *r)
{
    size_t depth = 0;
    for (; r->length; next(r)) {
        if (is(r, "(") || is(r, "{")) depth++;
        if ((is(r, ")") || is(r, "}")) && !--depth) return;
    }
}

static void skip_parameters(struct reader *r)
{
    if (!is(r, "(")) return;
    skip_group(r);
    next(r);
}

/* Skips to the brace that begins a body, or to the semicolon if there is no body. */
static void skip_to_body(struct reader *r)
{
    skip_parameters(r);
    while (r->length && !is(r, "{") && !is(r, ";")) next(r);
}

static uint64_t product(uint64_t a, uint64_t b)
{
    uint64_t both;
    return __builtin_mul_overflow(a, b, &both) || both > MOST_BYTES ? MOST_BYTES : both;
}

static uint64_t number(const struct reader *r)
{
    unsigned long long value = strtoull(r->token, NULL, 0);
    return value > MOST_BYTES ? MOST_BYTES : value;
}

/* Returns the bytes of a type such as .b8 or .f64; 0: the word is no type. */
static uint64_t width_of(const struct reader *r)
{
    static const struct {
        const char *name;
        uint64_t width;
    } types[] = {{".b8", 1},  {".u8", 1},    {".s8", 1},  {".b16", 2}, {".u16", 2}, {".s16", 2},
                 {".f16", 2}, {".bf16", 2},  {".b32", 4}, {".u32", 4}, {".s32", 4}, {".f32", 4},
                 {".b64", 8}, {".f16x2", 4}, {".u64", 8}, {".s64", 8}, {".f64", 8}, {".b128", 16}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (is(r, types[i].name)) return types[i].width;
    return 0;
}

struct element {
    uint64_t bytes, alignment;
};

/* Reads from the token after the state space to the first name: `.align 16 .v2 .f32`. */
static struct element read_element(struct reader *r)
{
    struct element element = {0};
    uint64_t vector = 1;
    for (; r->length && !is_name(r) && !is(r, ";"); next(r)) {
        if (is(r, ".align")) {
            next(r);
            element.alignment = number(r);
        }
        if (is(r, ".v2")) vector = 2;
        if (is(r, ".v4")) vector = 4;
        if (width_of(r)) element.bytes = width_of(r);
    }
    element.bytes *= vector;
    /* An alignment is a power of two. Any other number is ignored. */
    if (!element.alignment || element.alignment & (element.alignment - 1)) element.alignment = element.bytes;
    return element;
}

/* Reads dimensions such as `[4][8]`. No dimension counts as 1, and a dimension without a number as 0: the variable is
 * defined elsewhere. */
static uint64_t read_count(struct reader *r)
{
    uint64_t count = 1;
    while (is(r, "[")) {
        next(r);
        bool has_number = !is(r, "]");
        count = has_number ? product(count, number(r)) : 0;
        if (has_number) next(r);
        next(r);
    }
    return count;
}

static void skip_initial_value(struct reader *r)
{
    while (r->length && !is(r, ",") && !is(r, ";")) {
        if (is(r, "{")) skip_group(r);
        next(r);
    }
}

static uint64_t add(uint64_t to, struct element element, uint64_t count)
{
    uint64_t alignment = element.alignment ? element.alignment : 1;
    to = (to + alignment - 1) / alignment * alignment;
    uint64_t sum = to + product(element.bytes, count);
    return sum > MOST_BYTES ? MOST_BYTES : sum;
}

/* Reads a declaration of one or more variables, from its state space to its end. Adds their names to `names` unless
 * it is NULL. */
static CUresult read_variables(struct reader *r, uint64_t *bytes, uint64_t *alignment, struct symbol **names)
{
    next(r);
    struct element element = read_element(r);
    if (element.alignment > *alignment) *alignment = element.alignment;
    while (is_name(r)) {
        struct reader name = *r;
        next(r);
        uint64_t count = read_count(r), end = add(*bytes, element, count), size = product(element.bytes, count);
        if (names && size && !symbol_new(names, name.token, name.length, size, end - size))
            return CUDA_ERROR_OUT_OF_MEMORY;
        if (size) *bytes = end;
        skip_initial_value(r);
        if (is(r, ",")) next(r);
    }
    return CUDA_SUCCESS;
}

/* The size of local memory is rounded up to its largest alignment. */
static CUresult read_body(struct reader *r, uint64_t *local)
{
    uint64_t alignment = 1;
    size_t depth = 0;
    CUresult result = CUDA_SUCCESS;
    do {
        if (is(r, "{")) depth++;
        if (is(r, "}")) depth--;
        if (is(r, ".local")) result = read_variables(r, local, &alignment, NULL);
        if (depth) next(r);
    } while (!result && depth && r->length);
    *local = (*local + alignment - 1) / alignment * alignment;
    return result;
}

static CUresult read_entry(struct reader *r, struct image *image)
{
    next(r);
    struct reader name = *r;
    uint64_t local = 0;
    if (!is_name(r)) return CUDA_SUCCESS;
    next(r);
    skip_to_body(r);
    CUresult result = is(r, "{") ? read_body(r, &local) : CUDA_SUCCESS;
    if (!result && !symbol_new(&image->entries, name.token, name.length, local, 0)) result = CUDA_ERROR_OUT_OF_MEMORY;
    return result;
}

/* After .extern, `.func (.param .b64 r) malloc (.param .b64 s);` declares the device's own function. */
static void read_function(struct reader *r, bool is_extern, struct image *image)
{
    next(r);
    skip_parameters(r);
    if (is_extern && is(r, "malloc")) image->has_malloc = true;
    if (is_extern && is(r, "vprintf")) image->has_printf = true;
    next(r);
    skip_to_body(r);
    if (is(r, "{")) skip_group(r);
}

CUresult ptx_read(const char *text, struct image *image)
{
    struct reader r = {text, 0};
    uint64_t alignment = 1;
    bool is_extern = false;
    CUresult result = CUDA_SUCCESS;
    for (next(&r); !result && r.length; next(&r)) {
        uint64_t elsewhere = 0;
        if (is(&r, ".entry")) result = read_entry(&r, image);
        if (is(&r, ".func")) read_function(&r, is_extern, image);
        if (is(&r, ".global"))
            result = read_variables(&r, is_extern ? &elsewhere : &image->data, &alignment,
                                    is_extern ? NULL : &image->globals);
        is_extern = is(&r, ".extern");
    }
    return result;
}
