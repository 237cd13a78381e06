/*
 * image.c: computes from code itself how much device memory its data takes. Owns nothing.
 *
 * The program passes code without a length. A text ends with a zero byte; the header of a cubin (ELF) or a fat binary
 * contains the offsets of its parts. Reads stay within these parts, and within MOST_IMAGE. Code that cannot be parsed,
 * or is compressed, counts as 0: NVML shows its memory.
 */
#include "code/image.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#include "fgpu.h"

#define MOST_IMAGE (1ULL << 30)
#define ELF 0x464c457fU
#define FATBIN 0xba55ed50U
#define WRAPPER 0x466243b1U /* of a fat binary in a program: contains the address of the fat binary */
#define WRAPPED 8

/* -- numbers */

static uint64_t least_of(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t capped(uint64_t bytes) { return least_of(bytes, FGPU_MOST_BYTES); }

static uint64_t product(uint64_t a, uint64_t b)
{
    uint64_t both;
    return __builtin_mul_overflow(a, b, &both) ? FGPU_MOST_BYTES : capped(both);
}

/* Return the end of `bytes` bytes, aligned, that follow `to`. */
static uint64_t add(uint64_t to, uint64_t bytes, uint64_t alignment)
{
    if (!alignment || alignment & (alignment - 1) || alignment > MOST_IMAGE) alignment = 1;
    return capped(((to + alignment - 1) & ~(alignment - 1)) + bytes);
}

/* -- assembly (PTX): declarations in the state space .global, except those of variables that are defined elsewhere */

struct reader { /* at a token: a word with its dots, a number, or one other character; length 0: the end */
    const char *token;
    uint64_t left; /* of the text from the token on */
    uint64_t length;
};

static char at(const struct reader *r, uint64_t offset) { return offset < r->left ? r->token[offset] : 0; }

static bool is_digit(char c) { return c >= '0' && c <= '9'; }

static bool is_in_word(char c)
{
    return is_digit(c) || ((c | 32) >= 'a' && (c | 32) <= 'z') || c == '_' || c == '$' || c == '%' || c == '.';
}

static bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

static void move(struct reader *r, uint64_t bytes)
{
    if (bytes > r->left) bytes = r->left;
    r->token += bytes;
    r->left -= bytes;
}

static uint64_t comment_length(const struct reader *r)
{
    uint64_t n = 2;
    if (at(r, 1) == '/')
        while (at(r, n) && at(r, n) != '\n') n++;
    else
        for (; at(r, n); n++)
            if (at(r, n) == '*' && at(r, n + 1) == '/') return n + 2;
    return n;
}

static void skip_space(struct reader *r)
{
    for (;;) {
        while (is_space(at(r, 0))) move(r, 1);
        if (at(r, 0) != '/' || (at(r, 1) != '/' && at(r, 1) != '*')) return;
        move(r, comment_length(r));
    }
}

static uint64_t token_length(const struct reader *r)
{
    uint64_t n = 0;
    if (at(r, 0) == '"') {
        for (n = 1; at(r, n) && at(r, n) != '"';) n++;
        return n + (at(r, n) == '"');
    }
    while (is_in_word(at(r, n))) n++;
    return n ? n : at(r, 0) != 0;
}

static void next(struct reader *r)
{
    move(r, r->length);
    skip_space(r);
    r->length = token_length(r);
}

static bool is(const struct reader *r, const char *word)
{
    return r->length == strlen(word) && !strncmp(r->token, word, r->length);
}

static bool is_name(const struct reader *r)
{
    return r->length && is_in_word(r->token[0]) && r->token[0] != '.' && !is_digit(r->token[0]);
}

static int digit_of(char c)
{
    if (is_digit(c)) return c - '0';
    return (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : 99;
}

static uint64_t number(const struct reader *r)
{
    uint64_t value = 0, n = 0;
    int base = 10;
    if (r->length > 1 && r->token[0] == '0') {
        bool is_hex = (r->token[1] | 32) == 'x';
        base = is_hex ? 16 : 8;
        n = is_hex ? 2 : 1;
    }
    for (; n < r->length && digit_of(r->token[n]) < base; n++)
        value = capped(product(value, (uint64_t)base) + (uint64_t)digit_of(r->token[n]));
    return value;
}

/* Return the width of a type such as .b8, .f64 or .f16x2; 0: the word is not a type. */
static uint64_t width_of(const struct reader *r)
{
    uint64_t n = 1, bits = 0;
    if (r->length < 3 || r->token[0] != '.') return 0;
    if (r->length > 3 && !strncmp(r->token, ".bf", 3)) n = 2;
    if (r->token[n] != 'b' && r->token[n] != 'f' && r->token[n] != 's' && r->token[n] != 'u') return 0;
    for (n++; n < r->length && is_digit(r->token[n]); n++) bits = bits * 10 + (uint64_t)(r->token[n] - '0');
    if (n + 2 == r->length && r->token[n] == 'x' && r->token[n + 1] == '2') return bits / 4;
    return n == r->length && bits <= 128 ? bits / 8 : 0;
}

struct element {
    uint64_t bytes, alignment;
};

/* Read from the state space to the first name: `.align 16 .v2 .f32`. */
static struct element read_element(struct reader *r)
{
    struct element element = {0, 0};
    uint64_t vector = 1;
    for (next(r); r->length && !is_name(r) && !is(r, ";"); next(r)) {
        uint64_t width = width_of(r);
        if (is(r, ".v2")) vector = 2;
        if (is(r, ".v4")) vector = 4;
        if (width) element.bytes = width;
        if (!is(r, ".align")) continue;
        next(r);
        element.alignment = number(r);
    }
    element.bytes *= vector;
    if (!element.alignment) element.alignment = element.bytes;
    return element;
}

/* Read `[4][8]`, or nothing, which counts as 1. An array without a size is declared elsewhere. */
static uint64_t read_count(struct reader *r)
{
    uint64_t count = 1;
    while (is(r, "[")) {
        next(r);
        count = is(r, "]") ? 0 : product(count, number(r));
        while (r->length && !is(r, "]") && !is(r, ";")) next(r);
        if (is(r, "]")) next(r);
    }
    return count;
}

/* Skip `= {1, 2, {3}}`, up to the comma or semicolon after it. */
static void skip_value(struct reader *r)
{
    uint64_t depth = 0;
    for (; r->length && !is(r, ";") && (depth || !is(r, ",")); next(r)) {
        if (is(r, "{")) depth++;
        if (is(r, "}") && depth) depth--;
    }
}

static uint64_t read_variables(struct reader *r, uint64_t bytes)
{
    struct element element = read_element(r);
    while (is_name(r)) {
        next(r);
        bytes = add(bytes, product(element.bytes, read_count(r)), element.alignment);
        skip_value(r);
        if (is(r, ",")) next(r);
    }
    return bytes;
}

static uint64_t data_of_text(const char *text, uint64_t most)
{
    struct reader r = {text, most, 0};
    uint64_t bytes = 0, heap = 0;
    bool is_elsewhere = false;
    next(&r);
    if (!is(&r, ".version")) return 0; /* all assembly begins with this, after comments */
    for (; r.length; next(&r)) {
        if (is(&r, "malloc")) heap = FGPU_USES_HEAP;
        uint64_t more = is(&r, ".global") ? read_variables(&r, bytes) : bytes;
        if (!is_elsewhere) bytes = more;
        is_elsewhere = is(&r, ".extern");
    }
    return bytes | heap;
}

/* -- binaries: fields at fixed offsets, unaligned. `size`: the number of readable bytes */

struct binary {
    const char *start;
    uint64_t size;
};

static uint64_t field(const struct binary *b, uint64_t offset, unsigned bytes)
{
    uint64_t value = 0;
    if (offset <= b->size && bytes <= b->size - offset) memcpy(&value, b->start + offset, bytes);
    return value;
}

static bool has_name(const struct binary *b, uint64_t offset, const char *name)
{
    uint64_t length = strlen(name) + 1;
    return offset <= b->size && length <= b->size - offset && !memcmp(b->start + offset, name, length);
}

#define ELF_SECTIONS 0x28
#define ELF_SECTION_SIZE 0x3a
#define ELF_SECTION_COUNT 0x3c
#define ELF_NAMES 0x3e
#define SECTION_TYPE 4
#define STRINGS 3
#define SECTION_OFFSET 0x18
#define SECTION_SIZE 0x20
#define SECTION_ALIGNMENT 0x30

/* Return whether a string table contains malloc, as a function that is defined elsewhere. */
static bool names_malloc(const struct binary *b, uint64_t at, uint64_t size)
{
    for (uint64_t end = at <= b->size ? at + least_of(size, b->size - at) : 0; at < end; at++)
        if (at + 8 <= end && !memcmp(b->start + at, "\0malloc", 8)) return true;
    return false;
}

static uint64_t data_of_elf(const struct binary *b)
{
    uint64_t sections = field(b, ELF_SECTIONS, 8), step = field(b, ELF_SECTION_SIZE, 2), bytes = 0;
    uint64_t heap = 0, count = field(b, ELF_SECTION_COUNT, 2), names = field(b, ELF_NAMES, 2);
    if (sections > b->size || count * step > b->size - sections) return 0;
    uint64_t text = field(b, sections + names * step + SECTION_OFFSET, 8);
    for (uint64_t i = 0, at = sections; text <= b->size && i < count; i++, at += step) {
        uint64_t name = text + field(b, at, 4), size = field(b, at + SECTION_SIZE, 8);
        if (field(b, at + SECTION_TYPE, 4) == STRINGS && names_malloc(b, field(b, at + SECTION_OFFSET, 8), size))
            heap = FGPU_USES_HEAP;
        if (!has_name(b, name, ".nv.global") && !has_name(b, name, ".nv.global.init")) continue;
        bytes = add(bytes, capped(size), field(b, at + SECTION_ALIGNMENT, 8));
    }
    return bytes | heap;
}

/* -- fat binaries: the same code for several devices, one part for each. Usually all parts have the same data. So the
 * driver allocates at least the data of the smallest part. */

#define FATBIN_HEADER_SIZE 6
#define FATBIN_SIZE 8
#define PART_HEAD 64
#define PART_HEADER_SIZE 4
#define PART_SIZE 8
#define PART_FLAGS 40
#define IS_TEXT 1
#define IS_ELF 2
#define COMPRESSED 0xa000U /* by either method */

static bool data_of_part(const struct binary *part, uint64_t *bytes)
{
    uint64_t kind = field(part, 0, 2), head = field(part, PART_HEADER_SIZE, 4);
    if (field(part, PART_FLAGS, 8) & COMPRESSED || head < PART_HEAD || head > part->size) return false;
    struct binary content = {part->start + head, part->size - head};
    if (kind == IS_TEXT)
        *bytes = data_of_text(content.start, content.size);
    else if (kind == IS_ELF && field(&content, 0, 4) == ELF)
        *bytes = data_of_elf(&content);
    else
        return false;
    return true;
}

static uint64_t data_of_fatbin(const struct binary *b)
{
    uint64_t at = field(b, FATBIN_HEADER_SIZE, 2), least = FGPU_MOST_BYTES, heap = 0, bytes;
    while (at < b->size && b->size - at >= PART_HEAD) {
        struct binary rest = {b->start + at, b->size - at};
        uint64_t head = field(&rest, PART_HEADER_SIZE, 4), size = field(&rest, PART_SIZE, 8);
        if (head < PART_HEAD || head > rest.size || size > rest.size - head) break;
        rest.size = head + size;
        if (data_of_part(&rest, &bytes)) {
            heap |= bytes & FGPU_USES_HEAP;
            least = least_of(least, bytes & ~FGPU_USES_HEAP);
        }
        at += rest.size;
    }
    return heap | (least == FGPU_MOST_BYTES ? 0 : least);
}

/* -- any of them */

/* Compute how many bytes of an image may be read. The header of a fat binary has a fixed length and contains its size.
 * The header of a cubin contains the offsets of its parts; no byte beyond the last part is read to find them. */
static uint64_t elf_size(const char *image, uint64_t most)
{
    struct binary head = {image, least_of(most, 64)};
    uint64_t sections = field(&head, ELF_SECTIONS, 8), step = field(&head, ELF_SECTION_SIZE, 2);
    if (sections > MOST_IMAGE) return 0;
    struct binary table = {image, least_of(most, sections + step * field(&head, ELF_SECTION_COUNT, 2))};
    uint64_t names = sections + step * field(&head, ELF_NAMES, 2);
    uint64_t text = field(&table, names + SECTION_OFFSET, 8), length = field(&table, names + SECTION_SIZE, 8);
    if (text > MOST_IMAGE || length > MOST_IMAGE) return 0;
    return least_of(most, text + length > table.size ? text + length : table.size);
}

static uint64_t data_of_whole_fatbin(const char *image, uint64_t most)
{
    struct binary head = {image, least_of(most, 16)};
    uint64_t size = field(&head, FATBIN_SIZE, 8), own = field(&head, FATBIN_HEADER_SIZE, 2);
    if (field(&head, 0, 4) != FATBIN || own < head.size || size > MOST_IMAGE) return 0;
    struct binary b = {image, least_of(own + size, most)};
    return data_of_fatbin(&b);
}

uint64_t fgpu_image_data(const void *image, uint64_t most)
{
    uint32_t magic = 0;
    /* A text may be shorter than the number. */
    for (unsigned i = 0; i < sizeof magic && i < most && (!i || magic >> (8 * (i - 1)) & 0xff); i++)
        magic |= (uint32_t)((const unsigned char *)image)[i] << (8 * i);
    if (magic == FATBIN) return data_of_whole_fatbin(image, most);
    if (magic != ELF) return data_of_text(image, most);
    struct binary b = {image, elf_size(image, most)};
    return data_of_elf(&b);
}

uint64_t fgpu_code_data(const void *code)
{
    uint32_t magic = 0;
    memcpy(&magic, code, 1);
    if (magic == (WRAPPER & 0xff)) memcpy(&magic, code, sizeof magic); /* no text begins with this */
    if (magic == WRAPPER) memcpy(&code, (const char *)code + WRAPPED, sizeof code);
    return code ? fgpu_image_data(code, MOST_IMAGE) : 0;
}
