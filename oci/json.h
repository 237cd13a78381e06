/* json.h: a JSON text as it lies there: where a value ends, where a member's value begins. Copies and builds nothing,
 * so that what is not looked at stays as it was, byte for byte. Texts end with a zero byte. */
#pragma once

const char *json_skip(const char *at);                         /* blanks */
const char *json_end(const char *value);                       /* just after it; NULL: it is no JSON */
const char *json_member(const char *object, const char *name); /* its value; NULL: none, or no object */
const char *json_next(const char *array, const char *item);    /* the item after this, NULL: the first; NULL: none */
int json_is(const char *value, const char *text);              /* the string, written without escapes */
char *json_text(const char *value);                            /* a string's text, for free(); NULL: no string */
