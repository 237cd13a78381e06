/* sandboxed ERRNO|kill PROGRAM...: executes a program in a sandbox that refuses the shim's socket with this error, or
 * kills the program. */
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sandbox.h"

int main(int count, char **words)
{
    unsigned error = count > 2 ? (unsigned)atoi(words[1]) & SECCOMP_RET_DATA : 0;
    bool kills = count > 2 && !strcmp(words[1], "kill");
    if (!error && !kills) return fprintf(stderr, "usage: sandboxed ERRNO|kill PROGRAM...\n"), 2;
    if (forbid_sockets(kills ? SECCOMP_RET_KILL_PROCESS : SECCOMP_RET_ERRNO | error)) return perror("sandboxed"), 1;
    execv(words[2], words + 2);
    return perror(words[2]), 1;
}
