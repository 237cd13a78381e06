/* reasons.h: why a container did not start, or started other than asked. */
#pragma once

extern const char *reasons_log; /* the runtime's own, where the engine looks for them; NULL: none */

void say(const char *format, ...) __attribute__((format(printf, 1, 2))); /* to the system's log; the last is kept */
int refuse(const char *what); /* with what was said last, to stderr and both logs; 1, for exit() */
