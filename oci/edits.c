/*
 * edits.c: adds the mounts that a container needs to an OCI configuration. Owns lists that join an image's own preloads
 * with the host's: in the container's bundle, or in RUN/preload.d if no bundle is known. Never changes another byte of
 * the configuration, and never removes a mount that it did not add. After a failure, edits_apply() has reported the
 * reason and returns NULL.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "edits.h"
#include "json.h"
#include "reasons.h"

#define PRELOAD "/etc/ld.so.preload"
#define NIX_PRELOAD "/etc/ld-nix.so.preload" /* read instead by the loader of programs that Nix built */
#define FILE_NAME "libfgpu.so"
#define MOST_OF_A_LIST (64 << 10)
#define MOST_LISTS 256 /* one for each different list of an image: more than any host has */
#define LABEL "security.selinux"

/* -- files */

static char *drain(int fd, size_t most)
{
    size_t length = 0, room = 0;
    char *text = NULL;
    for (;;) {
        if (room - length < 2) {
            char *more = realloc(text, room = room ? 2 * room : 1 << 16);
            if (!more) break;
            text = more;
        }
        ssize_t got = read(fd, text + length, room - length - 1);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) break;
        length += (size_t)got;
        if (length > most || (got && memchr(text + length - got, 0, (size_t)got))) {
            errno = EFBIG; /* too long, or not text */
            break;
        }
        if (got) continue;
        text[length] = 0;
        return text;
    }
    free(text);
    return NULL;
}

static char *drain_and_close(int fd, size_t most)
{
    if (fd < 0) return NULL;
    char *text = drain(fd, most);
    int saved = errno;
    close(fd);
    errno = saved;
    return text;
}

char *file_read(int folder, const char *path, size_t most)
{
    if (!strcmp(path, "-")) return drain(0, most);
    return drain_and_close(openat(folder, path, O_RDONLY | O_CLOEXEC), most);
}

int file_write(const char *path, const char *text)
{
    char aside[PATH_MAX];
    struct stat before = {.st_mode = 0644};
    int there = !stat(path, &before);
    if (snprintf(aside, sizeof aside, "%s.fgpu-%d", path, (int)getpid()) >= (int)sizeof aside) return -1;
    int fd = open(aside, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) return -1;
    /* A short write sets no errno. The next write does. */
    for (ssize_t put; *text && (put = write(fd, text, strlen(text))) > 0;) text += put;
    int failed = *text || fchmod(fd, before.st_mode & 07777) || (there && fchown(fd, before.st_uid, before.st_gid));
    if (close(fd) || failed || rename(aside, path)) {
        int saved = errno;
        unlink(aside);
        errno = saved;
        return -1;
    }
    return 0;
}

/* -- the setup that the agent has written */

int setup_read(struct setup *setup, const char *run)
{
    char path[PATH_MAX];
    *setup = (struct setup){.run = run};
    snprintf(path, sizeof path, "%s/containers", run);
    setup->text = file_read(AT_FDCWD, path, MOST_OF_A_LIST);
    if (!setup->text && errno == ENOENT) return 0;
    if (!setup->text) {
        say("%s cannot be read: %s", path, strerror(errno));
        return -1;
    }
    for (char *line = strtok(setup->text, "\n"); line; line = strtok(NULL, "\n")) {
        if (!strncmp(line, "shim /", 6)) setup->shim = line + 5;
        if (!strncmp(line, "socket /", 8)) setup->socket = line + 7;
        if (!strncmp(line, "preload /", 9)) setup->preload = line + 8;
        if (!strncmp(line, "info /", 6)) setup->info = line + 5;
    }
    if (setup->shim && setup->socket && setup->preload) return 1;
    say("%s is incomplete: restart the agent", path);
    return -1;
}

/* -- an image's own preloads */

/* Symlinks of the image are resolved inside its root. Only a regular file is opened: opening a device node can have an
 * effect (a watchdog, for example), and an image can contain any device node. */
static char *own_list(const char *root, const char *place)
{
    struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};
    int folder = open(root, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) return NULL;
    int found = (int)syscall(SYS_openat2, folder, place + 1, &how, sizeof how);
    close(folder);
    struct stat status;
    char *text = NULL, path[32];
    if (found >= 0 && !fstat(found, &status) && S_ISREG(status.st_mode)) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", found);
        text = drain_and_close(open(path, O_RDONLY | O_CLOEXEC), MOST_OF_A_LIST);
    }
    if (found >= 0) close(found);
    return text;
}

/* Return the image's list without a shim of its own, followed by the host's list. NULL: the image adds nothing. */
static char *joined(const char *own, const char *shim)
{
    char *text = malloc(strlen(own) + strlen(shim) + 3), *to = text;
    if (!text) return NULL;
    for (const char *at = own; *at;) {
        at += strspn(at, " \t\r\n:");
        size_t length = strcspn(at, " \t\r\n:");
        if (*at == '#') {
            at += strcspn(at, "\n");
            continue;
        }
        if (length && !memmem(at, length, FILE_NAME, strlen(FILE_NAME))) {
            to = mempcpy(to, at, length);
            *to++ = '\n';
        }
        at += length;
    }
    int adds = to > text;
    sprintf(to, "%s\n", shim);
    if (adds) return text;
    free(text);
    return NULL;
}

static int is_plain(const char *path)
{
    for (; *path; path++)
        if (*path == '"' || *path == '\\' || (unsigned char)*path < ' ') return 0;
    return 1;
}

/* Write the list into the bundle, which belongs to one container and is removed with it. */
static int keep_in_bundle(const struct setup *setup, const char *bundle, const char *place, const char *text,
                          char *path, size_t size)
{
    char label[256], *folder = realpath(bundle, NULL);
    int length = folder ? snprintf(path, size, "%s/fgpu.%s", folder, strrchr(place, '/') + 1) : -1;
    free(folder);
    if (length < 0) return -1;
    if ((size_t)length >= size || !is_plain(path)) {
        errno = ENAMETOOLONG; /* or the path has characters that would need escapes in the configuration */
        return -1;
    }
    if (file_write(path, text)) return -1;
    ssize_t labelled = lgetxattr(setup->preload, LABEL, label, sizeof label);
    if (labelled > 0)
        lsetxattr(path, LABEL, label, (size_t)labelled, 0); /* with the folder's label, no container could read it */
    return 0;
}

static int is_before(const struct timespec *one, const struct timespec *other)
{
    return one->tv_sec < other->tv_sec || (one->tv_sec == other->tv_sec && one->tv_nsec < other->tv_nsec);
}

/* Return 0 if there is room for one more list. If the folder is full, the list with the oldest use is removed. */
static int make_place(const char *folder)
{
    char oldest[NAME_MAX + 1] = "";
    struct stat found;
    struct timespec since = {0};
    int count = 0, at = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *lists = at >= 0 ? fdopendir(at) : NULL;
    for (struct dirent *entry; lists && (entry = readdir(lists));) {
        if (*entry->d_name == '.' || fstatat(at, entry->d_name, &found, AT_SYMLINK_NOFOLLOW)) continue;
        if (count++ && !is_before(&found.st_mtim, &since)) continue;
        since = found.st_mtim;
        strcpy(oldest, entry->d_name);
    }
    int failed = count >= MOST_LISTS && unlinkat(at, oldest, 0);
    if (lists) closedir(lists);
    return failed;
}

/* Write the list into RUN/preload.d, for callers without a bundle. The file is named by a hash of its contents, so all
 * containers with the same list use one file. */
static int keep_shared(const struct setup *setup, const char *text, char *path, size_t size)
{
    uint64_t hash = 0xcbf29ce484222325ULL;
    for (const char *at = text; *at; at++) hash = (hash ^ (unsigned char)*at) * 0x100000001b3ULL;
    char folder[PATH_MAX];
    snprintf(folder, sizeof folder, "%s/preload.d", setup->run);
    if (mkdir(folder, 0755) && errno != EEXIST) return -1;
    snprintf(path, size, "%s/preload.d/%016llx", setup->run, (unsigned long long)hash);
    char *before = file_read(AT_FDCWD, path, 2 * MOST_OF_A_LIST);
    int same = before && !strcmp(before, text);
    errno = before ? EEXIST : EDQUOT;
    int taken = before && !same;
    free(before);
    if (same) utimensat(AT_FDCWD, path, NULL, 0); /* the agent removes lists that were not used for a long time */
    if (same || taken) return same ? 0 : -1;
    if (!make_place(folder)) return file_write(path, text);
    errno = EDQUOT;
    return -1;
}

static int list_for(const struct setup *setup, const char *bundle, const char *root, const char *place, char *path,
                    size_t size)
{
    snprintf(path, size, "%s", setup->preload);
    char *own = own_list(root, place), *text = own ? joined(own, setup->shim) : NULL;
    int failed = text && (bundle ? keep_in_bundle(setup, bundle, place, text, path, size)
                                 : keep_shared(setup, text, path, size));
    if (failed) say("the image's own %s cannot be combined with the shim's: %s", place, strerror(errno));
    free(own);
    free(text);
    return failed ? -1 : 0;
}

/* -- the configuration */

/* Return 1 if the configuration has a mount at the destination already. A second mount over it would hide the user's
 * own mount. */
static int is_mounted(const char *mounts, const char *destination)
{
    for (const char *item = mounts ? json_next(mounts, NULL) : NULL; item; item = json_next(mounts, item)) {
        char *text = json_text(json_member(item, "destination"));
        int same = text && !strcmp(text, destination);
        free(text);
        if (same) return 1;
    }
    return 0;
}

static void mount_entry(char **to, const char *mounts, const char *source, const char *destination, const char *more)
{
    if (is_mounted(mounts, destination)) {
        if (!strcmp(destination, PRELOAD) || !strcmp(destination, NIX_PRELOAD))
            say("the container has its own mount at %s: fgpu does not mount the shim's list there", destination);
        return;
    }
    *to += sprintf(*to,
                   ",{\"destination\":\"%s\",\"type\":\"bind\",\"source\":\"%s\","
                   "\"options\":[\"bind\",\"ro\",\"nosuid\",\"nodev\"%s]}",
                   destination, source, more);
}

static char *spliced(const char *config, const char *at, const char *before, const char *middle, const char *after)
{
    char *text = NULL;
    int length = asprintf(&text, "%.*s%s%s%s%s", (int)(at - config), config, before, middle, after, at);
    return length < 0 ? NULL : text;
}

/* Append to the mounts: a mount of the engine over /run or /etc is applied before these. */
static char *with_mounts(const char *config, const char *mounts, const char *entries)
{
    const char *comma = entries + 1; /* each entry begins with a comma */
    if (!*entries) return strdup(config);
    if (!mounts) {
        const char *first = json_skip(config) + 1;
        return spliced(config, first, "\"mounts\":[", comma, *json_skip(first) == '}' ? "]" : "],");
    }
    return spliced(config, json_end(mounts) - 1, "", json_next(mounts, NULL) ? entries : comma, "");
}

char *edits_apply(const struct setup *setup, const char *config, const char *bundle)
{
    const char *mounts = json_member(config, "mounts");
    char *root = json_text(json_member(json_member(config, "root") ?: "", "path"));
    if (!root || (mounts && *mounts != '[')) {
        say("the container's configuration has no root.path, or its mounts are not a list");
        free(root);
        return NULL;
    }
    char path[PATH_MAX], list[PATH_MAX], nix_list[PATH_MAX], entries[10 * PATH_MAX], *to = entries;
    snprintf(path, sizeof path, "%s%s%s", *root == '/' || !bundle ? "" : bundle, *root == '/' ? "" : "/", root);
    free(root);
    if (list_for(setup, bundle, path, PRELOAD, list, sizeof list)) return NULL;
    if (list_for(setup, bundle, path, NIX_PRELOAD, nix_list, sizeof nix_list)) return NULL;
    *to = 0;
    mount_entry(&to, mounts, setup->shim, setup->shim, "");
    mount_entry(&to, mounts, setup->socket, "/run/fgpu/shim", ",\"noexec\"");
    mount_entry(&to, mounts, list, PRELOAD, ",\"noexec\"");
    mount_entry(&to, mounts, setup->socket, "/var/lib/fgpu/run", ",\"noexec\""); /* still visible if an init mounts
                                                                                    over /run */
    mount_entry(&to, mounts, nix_list, NIX_PRELOAD, ",\"noexec\"");
    if (setup->info) mount_entry(&to, mounts, setup->info, "/var/lib/fgpu/bin/fgpu-info", "");
    return with_mounts(config, mounts, entries);
}
