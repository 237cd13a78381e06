/* Which memory of a process is freed with a context, and which stays. */
#include "conformance_actors.h"

#include <stdio.h>

/* Ends the primary context, and retains it again. */
static void check_last(const char *what, enum act act)
{
    char name[64];
    roles_begin();
    struct role *a = role_enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, ACT_CREATE, SIZE);
    tell(a, ACT_MAP, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    tell(a, ACT_ASYNC, SIZE);
    snprintf(name, sizeof name, "%s.before", what);
    show(name);
    ask(what, a, act, 0);
    snprintf(name, sizeof name, "%s.done", what);
    show(name);
    snprintf(name, sizeof name, "%s.retain", what);
    ask(name, a, ACT_RETAIN, 0);
    snprintf(name, sizeof name, "%s.retained", what);
    show(name);
    snprintf(name, sizeof name, "%s.free", what);
    ask(name, a, ACT_POOL_FREE, 0);
    snprintf(name, sizeof name, "%s.freed", what);
    show(name);
    tell(a, ACT_UNMAP, 0);
    tell(a, ACT_RELEASE, 0);
    snprintf(name, sizeof name, "%s.released", what);
    show(name);
    roles_end(what);
}

void check_endings(void)
{
    section("endings");
    check_last("reset", ACT_RESET);
    check_last("left", ACT_LEAVE);
    roles_begin();
    struct role *a = role_enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, ACT_CONTEXT, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    tell(a, ACT_ASYNC, SIZE);
    show("second.before");
    ask("second.destroy", a, ACT_DESTROY, 0);
    show("second.destroyed");
    roles_end("second");
}
