/* json.h: finds values in a JSON text: the end of a value, the start of a member's value. It copies and builds nothing,
 * so everything else in the text stays unchanged, byte for byte. Texts end with a zero byte. */
#pragma once

const char *json_skip(const char *at);                         /* blanks */
const char *json_end(const char *value);                       /* just after it; NULL: it is not valid JSON */
const char *json_member(const char *object, const char *name); /* its value; NULL: there is none, or this is not an
                                                                  object */
const char *json_next(const char *array, const char *item);    /* the item after this, NULL: the first; NULL: none */
int json_is(const char *value, const char *text);              /* the string, written without escapes */
char *json_text(const char *value);                            /* a string's text, which the caller frees; NULL: not
                                                                  a string */
