/* evil: a library that creates the file LIBRARY.mark.PID in each process that loads it, except in the agent and `env`,
 * because the test itself starts the agent with LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

__attribute__((constructor)) static void mark(void)
{
    char words[4096] = "", path[4200];
    Dl_info here;
    int file = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t got = file < 0 ? 0 : read(file, words, sizeof words - 1);
    if (file >= 0) close(file);
    for (ssize_t i = 0; i < got; i++)
        if (!strcmp(words + i, "agent") || !strncmp(words, "env", 4)) return;
    if (!dladdr((void *)mark, &here)) return;
    snprintf(path, sizeof path, "%s", here.dli_fname);
    snprintf(path + strlen(path), sizeof path - strlen(path), ".mark.%d", getpid());
    file = open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    if (write(file, words, got) != got) return;
    close(file);
}
