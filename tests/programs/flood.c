/* flood CGROUP AT_ONCE PAUSE_US: enters CGROUP, becomes its owner, user 65534, creates 12,000 cgroups that stay, and
 * prints "ready". Then it repeats rounds: it creates AT_ONCE cgroups inside CGROUP, enters one of those that stay,
 * removes the AT_ONCE cgroups and pauses. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define STAY 12000

static int enter(const char *file_name)
{
    int file = open(file_name, O_WRONLY);
    return file >= 0 && write(file, "0", 1) == 1 && !close(file);
}

static void make(const char *kind, int n)
{
    char name[64];
    snprintf(name, sizeof name, "%s-%d", kind, n);
    mkdir(name, 0755);
}

static void remove_again(const char *kind, int n)
{
    char name[64];
    snprintf(name, sizeof name, "%s-%d", kind, n);
    rmdir(name);
}

int main(int count, char **words)
{
    if (count != 4 || chdir(words[1]) || !enter("cgroup.procs") || setgid(65534) || setuid(65534)) return 1;
    int at_once = atoi(words[2]), pause_us = atoi(words[3]);
    for (int i = 0; i < STAY; i++) make("stay", i);
    puts("ready");
    fflush(stdout);
    for (int round = 0;; round++) {
        for (int i = 0; i < at_once; i++) make("flood", i);
        if (!enter(round % 2 ? "stay-1/cgroup.procs" : "stay-0/cgroup.procs")) return 1;
        for (int i = 0; i < at_once; i++) remove_again("flood", i);
        usleep((useconds_t)pause_us);
    }
}
