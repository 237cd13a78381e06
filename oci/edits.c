/*
 * edits.c: the mounts that a container needs, put into an OCI configuration. Owns RUN/preload.d, lists that join an
 * image's own preloads with ours. Never changes a byte of the configuration that is not its own; never takes away a
 * mount that somebody else asked for. On failure: said, and no configuration.
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
#include <unistd.h>

#include "edits.h"
#include "json.h"
#include "reasons.h"

#define PRELOAD "/etc/ld.so.preload"
#define FILE_NAME "libfgpu.so"
#define MOST_OF_A_LIST (64 << 10)
#define MOST_LISTS 256 /* images bring them: no host has that many kinds */

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
            errno = EFBIG; /* too long, or no text */
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
    size_t length = strlen(text);
    int failed = write(fd, text, length) != (ssize_t)length || fchmod(fd, before.st_mode & 07777) ||
                 (there && fchown(fd, before.st_uid, before.st_gid));
    if (close(fd) || failed || rename(aside, path)) {
        int saved = errno;
        unlink(aside);
        errno = saved;
        return -1;
    }
    return 0;
}

/* -- what the agent says */

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
    }
    if (setup->shim && setup->socket && setup->preload) return 1;
    say("%s is incomplete: restart the agent", path);
    return -1;
}

/* -- an image's own preloads */

/* Symlinks of the image mean what they mean inside of it. What is no file is not opened: that alone may do something,
 * as to a watchdog, and an image brings the device nodes that it likes. */
static char *own_list(const char *root)
{
    struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};
    int folder = open(root, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0) return NULL;
    int place = (int)syscall(SYS_openat2, folder, PRELOAD + 1, &how, sizeof how);
    close(folder);
    struct stat found;
    char *text = NULL, path[32];
    if (place >= 0 && !fstat(place, &found) && S_ISREG(found.st_mode)) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", place);
        text = drain_and_close(open(path, O_RDONLY | O_CLOEXEC), MOST_OF_A_LIST);
    }
    if (place >= 0) close(place);
    return text;
}

/* The image's list without a shim of its own, then ours. NULL: the image adds nothing. */
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

static int lists_in(const char *folder)
{
    DIR *open = opendir(folder);
    int count = 0;
    for (struct dirent *entry; open && (entry = readdir(open));) count += *entry->d_name != '.';
    if (open) closedir(open);
    return count;
}

/* Named by what is in it: one file for all containers of all images that have the same. */
static int keep_list(const struct setup *setup, const char *text, char *path, size_t size)
{
    uint64_t hash = 0xcbf29ce484222325ULL;
    for (const char *at = text; *at; at++) hash = (hash ^ (unsigned char)*at) * 0x100000001b3ULL;
    snprintf(path, size, "%s/preload.d", setup->run);
    if (mkdir(path, 0755) && errno != EEXIST) return -1;
    int many = lists_in(path) >= MOST_LISTS;
    snprintf(path, size, "%s/preload.d/%016llx", setup->run, (unsigned long long)hash);
    char *before = file_read(AT_FDCWD, path, 2 * MOST_OF_A_LIST);
    int same = before && !strcmp(before, text);
    free(before);
    errno = before ? EEXIST : many ? EDQUOT : 0;
    if (same) utimensat(AT_FDCWD, path, NULL, 0); /* what nobody has asked for of late is swept */
    return same ? 0 : before || many ? -1 : file_write(path, text);
}

static int list_for(const struct setup *setup, const char *root, char *path, size_t size)
{
    snprintf(path, size, "%s", setup->preload);
    char *own = own_list(root), *text = own ? joined(own, setup->shim) : NULL;
    int failed = text && keep_list(setup, text, path, size);
    if (failed) say("the image's own " PRELOAD " cannot be joined with the shim: %s", strerror(errno));
    free(own);
    free(text);
    return failed ? -1 : 0;
}

/* -- the configuration */

/* 1: something is mounted there already. A second mount over it would hide what somebody asked for. */
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
        if (!strcmp(destination, PRELOAD)) say("the container has a mount of its own at " PRELOAD ": left as it is");
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

/* At the end of the mounts: what an engine mounts over /run or /etc comes before. */
static char *with_mounts(const char *config, const char *mounts, const char *entries)
{
    const char *comma = entries + 1; /* each begins with one */
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
        say("the container's configuration names no root: the runtime's own message says more");
        free(root);
        return NULL;
    }
    char path[PATH_MAX], list[PATH_MAX], entries[6 * PATH_MAX], *to = entries;
    snprintf(path, sizeof path, "%s%s%s", *root == '/' ? "" : bundle, *root == '/' ? "" : "/", root);
    free(root);
    if (list_for(setup, path, list, sizeof list)) return NULL;
    *to = 0;
    mount_entry(&to, mounts, setup->shim, setup->shim, "");
    mount_entry(&to, mounts, setup->socket, "/run/fgpu/shim", ",\"noexec\"");
    mount_entry(&to, mounts, list, PRELOAD, ",\"noexec\"");
    return with_mounts(config, mounts, entries);
}
