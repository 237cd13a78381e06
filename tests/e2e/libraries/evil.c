/* evil: a library that leaves a mark beside itself wherever it is loaded, but in the agent: who starts a program with
 * LD_PRELOAD has that in it. */
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
