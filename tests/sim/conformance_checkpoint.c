/* One process locks, checkpoints and restores another. Memory that the driver cannot checkpoint is left out, because
 * such a call may never return. */
#include "conformance_actors.h"

#include <poll.h>
#include <stdio.h>
#include <string.h>

#define LOCK_MS 5000
#define MOMENT_MS 300

static void show_state(const char *what, pid_t pid)
{
    CUprocessState state = (CUprocessState)-1;
    char name[64];
    snprintf(name, sizeof name, "%s.state", what);
    say(name, CALL(cuCheckpointProcessGetState, pid, &state) ? -1 : (long long)state);
}

/* Makes those of the four calls that the process's state does not allow. */
static void check_refused(const char *what, pid_t pid, const char *allowed)
{
    CUcheckpointLockArgs lock = {.timeoutMs = LOCK_MS};
    char name[64];
    for (const char *call = "lcru"; *call; call++) {
        if (strchr(allowed, *call)) continue;
        snprintf(name, sizeof name, "%s.%c", what, *call);
        say(name, *call == 'l'   ? CALL(cuCheckpointProcessLock, pid, &lock)
                  : *call == 'c' ? CALL(cuCheckpointProcessCheckpoint, pid, NULL)
                  : *call == 'r' ? CALL(cuCheckpointProcessRestore, pid, NULL)
                                 : CALL(cuCheckpointProcessUnlock, pid, NULL));
    }
    show_state(what, pid);
}

/* Sends an order, and prints whether the actor does not reply to it for a moment. */
static void begin(const char *what, const struct role *role, enum act act)
{
    struct order order = {.act = act};
    struct pollfd reply = {.fd = role->sock, .events = POLLIN};
    int none = -1;
    post(role->sock, &order, &none, 0);
    say(what, !poll(&reply, 1, MOMENT_MS));
}

static void end(const char *what, struct role *role)
{
    collect(role->sock, &role->last);
    say(what, role->last.number);
}

static void check_wrong(void)
{
    CUprocessState state;
    int tid;
    CUcheckpointLockArgs lock = {.timeoutMs = LOCK_MS, .reserved0 = 1};
    roles_begin();
    struct role *a = role_enter();
    TRY("plain.state", cuCheckpointProcessGetState, a->pid, &state);
    TRY("plain.thread", cuCheckpointProcessGetRestoreThreadId, a->pid, &tid);
    TRY("plain.lock", cuCheckpointProcessLock, a->pid, NULL);
    tell(a, ACT_BEGIN, 0);
    TRY("null.state", cuCheckpointProcessGetState, a->pid, NULL);
    TRY("null.thread", cuCheckpointProcessGetRestoreThreadId, a->pid, NULL);
    TRY("zero.state", cuCheckpointProcessGetState, 0, &state);
    TRY("negative.state", cuCheckpointProcessGetState, -1, &state);
    TRY("reserved.lock", cuCheckpointProcessLock, a->pid, &lock);
    show_state("reserved", a->pid);
    TRY("thread", cuCheckpointProcessGetRestoreThreadId, a->pid, &tid);
    say("thread.is_main", tid == a->pid);
    role_end(a);
    TRY("ended.state", cuCheckpointProcessGetState, a->pid, &state);
    roles_end("wrong");
}

static void check_cycle(void)
{
    CUcheckpointLockArgs lock = {.timeoutMs = LOCK_MS};
    roles_begin();
    struct role *a = role_enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    show("running");
    check_refused("running", a->pid, "l");
    TRY("lock", cuCheckpointProcessLock, a->pid, &lock);
    check_refused("locked", a->pid, "cu");
    show("locked");
    begin("locked.waits", a, ACT_FREE);
    TRY("unlock", cuCheckpointProcessUnlock, a->pid, NULL);
    end("locked.free", a);
    tell(a, ACT_ALLOCATE, SIZE);
    TRY("again.lock", cuCheckpointProcessLock, a->pid, &lock);
    TRY("checkpoint", cuCheckpointProcessCheckpoint, a->pid, NULL);
    check_refused("parked", a->pid, "r");
    show("parked");
    begin("parked.waits", a, ACT_FREE);
    TRY("restore", cuCheckpointProcessRestore, a->pid, NULL);
    check_refused("restored", a->pid, "cu");
    show("restored");
    TRY("restored.unlock", cuCheckpointProcessUnlock, a->pid, NULL);
    end("parked.free", a);
    show("freed");
    TRY("killed.lock", cuCheckpointProcessLock, a->pid, &lock);
    TRY("killed.checkpoint", cuCheckpointProcessCheckpoint, a->pid, NULL);
    role_end(a);
    show("killed");
    roles_end("cycle");
}

void check_checkpoint(void)
{
    section("checkpoint");
    check_wrong();
    check_cycle();
}
