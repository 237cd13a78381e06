/* crowd_of_maps PROCESSES MAPPINGS FILE: processes of a local user, each with MAPPINGS executable mappings of FILE. The
 * program becomes user 65534, prints "ready" when all processes exist, and waits. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PAGE 4096

int main(int count, char **words)
{
    if (count != 4) return 2;
    int processes = atoi(words[1]), mappings = atoi(words[2]), file = open(words[3], O_RDONLY);
    /* Pages 0 and 2 in turn: the kernel would merge mappings of consecutive pages. */
    for (int i = 0; i < mappings; i++)
        if (mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_PRIVATE, file, i % 2 * 2 * PAGE) == MAP_FAILED) return 1;
    if (setgid(65534) || setuid(65534)) return 1;
    pid_t parent = getpid();
    for (int i = 1; i < processes; i++) {
        if (fork()) continue;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() == parent) pause();
        return 0;
    }
    puts("ready");
    fflush(stdout);
    pause();
    return 0;
}
