/* json.h: finds values in a JSON text: the end of a value, the start of a member's value. Callers edit the text itself,
 * so everything else in it stays unchanged, byte for byte. Texts end with a zero byte. */
#pragma once

/* Skip blanks. */
const char *json_skip(const char *at);

/* Return the position after a value. NULL: the value is not valid JSON. */
const char *json_end(const char *value);

/* Return the value of an object's member. NULL: there is none, or `object` is not an object. */
const char *json_member(const char *object, const char *name);

/* Return the item after `item`, or the first item if `item` is NULL. NULL: there is none. */
const char *json_next(const char *array, const char *item);

/* Return 1 if the value is this string, written without escapes. */
int json_is(const char *value, const char *text);

/* Return the text of a string; the caller frees it. NULL: the value is not a string. */
char *json_text(const char *value);
