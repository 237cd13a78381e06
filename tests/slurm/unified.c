/* unified: preloaded into Slurm's node daemon on a host that mounts cgroup v1 beside v2. Slurm refuses such a host when
 * it reads /proc/PID/cgroup. With this library it reads only the line of v2 there. Jobs do not inherit the library. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Returns a file with the last line, which is that of v2, or the file itself if it cannot be read. */
static int of_version_2(int file)
{
    char text[4096];
    ssize_t length = read(file, text, sizeof text - 1);
    int only = memfd_create("cgroup", MFD_CLOEXEC);
    char *line;
    text[length > 0 ? length : 0] = '\0';
    line = strstr(text, "0::");
    if (only < 0 || !line || write(only, line, strlen(line)) < 0) {
        lseek(file, 0, SEEK_SET);
        return file;
    }
    close(file);
    lseek(only, 0, SEEK_SET);
    return only;
}

/* Returns whether a path is /proc/PID/cgroup. PID is also "self". */
static int is_cgroup(const char *path)
{
    const char *end = strrchr(path, '/');
    return !strncmp(path, "/proc/", 6) && !strcmp(end, "/cgroup") && strchr(path + 6, '/') == end;
}

int open(const char *path, int flags, ...)
{
    int (*real)(const char *, int, ...) = (__typeof__(real))dlsym(RTLD_NEXT, "open");
    va_list more;
    int file;
    va_start(more, flags);
    file = real(path, flags, va_arg(more, mode_t));
    va_end(more);
    return file >= 0 && is_cgroup(path) ? of_version_2(file) : file;
}
