/* json.c: see json.h. If two members have the same name, the last one counts, as in the parsers that read these
 * files. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"

#define DEEPEST 64

static const char *value_end(const char *at, int depth);

const char *json_skip(const char *at) { return at + strspn(at, " \t\r\n"); }

static const char *string_end(const char *at)
{
    if (*at != '"') return NULL;
    for (at++; *at != '"'; at++) {
        if ((unsigned char)*at < ' ') return NULL;
        if (*at == '\\' && !*++at) return NULL;
    }
    return at + 1;
}

/* Return the end of an array, or of an object if `members` is set: then each item has a name. */
static const char *list_end(const char *at, char close, int members, int depth)
{
    at = json_skip(at + 1);
    if (*at == close) return at + 1;
    for (;; at++) {
        if (members) {
            at = string_end(json_skip(at));
            if (!at || *(at = json_skip(at)) != ':') return NULL;
            at++;
        }
        at = value_end(json_skip(at), depth);
        if (!at) return NULL;
        at = json_skip(at);
        if (*at == close) return at + 1;
        if (*at != ',') return NULL;
    }
}

static const char *value_end(const char *at, int depth)
{
    if (depth > DEEPEST) return NULL;
    if (*at == '"') return string_end(at);
    if (*at == '{') return list_end(at, '}', 1, depth + 1);
    if (*at == '[') return list_end(at, ']', 0, depth + 1);
    size_t length = strspn(at, "+-.0123456789Eaeflnrstu"); /* numbers, true, false, null */
    return length ? at + length : NULL;
}

const char *json_end(const char *value) { return value_end(value, 0); }

const char *json_member(const char *object, const char *name)
{
    const char *found = NULL, *at = json_skip(object);
    if (*at != '{' || !json_end(at)) return NULL;
    for (at = json_skip(at + 1); *at == '"'; at = json_skip(at + 1)) {
        const char *value = json_skip(json_skip(string_end(at)) + 1);
        if (json_is(at, name)) found = value;
        at = json_skip(json_end(value));
        if (*at != ',') break;
    }
    return found;
}

const char *json_next(const char *array, const char *item)
{
    const char *at;
    if (!item) {
        at = json_skip(array);
        if (*at != '[' || !json_end(at)) return NULL;
        at = json_skip(at + 1);
        return *at == ']' ? NULL : at;
    }
    at = json_skip(json_end(item));
    return *at == ',' ? json_skip(at + 1) : NULL;
}

int json_is(const char *value, const char *text)
{
    size_t length = strlen(text);
    return value && *value == '"' && !strncmp(value + 1, text, length) && value[1 + length] == '"';
}

/* Escapes beyond ASCII become '?': no path that this program looks for has such a character. */
char *json_text(const char *value)
{
    const char *end = value ? string_end(value) : NULL;
    char *text = end ? malloc((size_t)(end - value)) : NULL, *to = text;
    if (!text) return NULL;
    for (const char *at = value + 1; at < end - 1; at++) {
        static const char letters[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
        const char *letter = *at == '\\' ? strchr(letters, at[1]) : NULL;
        unsigned code = 0;
        int used = 0;
        if (letter) {
            *to++ = meant[letter - letters];
            at++;
        } else if (*at == '\\' && sscanf(at, "\\u%4x%n", &code, &used) == 1 && used == 6) {
            *to++ = code && code < 128 ? (char)code : '?';
            at += 5;
        } else {
            *to++ = *at;
        }
    }
    *to = 0;
    return text;
}
