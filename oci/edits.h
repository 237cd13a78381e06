/* edits.h: what makes a container of an engine one that the agent can hold: five read-only mounts. */
#pragma once

#include <stddef.h>

struct setup { /* what the agent says in RUN/containers */
    char *text;
    const char *shim, *socket, *preload, *info;
    const char *run;
};

int setup_read(struct setup *setup, const char *run); /* 1: read; 0: no agent has set anything up; -1: said why */
/* `bundle`: the container's; NULL: not known. For free(); NULL: said why. */
char *edits_apply(const struct setup *setup, const char *config, const char *bundle);

char *file_read(int folder, const char *path, size_t most); /* for free(); NULL: errno */
int file_write(const char *path, const char *text);         /* as a whole or not at all; -1: errno */
