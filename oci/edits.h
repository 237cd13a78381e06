/* edits.h: the read-only mounts by which a container gets the shim: five, and one of fgpu-info if it is installed. */
#pragma once

#include <stddef.h>

struct setup { /* the agent's setup for containers, as written in RUN/containers */
    char *text;
    const char *shim, *socket, *preload, *info;
    const char *run;
};

int setup_read(struct setup *setup, const char *run); /* 1: read; 0: no agent has written a setup; -1: failed, and
                                                         reported why */
/* `bundle`: the container's; NULL: not known. The caller frees the result. NULL: failed, and reported why. */
char *edits_apply(const struct setup *setup, const char *config, const char *bundle);

char *file_read(int folder, const char *path, size_t most); /* the caller frees the result; NULL: errno is set */
int file_write(const char *path, const char *text);         /* writes the whole file or nothing; -1: errno is set */
