/*
 * limit.c: how much of each device the image allows. Owns nothing; reads one file, which only the image's root can have
 * written. No environment variable, link or folder that other users may write can redirect the read.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "standalone/standalone.h"

#define MOST_TEXT 64

static bool is_roots(int descriptor, mode_t kind)
{
    struct stat status;
    if (syscall(SYS_fstat, descriptor, &status)) return false;
    return (status.st_mode & S_IFMT) == kind && !status.st_uid && !(status.st_mode & (S_IWGRP | S_IWOTH));
}

/* Open the file step by step, so that each folder is checked by the opened descriptor and not by its name. -1: the
 * error is in errno. */
static int open_roots(void)
{
    static const char *const steps[] = {"/", "etc", "fgpu", "limit"};
    int at = AT_FDCWD;
    for (unsigned i = 0; i < 4; i++) {
        int flags = i < 3 ? O_PATH | O_DIRECTORY : O_RDONLY | O_NONBLOCK;
        int next = (int)syscall(SYS_openat, at, steps[i], flags | O_NOFOLLOW | O_CLOEXEC, 0);
        int saved = errno;
        if (at >= 0) syscall(SYS_close, at);
        errno = saved;
        if (next < 0) return -1;
        at = next;
        if (is_roots(at, i < 3 ? S_IFDIR : S_IFREG)) continue;
        syscall(SYS_close, at);
        errno = ENOENT;
        return -1;
    }
    return at;
}

static bool is_space(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

/* Parse `8GiB`, `8Gi`, `8192MiB` or `8589934592B`, as in a policy: a number needs a unit. 0: none of these, and then no
 * memory is admitted. */
static uint64_t parse(const char *text)
{
    static const struct {
        char name[4];
        unsigned shift;
    } units[] = {{"B", 0},   {"Ki", 10},  {"KiB", 10}, {"Mi", 20}, {"MiB", 20},
                 {"Gi", 30}, {"GiB", 30}, {"Ti", 40},  {"TiB", 40}};
    uint64_t number = 0;
    while (*text == ' ' || *text == '\t') text++;
    if (*text < '0' || *text > '9') return 0;
    for (; *text >= '0' && *text <= '9'; text++) {
        number = 10 * number + (uint64_t)(*text - '0');
        if (number > FGPU_MOST_BYTES) return 0;
    }
    while (*text == ' ') text++;
    size_t length = 0, end;
    while (text[length] && !is_space(text[length])) length++;
    for (end = length; is_space(text[end]);) end++;
    if (text[end]) return 0;
    for (size_t i = 0; i < sizeof units / sizeof *units; i++)
        if (length == strlen(units[i].name) && !memcmp(text, units[i].name, length))
            return number > FGPU_MOST_BYTES >> units[i].shift ? 0 : number << units[i].shift;
    return 0;
}

int fgpu_image_limit(uint64_t *bytes)
{
    char text[MOST_TEXT + 1];
    int file = open_roots();
    if (file < 0) return errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == EINTR ? -1 : 0;
    long length = syscall(SYS_read, file, text, MOST_TEXT);
    syscall(SYS_close, file);
    if (length < 0) return -1;
    text[length] = 0;
    *bytes = length < MOST_TEXT ? parse(text) : 0;
    return 1;
}
