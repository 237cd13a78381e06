/*
 * fgpu-oci: the program that container engines call when a container starts.
 *
 *   fgpu-oci share NAME               OCI hook createRuntime: the container's cgroup gets this share before it runs
 *   fgpu-oci precreate                Podman's hook: a configuration on stdin, with the shim's mounts on stdout
 *   fgpu-oci runtime RUNTIME ARGS…    an OCI runtime: the same edit in the bundle, then executes RUNTIME
 *   fgpu-runtime-NAME ARGS…           a link to it: as `fgpu-oci runtime NAME ARGS…`; if the link runtimes/NAME exists
 *                                     in the program's folder, its target is the runtime
 *   fgpu-oci knock                    Kubernetes' probe: exits with 0 if a gatekeeper accepts connections and reads
 *                                     them
 *   fgpu-oci ping                     Kubernetes' probe: exits with 0 if the agent answers at its control socket
 *   fgpu-oci info, fgpu-info          in a container: prints the limits and the use of its cgroup, without CUDA
 *
 * It never decides what a container gets (the agent does). If it does not let a container start, it reports the reason
 * on stderr, in the runtime's own log and in the system's. If a container starts in another way than requested, the
 * reason is in the system's log alone: a runtime's stderr is the container's own. If no agent has written a setup,
 * fgpu-oci edits nothing.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "edits.h"
#include "json.h"
#include "reasons.h"

#define MOST_OF_A_CONFIG (16 << 20)
#define MOST_OF_AN_ANSWER (16 << 10)
#define PATIENCE_SECONDS 5

/* -- fgpu-oci share */

static int connect_to(const char *run, const char *name, int type)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct timeval patience = {.tv_sec = PATIENCE_SECONDS};
    int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    snprintf(address.sun_path, sizeof address.sun_path, "%s/%s", run, name);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (fd < 0 || !connect(fd, (struct sockaddr *)&address, sizeof address)) return fd;
    close(fd);
    return -1;
}

static int is_name(const char *text)
{
    static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.:-";
    return *text && strlen(text) < 128 && strspn(text, allowed) == strlen(text);
}

static int share(const char *run, const char *name)
{
    char *state = file_read(AT_FDCWD, "-", MOST_OF_A_CONFIG);
    const char *pid = state ? json_member(state, "pid") : NULL;
    if (!pid || atoi(pid) <= 0 || !is_name(name))
        return refuse("the share's name is not valid, or stdin has no state of the container");
    int agent = connect_to(run, "control.sock", SOCK_STREAM);
    if (agent < 0) return refuse("the container needs a limit, and no agent responds (start the agent: fgpu agent)");
    dprintf(agent, "{\"verb\":\"share\",\"pid\":%d,\"share\":\"%s\"}\n", atoi(pid), name);
    char answer[4096] = "";
    size_t length = 0;
    for (ssize_t got; length < sizeof answer - 1; length += (size_t)got)
        if ((got = read(agent, answer + length, sizeof answer - 1 - length)) <= 0) break;
    answer[length] = 0;
    if (json_member(answer, "ok")) return 0;
    char *why = json_text(json_member(answer, "error"));
    say("fgpu.dev/share=%s: %s", name, why ?: "the agent did not answer in time");
    return refuse("the container cannot get its share");
}

/* -- fgpu-oci knock */

/* Connect and disconnect: the gatekeeper disconnects a peer that sends nothing, whether or not an agent runs. */
static int knock(const char *run)
{
    int gatekeeper = connect_to(run, "shim/shim.sock", SOCK_SEQPACKET);
    char answer;
    if (gatekeeper >= 0 && !shutdown(gatekeeper, SHUT_WR) && !read(gatekeeper, &answer, 1)) return 0;
    fprintf(stderr, "fgpu: no gatekeeper answers at %s/shim/shim.sock\n", run);
    return 1;
}

/* -- fgpu-oci ping */

/* The agent's main loop answers, so a connection alone is no answer. Pods cannot reach this socket. */
static int ping(const char *run)
{
    static const char question[] = "{\"verb\":\"ping\"}\n", good[] = "{\"ok\":";
    int agent = connect_to(run, "control.sock", SOCK_STREAM);
    char answer[sizeof good - 1];
    if (agent >= 0 && send(agent, question, sizeof question - 1, MSG_NOSIGNAL) > 0 &&
        recv(agent, answer, sizeof answer, MSG_WAITALL) == sizeof answer && !memcmp(answer, good, sizeof answer))
        return 0;
    fprintf(stderr, "fgpu: no agent answers at %s/control.sock\n", run);
    return 1;
}

/* -- fgpu-info */

static int put_out(const char *text)
{
    for (size_t left = strlen(text); left;) {
        ssize_t put = write(1, text, left);
        if (put < 0 && errno != EINTR) return -1;
        if (put > 0) text += put, left -= (size_t)put;
    }
    return 0;
}

/* The gatekeeper replies with text about the process that the kernel reports as its peer. A container has the socket's
 * folder twice, because its init may mount over /run. Returns 3 if there is no reply. */
static int info(const char *run)
{
    static const char question[] = "fgpu-info\n";
    char answer[MOST_OF_AN_ANSWER];
    int gatekeeper = connect_to(run, "shim/shim.sock", SOCK_SEQPACKET);
    if (gatekeeper < 0) gatekeeper = connect_to("/var/lib/fgpu/run", "shim.sock", SOCK_SEQPACKET);
    if (gatekeeper < 0 || send(gatekeeper, question, sizeof question - 1, MSG_NOSIGNAL) < 0) {
        dprintf(2, "fgpu-info: no agent answers at %s/shim/shim.sock\n", run);
        return 3;
    }
    ssize_t length = read(gatekeeper, answer, sizeof answer - 1);
    if (length <= 0) {
        dprintf(2, "fgpu-info: the agent has not answered: try again; an older version of the agent cannot answer\n");
        return 3;
    }
    answer[length] = 0;
    return put_out(answer) ? 1 : 0;
}

/* -- fgpu-oci precreate */

static int precreate(const char *run)
{
    struct setup setup;
    char *config = file_read(AT_FDCWD, "-", MOST_OF_A_CONFIG);
    if (!config) return refuse("the container's configuration cannot be read");
    int is_set_up = setup_read(&setup, run);
    if (is_set_up < 0) return refuse("the location of the shim is unknown");
    if (!is_set_up) say("no agent runs here: the container starts without a limit");
    char *edited = is_set_up ? edits_apply(&setup, config, NULL) : config;
    if (!edited || put_out(edited)) return refuse("the shim cannot be added to the container");
    return 0;
}

/* -- fgpu-oci runtime */

/* Read `--bundle X`, `--bundle=X`, `-b X` and so on; NULL: there is no such option. */
static const char *option(char **words, const char *name, const char *letter)
{
    size_t length = strlen(name);
    for (; *words; words++) {
        if (!strncmp(*words, name, length) && (*words)[length] == '=') return *words + length + 1;
        if ((!strcmp(*words, name) || (letter && !strcmp(*words, letter))) && words[1]) return words[1];
    }
    return NULL;
}

/* Decide by the runtime's first command: the arguments after it may be a container of any name, even "run". */
static int starts_a_container(char **words)
{
    static const char *const commands[] = {"create",   "run",  "checkpoint", "delete", "events", "exec",
                                           "features", "kill", "list",       "pause",  "ps",     "restore",
                                           "resume",   "spec", "start",      "state",  "update", NULL};
    for (; *words; words++)
        for (int i = 0; commands[i]; i++)
            if (!strcmp(*words, commands[i])) return i < 2;
    return 0;
}

/* Return 0 if the bundle is ready for the runtime. */
static int edit_bundle(const char *run, const char *bundle)
{
    struct setup setup;
    char path[PATH_MAX];
    int is_set_up = setup_read(&setup, run);
    if (is_set_up < 0) return refuse("the location of the shim is unknown");
    if (!is_set_up) {
        say("no agent runs here: the container starts without a limit");
        return 0;
    }
    snprintf(path, sizeof path, "%s/config.json", bundle);
    char *config = file_read(AT_FDCWD, path, MOST_OF_A_CONFIG);
    char *edited = config ? edits_apply(&setup, config, bundle) : NULL;
    int failed = !edited || (strcmp(edited, config) && file_write(path, edited));
    if (!config || (edited && failed)) say("%s: %s", path, strerror(errno));
    if (failed) return refuse("the shim cannot be added to the container");
    return 0;
}

static int runtime(const char *run, char **words)
{
    const char *name = words[0] ? strrchr(words[0], '/') : NULL;
    name = name ? name + 1 : words[0];
    if (!name || !strncmp(name, "fgpu-", 5))
        return refuse("the command names no OCI runtime: fgpu-oci runtime RUNTIME");
    reasons_log = option(words, "--log", NULL);
    if (starts_a_container(words + 1) && edit_bundle(run, option(words, "--bundle", "-b") ?: ".")) return 1;
    execvp(words[0], words);
    say("%s: %s", words[0], strerror(errno));
    return refuse("the OCI runtime cannot be executed");
}

/* Find a runtime by its name in PATH, or by the target of the link of that name. */
static char *named_by_link(char *name)
{
    static char target[PATH_MAX];
    char self[PATH_MAX], link[2 * PATH_MAX];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length <= 0) return name;
    self[length] = 0;
    *strrchr(self, '/') = 0;
    snprintf(link, sizeof link, "%s/runtimes/%s", self, name);
    length = readlink(link, target, sizeof target - 1);
    target[length > 0 ? length : 0] = 0;
    return *target ? target : name;
}

int main(int count, char **words)
{
    static const char prefix[] = "fgpu-runtime-";
    const char *run = "/run/fgpu", *self = strrchr(words[0], '/');
    self = self ? self + 1 : words[0];
    if (!strncmp(self, prefix, sizeof prefix - 1)) {
        words[0] = named_by_link((char *)self + sizeof prefix - 1);
        return runtime(run, words);
    }
    if (!strcmp(self, "fgpu-info")) return info(run);
    if (count > 2 && !strcmp(words[1], "--run-dir")) run = words[2], words += 2, count -= 2;
    if (count == 3 && !strcmp(words[1], "share")) return share(run, words[2]);
    if (count == 2 && !strcmp(words[1], "precreate")) return precreate(run);
    if (count == 2 && !strcmp(words[1], "knock")) return knock(run);
    if (count == 2 && !strcmp(words[1], "ping")) return ping(run);
    if (count == 2 && !strcmp(words[1], "info")) return info(run);
    if (count > 2 && !strcmp(words[1], "runtime")) return runtime(run, words + 2);
    dprintf(
        2, "usage: fgpu-oci [--run-dir DIR] share NAME | precreate | knock | ping | info | runtime RUNTIME [ARG...]\n");
    return 2;
}
