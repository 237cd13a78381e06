/* Memory that outlives its process, or the handle or pool from which it came. */
#include "conformance_actors.h"

#include <stdio.h>

/* Only a descriptor still refers to memory. */
static void check_export(void)
{
    roles_begin();
    struct role *a = role_enter();
    ask("export.begin", a, ACT_BEGIN, 0);
    show("export.begun");
    ask("export.create", a, ACT_CREATE, SIZE);
    show("export.created");
    ask("export", a, ACT_EXPORT, 0);
    ask("export.release", a, ACT_RELEASE, 0);
    show("export.released");
    drop_file(a);
    show("export.closed");
    ask("export.create2", a, ACT_CREATE, SIZE);
    ask("export.map", a, ACT_MAP, 0);
    ask("export2", a, ACT_EXPORT, 0);
    role_end(a);
    show("export.killed");
    drop_file(a);
    show("export.killed.closed");
    roles_end("export");
}

/* A descriptor of memory that was not created for descriptors. */
static void check_dmabuf(void)
{
    roles_begin();
    struct role *a = role_enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    ask("dmabuf", a, ACT_DMABUF, 0);
    show("dmabuf.exported");
    ask("dmabuf.free", a, ACT_FREE, 0);
    show("dmabuf.freed");
    drop_file(a);
    show("dmabuf.closed");
    tell(a, ACT_ALLOCATE, SIZE);
    ask("dmabuf.again", a, ACT_DMABUF, 0);
    role_end(a);
    show("dmabuf.killed");
    roles_end("dmabuf");
}

/* The exporter ends before the importers. */
static void check_import(void)
{
    roles_begin();
    struct role *a = role_enter(), *b = role_enter(), *c = role_enter();
    tell(a, ACT_BEGIN, 0);
    tell(b, ACT_BEGIN, 0);
    tell(c, ACT_BEGIN, 0);
    tell(a, ACT_CREATE, SIZE);
    tell(a, ACT_MAP, 0);
    tell(a, ACT_EXPORT, 0);
    tell(b, ACT_CREATE, SIZE); /* sets the size for the import */
    tell(b, ACT_RELEASE, 0);
    tell(c, ACT_CREATE, SIZE);
    tell(c, ACT_RELEASE, 0);
    show("import.exported");
    ask_with("import.b", b, ACT_IMPORT, a);
    show("import.imported");
    ask("import.b.map", b, ACT_MAP, 0);
    show("import.mapped");
    ask_with("import.c", c, ACT_IMPORT, a);
    ask("import.c.map", c, ACT_MAP, 0);
    show("import.both");
    tell(b, ACT_CLOSE, 0);
    tell(c, ACT_CLOSE, 0);
    role_end(a);
    show("import.killed"); /* this process still has the exporter's descriptor */
    drop_file(a);
    show("import.closed");
    ask("import.b.unmap", b, ACT_UNMAP, 0);
    show("import.b.unmapped");
    ask("import.b.release", b, ACT_RELEASE, 0);
    show("import.b.released");
    ask("import.c.unmap", c, ACT_UNMAP, 0);
    ask("import.c.release", c, ACT_RELEASE, 0);
    show("import.c.released");
    roles_end("import");
}

/* An importer keeps the last descriptor. */
static void check_import_keeps(void)
{
    roles_begin();
    struct role *a = role_enter(), *b = role_enter();
    tell(a, ACT_BEGIN, 0);
    tell(b, ACT_BEGIN, 0);
    tell(a, ACT_CREATE, SIZE);
    tell(a, ACT_EXPORT, 0);
    tell(b, ACT_CREATE, SIZE);
    tell(b, ACT_RELEASE, 0);
    ask_with("keeps.import", b, ACT_IMPORT, a);
    ask("keeps.map", b, ACT_MAP, 0);
    drop_file(a);
    ask("keeps.a.release", a, ACT_RELEASE, 0);
    show("keeps.released");
    role_end(a);
    show("keeps.killed");
    ask("keeps.unmap", b, ACT_UNMAP, 0);
    ask("keeps.release", b, ACT_RELEASE, 0);
    show("keeps.let_go");
    tell(b, ACT_CLOSE, 0);
    show("keeps.closed");
    roles_end("keeps");
}

static void check_ipc(void)
{
    roles_begin();
    struct role *a = role_enter(), *b = role_enter();
    tell(a, ACT_BEGIN, 0);
    tell(b, ACT_BEGIN, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    ask("ipc.get", a, ACT_IPC_GET, 0);
    ask_with("ipc.open", b, ACT_IPC_OPEN, a);
    show("ipc.opened");
    ask("ipc.free", a, ACT_FREE, 0);
    show("ipc.freed");
    role_end(a);
    show("ipc.killed");
    ask("ipc.close", b, ACT_IPC_CLOSE, 0);
    show("ipc.closed");
    roles_end("ipc");
}

static void check_pool_export(void)
{
    roles_begin();
    struct role *a = role_enter(), *b = role_enter();
    tell(a, ACT_BEGIN, 0);
    tell(b, ACT_BEGIN, 0);
    ask("pool", a, ACT_POOL, SIZE);
    show("pool.made");
    ask("pool.export", a, ACT_POOL_EXPORT, 0);
    show("pool.exported");
    ask_with("pool.import", b, ACT_POOL_IMPORT, a);
    ask_with("pool.pointer", b, ACT_POOL_POINTER, a);
    drop_file(a);
    show("pool.imported");
    role_end(a);
    show("pool.killed");
    ask("pool.free", b, ACT_POOL_FREE, 0);
    show("pool.freed");
    ask("pool.destroy", b, ACT_POOL_DESTROY, 0);
    show("pool.destroyed");
    tell(b, ACT_CLOSE, 0);
    show("pool.closed");
    roles_end("pool");
}

/* The exporter destroys its pool while another process has it. */
static void check_pool_destroyed(void)
{
    roles_begin();
    struct role *a = role_enter(), *b = role_enter();
    tell(a, ACT_BEGIN, 0);
    tell(b, ACT_BEGIN, 0);
    tell(a, ACT_POOL, SIZE);
    tell(a, ACT_POOL_EXPORT, 0);
    tell_with(b, ACT_POOL_IMPORT, 0, &a->last, a->file);
    tell_with(b, ACT_POOL_POINTER, 0, &a->last, -1);
    drop_file(a);
    tell(b, ACT_CLOSE, 0);
    show("pool.unkept");
    ask("pool.a.free", a, ACT_POOL_FREE, 0);
    show("pool.a.freed");
    ask("pool.a.destroy", a, ACT_POOL_DESTROY, 0);
    show("pool.a.destroyed");
    ask("pool.b.free", b, ACT_POOL_FREE, 0);
    ask("pool.b.destroy", b, ACT_POOL_DESTROY, 0);
    show("pool.b.destroyed");
    roles_end("pool.unkept");
}

/* A forked child outlives its parent with the driver's descriptors, and then closes them. */
static void check_forks(const char *what, enum act act)
{
    char name[64];
    roles_begin();
    struct role *a = role_enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, act, SIZE);
    tell(a, ACT_FORK, 0);
    snprintf(name, sizeof name, "%s.forked", what);
    show(name);
    role_end(a);
    snprintf(name, sizeof name, "%s.killed", what);
    show(name);
    tell(a, ACT_CLOSE_FILES, 0);
    snprintf(name, sizeof name, "%s.closed", what);
    show(name);
    roles_end(what);
}

/* Only the queue of a socket has the driver's descriptors. */
static void check_unread(void)
{
    roles_begin();
    struct role *a = role_enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    ask("unread.sent", a, ACT_SEND_FILES, 0);
    tell(a, ACT_FORK, 0);
    tell(a, ACT_CLOSE_FILES, 0);
    show("unread.closed");
    role_end(a);
    show("unread.killed");
    roles_end("unread");
}

static void check_execute(void)
{
    roles_begin();
    struct role *a = role_enter();
    tell(a, ACT_BEGIN, 0);
    tell(a, ACT_ALLOCATE, SIZE);
    tell(a, ACT_EXECUTE, 0);
    show("execute.done");
    tell(a, ACT_CLOSE_FILES, 0);
    show("execute.closed");
    roles_end("execute");
}

void check_outlives(void)
{
    section("outlives");
    check_export();
    check_dmabuf();
    check_import();
    check_import_keeps();
    check_ipc();
    check_pool_export();
    check_pool_destroyed();
    check_forks("fork", ACT_ALLOCATE);
    check_forks("fork_managed", ACT_MANAGED);
    check_unread();
    check_execute();
}
