/* reasons.h: reports why a container did not start, or started in another way than requested. */
#pragma once

extern const char *reasons_log; /* the runtime's own log, which the engine reads; NULL: none */

void say(const char *format, ...) __attribute__((format(printf, 1, 2))); /* writes to the system's log; the last
                                                                            report is kept */
int refuse(const char *what); /* writes this and the last report to stderr and both logs; returns 1, for exit() */
