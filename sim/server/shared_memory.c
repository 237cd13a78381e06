/* Memory that several processes hold, and the descriptors that refer to it. While the process that made the memory
 * holds it, the memory is in the row of that process. After that, the memory is in no row as long as a descriptor is
 * open anywhere, and then in the row of the newest holder. Memory of a pool is in no row except that of its maker.
 * Memory without a holder and without an open descriptor is freed. Contents are a file that the processes map; the
 * server never reads the file. */
#include "server/state.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

struct holder {
    struct client *client;
    uint64_t context; /* the context to which the memory belongs; 0: it belongs to the process */
    uint32_t refs;
};

struct share {
    bool exists;
    struct sim_share is;
    int file;
    struct holder *holders; /* oldest first */
    uint32_t n_holders;
    uint32_t n_exports;
    const struct client *named; /* the holder in whose row the memory is; NULL: it is in none */
    uint64_t named_bytes;       /* can be a part of the memory of a pool */
};

struct export
{
    bool exists;
    bool is_range; /* for drivers of other devices; CUDA does not import it */
    int end;       /* the server's end of a pair of sockets */
    ino_t inode;
    struct share *share;
};

static struct share shares[SIM_MAX_SHARES];
static struct export exports[SIM_MAX_EXPORTS];

static struct share *find(const uint64_t *key)
{
    for (struct share *s = shares; s < shares + SIM_MAX_SHARES; s++)
        if (s->exists && s->is.key[0] == key[0] && s->is.key[1] == key[1]) return s;
    return NULL;
}

static struct holder *find_holder(const struct share *share, const struct client *client)
{
    for (uint32_t i = 0; i < share->n_holders; i++)
        if (share->holders[i].client == client) return &share->holders[i];
    return NULL;
}

/* Memory of another process belongs to no context of its new holder. */
static struct holding *holding_of(const struct share *share, const struct holder *holder)
{
    if (!holder->context) return &holder->client->own[share->is.device];
    return ledger_holding(holder->client, share->is.device, share->is.kind, holder->context);
}

/* Counts this many bytes in the row of the named client, and the others in none. */
static void set_named_bytes(struct share *share, uint64_t bytes)
{
    struct holding *holding = holding_of(share, find_holder(share, share->named));
    uint64_t before = share->named_bytes;
    holding->bytes[share->is.kind] += bytes - before;
    holding->shared[share->is.kind] += bytes - before;
    if (bytes > before)
        ledger_name(share->is.device, bytes - before);
    else
        ledger_unname(share->is.device, before - bytes);
    share->named_bytes = bytes;
}

/* Decides what happens to the memory when a holder or a descriptor has gone. */
static void settle(struct share *share)
{
    if (share->n_exports) return;
    if (!share->n_holders) {
        ledger_free_unnamed(share->is.device, share->is.bytes);
        close(share->file);
        free(share->holders);
        *share = (struct share){0};
    } else if (share->is.kind == SIM_POOL) {
        bool is_shared = !share->named || share->n_holders > 1 || share->holders->refs > 1;
        if (is_shared || share->is.bytes == share->named_bytes) return;
        ledger_free_unnamed(share->is.device, share->is.bytes - share->named_bytes);
        share->is.bytes = share->named_bytes;
    } else if (!share->named) {
        share->named = share->holders[share->n_holders - 1].client;
        set_named_bytes(share, share->is.bytes);
    }
}

static void leave(struct share *share, struct holder *holder)
{
    if (share->named == holder->client) {
        set_named_bytes(share, 0);
        share->named = NULL;
    }
    share->n_holders--;
    memmove(holder, holder + 1, (size_t)(share->holders + share->n_holders - holder) * sizeof *holder);
    settle(share);
}

static enum sim_status join(struct share *share, struct client *client)
{
    struct holder *holder = find_holder(share, client);
    if (holder) {
        holder->refs++;
        return SIM_OK;
    }
    struct holder *grown = realloc(share->holders, (share->n_holders + 1) * sizeof *grown);
    if (!grown) return SIM_NO_MEMORY;
    share->holders = grown;
    grown[share->n_holders++] = (struct holder){.client = client, .refs = 1};
    return SIM_OK;
}

/* A pool may have reserved nothing yet, and an allocation in it never has memory of its own, only contents. */
static bool can_be_shared(const struct holding *holding, const struct sim_request *request)
{
    uint32_t kind = request->kind;
    bool has_kind = kind == SIM_BLOCK || kind == SIM_VMM || kind == SIM_POOL;
    return holding && has_kind && (request->bytes || kind == SIM_POOL) &&
           holding->bytes[kind] - holding->shared[kind] >= request->bytes;
}

enum sim_status share_new(struct client *client, const struct sim_request *request, int file, struct sim_share *out)
{
    struct holding *holding = ledger_holding(client, request->device, request->kind, request->context);
    uint32_t kind = request->kind;
    if (!can_be_shared(holding, request) || file < 0) return SIM_NOT_ALLOWED;
    struct share *share = shares;
    while (share < shares + SIM_MAX_SHARES && share->exists) share++;
    if (share == shares + SIM_MAX_SHARES) return SIM_NO_MEMORY;
    struct share made = {.exists = true, .is = {.bytes = request->bytes, .device = request->device, .kind = kind}};
    if (getrandom(made.is.key, sizeof made.is.key, 0) != sizeof made.is.key) return SIM_NO_MEMORY;
    made.holders = malloc(sizeof *made.holders);
    made.file = made.holders ? fcntl(file, F_DUPFD_CLOEXEC, 0) : -1;
    if (made.file < 0) {
        free(made.holders);
        return SIM_NO_MEMORY;
    }
    made.holders[0] = (struct holder){.client = client, .context = request->context, .refs = 1};
    made.n_holders = 1;
    made.named = client;
    made.named_bytes = request->bytes;
    holding->shared[kind] += request->bytes;
    *share = made;
    *out = made.is;
    return SIM_OK;
}

static enum sim_status hand_out(struct share *share, struct client *client, struct sim_share *out, int *file)
{
    enum sim_status status = share ? join(share, client) : SIM_NOT_ALLOWED;
    if (status) return status;
    *out = share->is;
    *file = share->file;
    return SIM_OK;
}

enum sim_status share_open(struct client *client, const uint64_t *key, struct sim_share *out, int *file)
{
    return hand_out(find(key), client, out, file);
}

/* The inode of a socket is unique while the socket is open. It is open, because the client has just sent it. */
enum sim_status share_import(struct client *client, uint32_t kind, int descriptor, struct sim_share *out, int *file)
{
    struct stat st;
    if (descriptor < 0 || fstat(descriptor, &st) || !S_ISSOCK(st.st_mode)) return SIM_NOT_ALLOWED;
    for (const struct export *e = exports; e < exports + SIM_MAX_EXPORTS; e++)
        if (e->exists && e->inode == st.st_ino && e->share->is.kind == kind && !e->is_range)
            return hand_out(e->share, client, out, file);
    return SIM_NOT_ALLOWED;
}

enum sim_status share_export(const struct client *client, const uint64_t *key, bool is_range, int *descriptor)
{
    struct share *share = find(key);
    if (!share || !find_holder(share, client)) return SIM_NOT_ALLOWED;
    struct export *export = exports;
    while (export < exports + SIM_MAX_EXPORTS && export->exists) export ++;
    int ends[2];
    if (export == exports + SIM_MAX_EXPORTS || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
        return SIM_NO_MEMORY;
    struct stat st;
    struct epoll_event event = {.events = 0, .data.u64 = TAG_EXPORT + (uint64_t)(export - exports)};
    if (fstat(ends[1], &st) || shutdown(ends[0], SHUT_RD) || epoll_ctl(server.epoll, EPOLL_CTL_ADD, ends[0], &event)) {
        close(ends[0]);
        close(ends[1]);
        return SIM_NO_MEMORY;
    }
    *export = (struct export){.exists = true, .is_range = is_range, .end = ends[0], .inode = st.st_ino, .share = share};
    share->n_exports++;
    *descriptor = ends[1];
    return SIM_OK;
}

bool share_is_holder(const struct client *client)
{
    for (const struct share *s = shares; s < shares + SIM_MAX_SHARES; s++)
        if (s->exists && find_holder(s, client)) return true;
    return false;
}

void share_export_ends(uint32_t index)
{
    struct export *export = &exports[index];
    if (index >= SIM_MAX_EXPORTS || !export->exists) return;
    close(export->end);
    export->exists = false;
    export->share->n_exports--;
    settle(export->share);
}

bool share_drop(struct client *client, const uint64_t *key)
{
    struct share *share = find(key);
    struct holder *holder = share ? find_holder(share, client) : NULL;
    if (!holder) return false;
    if (--holder->refs)
        settle(share);
    else
        leave(share, holder);
    return true;
}

/* Takes additional bytes from the device. Bytes that are no longer reserved stay as long as other processes have the
 * pool. */
enum sim_status share_resize(struct client *client, const uint64_t *key, uint64_t bytes)
{
    struct share *share = find(key);
    if (!share || share->is.kind != SIM_POOL || share->named != client) return SIM_NOT_ALLOWED;
    uint64_t more = bytes > share->named_bytes ? bytes - share->named_bytes : 0;
    if (more && (fault_fails(SIM_POOL) || !limits_allow(client, share->is.device, more))) return SIM_NO_MEMORY;
    if (bytes > share->is.bytes) {
        if (!ledger_take_unnamed(share->is.device, bytes - share->is.bytes)) return SIM_NO_MEMORY;
        share->is.bytes = bytes;
    }
    client->own[share->is.device].requested[SIM_POOL] += bytes - share->named_bytes;
    set_named_bytes(share, bytes);
    settle(share);
    return SIM_OK;
}

/* Drops the context's shares, and keeps other memory that its process has opened. */
void shares_leave_context(struct client *client, uint64_t context)
{
    for (struct share *s = shares; s < shares + SIM_MAX_SHARES; s++) {
        struct holder *holder = s->exists ? find_holder(s, client) : NULL;
        if (holder && holder->context == context) leave(s, holder);
    }
}

void shares_leave(struct client *client)
{
    for (struct share *s = shares; s < shares + SIM_MAX_SHARES; s++) {
        struct holder *holder = s->exists ? find_holder(s, client) : NULL;
        if (holder) leave(s, holder);
    }
}

void shares_end(void)
{
    for (uint32_t i = 0; i < SIM_MAX_EXPORTS; i++) share_export_ends(i);
}
