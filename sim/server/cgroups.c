/* The cgroups (version 2) around a process, by the inodes of their folders. The kernel gives an inode to one cgroup
 * only, so a cgroup that is removed and made again is another one. */
#include "server/state.h"

#include <fcntl.h>
#include <limits.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

/* Returns where the root of the cgroups is mounted, or NULL. */
static const char *mount_point(void)
{
    static char found[256];
    char *line = NULL, root[256], at[256];
    size_t room = 0;
    FILE *file = *found ? NULL : fopen("/proc/self/mountinfo", "re");
    while (file && !*found && getline(&line, &room, file) >= 0)
        if (strstr(line, " - cgroup2 ") && sscanf(line, "%*s %*s %*s %255s %255s", root, at) == 2 && !strcmp(root, "/"))
            strcpy(found, at);
    free(line);
    if (file) fclose(file);
    return *found ? found : NULL;
}

/* Reads the path of a process's cgroup below the mount point. A path that begins with /.. is outside. */
static bool read_path(pid_t pid, char *path, size_t room)
{
    char name[64], *line = NULL;
    size_t size = 0;
    bool is_read = false;
    snprintf(name, sizeof name, "/proc/%d/cgroup", pid);
    FILE *file = fopen(name, "re");
    while (file && !is_read && getline(&line, &size, file) >= 0) {
        line[strcspn(line, "\n")] = 0;
        is_read = !strncmp(line, "0::/", 4) && strncmp(line, "0::/..", 6) && strlen(line + 3) < room;
        if (is_read) strcpy(path, line + 3);
    }
    free(line);
    if (file) fclose(file);
    return is_read;
}

static uint32_t add(const char *path, ino_t *inodes, uint32_t n)
{
    struct stat st;
    if (n == MAX_LEVELS || stat(path, &st)) return n;
    inodes[n] = st.st_ino;
    return n + 1;
}

uint32_t cgroups_around(pid_t pid, ino_t *inodes)
{
    char path[PATH_MAX];
    const char *mount = mount_point();
    size_t top = mount ? strlen(mount) : 0;
    if (!mount) return 0;
    memcpy(path, mount, top);
    if (!read_path(pid, path + top, sizeof path - top)) return 0;
    uint32_t n = 0;
    for (char *end = path + top; end; end = strchr(end + 1, '/')) {
        *end = 0;
        n = add(path, inodes, n);
        *end = '/';
    }
    return add(path, inodes, n);
}

ino_t cgroup_inode(int folder)
{
    struct statfs system;
    struct stat st;
    if (folder < 0 || fstatfs(folder, &system) || system.f_type != CGROUP2_SUPER_MAGIC) return 0;
    /* The descriptor of a removed folder stays valid, but the folder has no files any more. */
    return fstat(folder, &st) || faccessat(folder, "cgroup.procs", F_OK, 0) ? 0 : st.st_ino;
}
